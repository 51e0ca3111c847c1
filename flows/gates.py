"""What a model must reach before anyone is asked to promote it, as figures of its own run.

Every gate reads the run's record, which is what its report shows; nothing is computed from rows. A
gate without its figure fails. One that does not apply, as the comparison with a champion where
there is none, says why, and `mlflow/registry.yaml` says which may.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from flows.policy import WhereNotAsked
from flows.protocol import GateSection, read_protocol
from fusion.federation import PROTOCOL
from fusion.keys import canonical_json, digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_Z: Final = 1.959963984540054
# A budget is split into releases and added up again: rounding is no overspending.
_ROUNDING: Final = 1e-3


@dataclass(frozen=True)
class Figure:
    """A figure with its interval, as a record holds it."""

    value: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True)
class Champion:
    """The model in use, for comparison.

    Attributes
    ----------
    concordance
        None where it has none.
    same_evaluation
        Whether it was found on the very snapshots that the candidate was evaluated on.
    """

    version: int
    concordance: Figure | None
    same_evaluation: bool


@dataclass(frozen=True)
class Quorum:
    """How many sites approved what was run, and how many had to."""

    n_approved: int
    needed: int


@dataclass(frozen=True)
class GateInput:
    """Everything that the gates look at.

    Attributes
    ----------
    record
        The run's ``record.json``.
    rules
        Thresholds that hold for the study.
    where_not_asked
        What happens where a figure could not be asked for.
    champion
        None where no model is in use.
    audits
        Per network that needs one and site, whether its membership audit passed; a site that is
        not in this folder is absent, and let its weights leave after its own audit only.
    enforced
        Whether the run went over the engine, where a site refuses without its passed audit.
    signature_fault
        Why the model's signature does not stand; empty where it does.
    approvals
        None where no kits were provisioned.
    """

    record: Mapping[str, Any]
    rules: GateSection = field(default_factory=GateSection)
    where_not_asked: WhereNotAsked = field(default_factory=WhereNotAsked)
    champion: Champion | None = None
    audits: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    enforced: bool = False
    signature_fault: str = "the model has no signature"
    approvals: Quorum | None = None


@dataclass(frozen=True)
class GateResult:
    """What one gate found.

    Attributes
    ----------
    passed
        None where the gate does not apply.
    found, needed
        Short; a number where the figure is one.
    """

    name: str
    passed: bool | None
    found: float | str
    needed: str
    sentence: str

    @property
    def word(self) -> str:
        """Result as a tag holds it."""
        if self.passed is None:
            return "not_applicable"
        return "passed" if self.passed else "failed"


def all_gates(given: GateInput) -> list[GateResult]:
    """Look at every gate, in the order in which people read them."""
    return [gate(given) for gate in _GATES]


def all_pass(results: Sequence[GateResult]) -> bool:
    """Whether no gate failed."""
    return all(result.passed is not False for result in results)


def failed(results: Sequence[GateResult]) -> tuple[str, ...]:
    """Names of the gates that failed."""
    return tuple(result.name for result in results if result.passed is False)


def gates_digest(results: Sequence[GateResult]) -> str:
    """SHA-256 over what the gates found: what a person who decides has seen."""
    return digest(canonical_json([asdict(result) for result in results]))


def gates_table(results: Sequence[GateResult]) -> str:
    """Write the gates as a Markdown table, the failed ones in bold."""
    lines = ["| gate | result | found | needed |", "| --- | --- | --- | --- |"]
    for result in results:
        word = result.word.replace("_", " ")
        word = f"**{word}**" if result.passed is False else word
        name = result.name.replace("_", " ")
        lines.append(f"| {name} | {word} | {shown(result.found)} | {result.needed} |")
    sentences = [f"- {result.sentence}" for result in results if result.passed is not True]
    return "\n".join([*lines, *([""] if sentences else []), *sentences]) + "\n"


def shown(found: float | str) -> str:
    """Write a figure for people."""
    if isinstance(found, str):
        return found
    return f"{found:.0f}" if float(found).is_integer() and abs(found) >= 2 else f"{found:.3f}"


def figure(values: Any) -> Figure | None:
    """Read a figure with its interval from a record; None where any part is missing."""
    if not isinstance(values, dict):
        return None
    parts = [values.get(name) for name in ("value", "standard_error", "low", "high")]
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in parts):
        return None
    return Figure(*(float(x) for x in parts if x is not None))


def arm_figure(record: Mapping[str, Any], name: str) -> Figure | None:
    """Read a figure of the protocol's model from a record."""
    arms = record.get("results", {}).get("arms", {})
    return figure(arms.get(PROTOCOL, {}).get(name))


def cohorts_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Digest per site, under its own secret, of the cohort that a run saw."""
    return {s["site"]: s["cohort"] for s in record.get("sites", []) if s.get("cohort")}


def _missing(name: str, what: str, needed: str) -> GateResult:
    sentence = (
        f"{what}: found no such figure in the run's record, needed {needed}; a figure is hidden "
        "where too few patients stand behind it"
    )
    return GateResult(name, passed=False, found="none", needed=needed, sentence=sentence)


def _count(given: GateInput, name: str, key: str, *, least: int, what: str) -> GateResult:
    found, needed = given.record.get("totals", {}).get(key), f"at least {least}"
    if not isinstance(found, int):
        return _missing(name, what, needed)
    return GateResult(
        name,
        passed=found >= least,
        found=float(found),
        needed=needed,
        sentence=f"{what}: found {found}, needed {needed}",
    )


def _sites(given: GateInput) -> GateResult:
    least = given.rules.min_sites
    return _count(given, "sites", "n_training_sites", least=least, what="training sites")


def _test_events(given: GateInput) -> GateResult:
    least = given.rules.min_test_events
    return _count(
        given, "test_events", "n_test_events", least=least, what="events of test patients"
    )


def _concordance(given: GateInput) -> GateResult:
    least = given.rules.min_concordance
    needed = f"lower end of the interval at least {least:g}"
    found = arm_figure(given.record, "concordance")
    if found is None:
        return _missing("concordance", "concordance", needed)
    return GateResult(
        "concordance",
        passed=found.low >= least,
        found=_with_interval(found),
        needed=needed,
        sentence=f"concordance: found {_with_interval(found)}, needed its {needed}",
    )


def difference(new: Figure, old: Figure) -> Figure:
    """Difference of two figures of different runs.

    The runs do not say how the two vary together. On the same patients they vary alike, so that
    the interval is too wide rather than too narrow.
    """
    value = new.value - old.value
    error = math.hypot(new.standard_error, old.standard_error)
    return Figure(value, error, value - _Z * error, value + _Z * error)


def _champion(given: GateInput) -> GateResult:
    most, name = given.rules.max_champion_loss, "champion"
    needed = f"at most {most:g} below, and not surely below"
    if given.champion is None:
        sentence = "champion: no model is in use yet, so that there is none to compare with"
        return GateResult(name, passed=None, found="none", needed=needed, sentence=sentence)
    new, old = arm_figure(given.record, "concordance"), given.champion.concordance
    if new is None or old is None:
        return _missing(name, "concordance of candidate and champion", needed)
    found = difference(new, old)
    where = "on the same snapshots" if given.champion.same_evaluation else "on other snapshots"
    text = f"{_with_interval(found, sign='+')} {where}"
    return GateResult(
        name,
        passed=found.value >= -most and found.high >= 0.0,
        found=text,
        needed=needed,
        sentence=f"concordance less that of version {given.champion.version}, the champion: found "
        f"{text}, needed {needed}",
    )


def _calibration_slope(given: GateInput) -> GateResult:
    low, high = given.rules.min_calibration_slope, given.rules.max_calibration_slope
    needed = f"{low:g} to {high:g}, or an interval with 1 in it"
    found = arm_figure(given.record, "calibration_slope")
    if found is None:
        return _missing("calibration_slope", "calibration slope", needed)
    return GateResult(
        "calibration_slope",
        passed=low <= found.value <= high or found.low <= 1.0 <= found.high,
        found=_with_interval(found),
        needed=needed,
        sentence=f"calibration slope: found {_with_interval(found)}, needed {needed}",
    )


def _observed_expected(given: GateInput) -> GateResult:
    low, high = given.rules.min_observed_expected, given.rules.max_observed_expected
    needed = f"{low:g} to {high:g}"
    found = arm_figure(given.record, "observed_expected")
    if found is None:
        return _missing("observed_expected", "observed over expected events", needed)
    return GateResult(
        "observed_expected",
        passed=low <= found.value <= high,
        found=_with_interval(found),
        needed=needed,
        sentence=f"observed over expected events: found {_with_interval(found)}, needed {needed}",
    )


def _leave_one_site_out(given: GateInput) -> GateResult:
    name, least = "leave_one_site_out", given.rules.min_left_out_concordance
    needed = f"at least {least:g} over all and at the worst site"
    values = given.record.get("protocol", {})
    if not values.get("evaluation", {}).get("leave_one_site_out"):
        return _left_out_not_asked(given, needed)
    results = given.record.get("results", {})
    by_site = [figure(x.get("concordance")) for x in results.get("left_out", [])]
    known = [x.value for x in by_site if x is not None]
    pooled = figure(results.get("left_out_pooled"))
    if pooled is None or not known:
        return _missing(name, "concordance with each site left out", needed)
    text = f"{_with_interval(pooled)} over all, {min(known):.3f} at the worst of {len(known)}"
    return GateResult(
        name,
        passed=pooled.value >= least and min(known) >= least,
        found=text,
        needed=needed,
        sentence=f"concordance with each site left out: found {text}, needed {needed}",
    )


def _left_out_not_asked(given: GateInput, needed: str) -> GateResult:
    values, policy = given.record.get("protocol", {}), given.where_not_asked.leave_one_site_out
    data = values.get("study", {}).get("data", "patients")
    secure = values.get("federation", {}).get("sums") == "secure_sum"
    absence = policy.secure_sum if secure else getattr(policy, data)
    why = "secure sums do not allow it" if secure else f"not asked for in this study of {data} data"
    return GateResult(
        "leave_one_site_out",
        passed=None if absence == "not_apply" else False,
        found="not asked",
        needed=needed,
        sentence=f"leave one site out: {why}; evaluation.leave_one_site_out in study.toml asks",
    )


def _membership_audit(given: GateInput) -> GateResult:
    name, needed = "membership_audit", "passed by every network at every site that trained it"
    models = _audited(given.record["protocol"])
    if not models:
        sentence = "membership audit: no network's weights left a site with patients' data"
        return GateResult(name, passed=None, found="no network", needed=needed, sentence=sentence)
    missing = [f"{x} at {s}" for x in models for s in _unaudited(given, x)]
    found = f"{len(models)} networks" if not missing else f"none for {', '.join(missing)}"
    return GateResult(
        name,
        passed=not missing,
        found=found,
        needed=needed,
        sentence=f"membership audit: found {found}, needed it {needed}; run `consilium audit "
        "membership` at the site",
    )


def _audited(protocol: Mapping[str, Any]) -> tuple[str, ...]:
    """Networks whose weights may tell who was trained on, as the protocol itself counts them."""
    if protocol["study"]["data"] != "patients":
        return ()
    networks = tuple(x for x, e in protocol["encoder"].items() if e["sharing"] == "weights")
    return networks + (("fusion",) if protocol["fusion"]["model"] == "gated" else ())


def _unaudited(given: GateInput, model: str) -> list[str]:
    """Sites whose weights of a network count without a passed audit."""
    training = [s for s in given.record.get("sites", []) if s.get("trains") and not s.get("code")]
    names = [s["site"] for s in training if model == "fusion" or model in s["contributes"]]
    of_model = given.audits.get(model, {})
    return [site for site in names if not of_model.get(site, given.enforced)]


def _privacy_budget(given: GateInput) -> GateResult:
    name, budget = "privacy_budget", given.record["protocol"].get("differential_privacy", {})
    epsilon = float(budget.get("epsilon") or 0.0)
    if epsilon <= 0.0:
        sentence = "privacy budget: the study has none"
        return GateResult(name, passed=None, found="none", needed="none", sentence=sentence)
    needed = f"at most epsilon {epsilon:g}"
    try:
        spent = epsilon_of_run(given.record)
    except ValueError:
        return _missing(name, "privacy budget", needed)
    return GateResult(
        name,
        passed=spent <= epsilon * (1.0 + _ROUNDING),
        found=round(spent, 4),
        needed=needed,
        sentence=f"privacy budget: the run tells at most epsilon {spent:.3g} of a site's patients, "
        f"needed {needed}; each site keeps count over all runs and refuses beyond its own",
    )


def epsilon_of_run(record: Mapping[str, Any]) -> float:
    """Epsilon of everything that a run of this protocol releases of a site's training rows.

    Raises
    ------
    ValueError
        If the record's protocol cannot be read, or has no such releases.
    """
    from fusion.differential_privacy import epsilon_spent
    from fusion.federation.private_fitting import schedule

    protocol = read_protocol(dict(record["protocol"]))
    plan = protocol.plan(str(record.get("run", "")))
    found = schedule(plan.budget, plan.private_fits)
    releases = [
        (found.opening, 1),
        (found.step, found.steps * len(found.fits)),
        (found.baseline, 1),
    ]
    return epsilon_spent(releases, plan.budget.delta)


def _minimum_counts(given: GateInput) -> GateResult:
    name, needed = "minimum_counts", "none lowered where data are patients'"
    lowered = given.record.get("lowered_minimums")
    if not isinstance(lowered, list):
        return _missing(name, "minimum counts", needed)
    data = given.record["protocol"].get("study", {}).get("data", "patients")
    found = "; ".join(lowered) or "none lowered"
    passed = (None if data != "patients" else False) if lowered else True
    sentence = f"minimum counts: found {found}, needed {needed}; the data are {data}"
    return GateResult(name, passed=passed, found=found, needed=needed, sentence=sentence)


def _signature(given: GateInput) -> GateResult:
    fault, needed = given.signature_fault, "signed by the coordinator, every file as it was signed"
    return GateResult(
        "signature",
        passed=not fault,
        found=fault or "it stands",
        needed=needed,
        sentence=f"signature: {fault or 'it stands'}",
    )


def _approvals(given: GateInput) -> GateResult:
    name, quorum = "approvals", given.approvals
    if quorum is None:
        data = given.record["protocol"].get("study", {}).get("data", "patients")
        absence = getattr(given.where_not_asked.approvals, data)
        return GateResult(
            name,
            passed=None if absence == "not_apply" else False,
            found="no kits",
            needed="the consortium's quorum",
            sentence=f"approvals: found no start-up kits, and so no quorum; the data are {data}",
        )
    needed = f"at least {quorum.needed} sites"
    return GateResult(
        name,
        passed=quorum.n_approved >= quorum.needed,
        found=float(quorum.n_approved),
        needed=needed,
        sentence=f"approvals of this protocol: found {quorum.n_approved}, needed {needed}; see "
        "`consilium site approve`",
    )


def _with_interval(found: Figure, *, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


_GATES: Final[tuple[Callable[[GateInput], GateResult], ...]] = (
    _sites,
    _test_events,
    _concordance,
    _champion,
    _calibration_slope,
    _observed_expected,
    _leave_one_site_out,
    _membership_audit,
    _privacy_budget,
    _minimum_counts,
    _signature,
    _approvals,
)
