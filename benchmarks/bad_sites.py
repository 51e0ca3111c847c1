"""Which wrong sums and wrong rows of one of three sites are caught, and by what.

The figures of the tables in ``docs/bad-sites.md``, with what is held against honest sites. Sites
answer in this process, with the bytes that a network would carry; a site that lies does so before
its sums are written, or masked.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from cross_validation import Figures, run, whole

from fusion.federation import (
    BoundsBroken,
    Coordinator,
    FederationPlan,
    InProcess,
    Outcome,
    QuorumNotMet,
    SiteRows,
    SiteStudy,
    Split,
)
from fusion.federation.masking import SiteIdentity
from fusion.federation.self_check import self_check
from fusion.keys import SigningKey
from fusion.newton import ConvergenceError
from fusion.privacy import MinimumCounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from fusion import messages as m
    from fusion.federation import Fitted

    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool_]
    Lie = Callable[[m.Sums, m.AskSums], m.Sums]
    Change = Callable[[SiteRows], SiteRows]

BAD = "site-02"
SIZES = (210, 160, 140)
_TRAINING_SHARE = 0.7
_MODALITIES = {"radiology": 6, "clinical": 4}
_LOWEST = -1e12
PLAIN = FederationPlan(
    run="1" * 64,
    protocol="2" * 64,
    modalities=("pathology", *_MODALITIES),
    sums={name: tuple(f"{name}-{i}" for i in range(p)) for name, p in _MODALITIES.items()},
    encoder_ridge={"radiology": (0.02,), "clinical": (0.05,)},
    fusion_ridge=(0.01,),
    n_folds=3,
    edges_days=(180.0, 365.0, 730.0, 1095.0, 1825.0),
    horizon_days=1095.0,
    minimum=MinimumCounts(
        patients=20, events=5, patients_per_input=1, cell=1, test_events=3, pooled_patients=50
    ),
)
MODELS = {"cox": PLAIN, "discrete": replace(PLAIN, fusion_model="logistic_hazard")}
MODES = ("plain", "secure_sum")


def draw_site(n: int, seed: int) -> SiteRows:
    """Draw a site of ``n`` patients: a fifth lack radiology, a tenth a slide.

    Its radiology has a location of its own, and its own encoders know little.
    """
    rng = np.random.default_rng(seed)
    tables = {x: rng.normal(size=(n, p)) for x, p in _MODALITIES.items()}
    slide = rng.normal(size=n)
    log_hazard = (
        tables["radiology"] @ np.linspace(-0.6, 0.6, 6)
        + tables["clinical"] @ np.linspace(0.0, 0.5, 4)
        + 0.4 * slide
    )
    died = np.ceil(rng.exponential(900.0 * np.exp(log_hazard.mean() - log_hazard)))
    lost = np.ceil(rng.uniform(200.0, 2500.0, n))
    own = {x: 0.5 * table[:, 0] + rng.normal(size=n) for x, table in tables.items()}
    lacking = rng.random(n) < 0.2
    tables["radiology"] = 2.0 * tables["radiology"] + seed
    tables["radiology"][lacking] = own["radiology"][lacking] = np.nan
    slide[rng.random(n) < 0.1] = np.nan
    k = int(n * _TRAINING_SHARE)
    event, time = died <= lost, np.minimum(died, lost)
    return SiteRows(
        cohort=f"{seed:064x}",
        train=Outcome(event[:k], time[:k]),
        test=Outcome(event[k:], time[k:]),
        folds=rng.integers(0, PLAIN.n_folds, k),
        tables={x: Split(table[:k], table[k:]) for x, table in tables.items()},
        local={x: Split(v[:k], v[k:]) for x, v in {"pathology": slide, **own}.items()},
    )


def draw(seed: int) -> dict[str, SiteRows]:
    """Draw a consortium of three sites."""
    return {f"site-0{i}": draw_site(n, 10 * seed + i) for i, n in enumerate(SIZES, start=1)}


class Liar(SiteStudy):
    """A site that skips its own check, and changes its sums of the fits that it lies about."""

    lie: Lie | None = None
    about: tuple[str, ...] = ()
    lies = 0

    def _sums(self, request: m.AskSums) -> m.Sums:
        honest = super()._sums(request)
        if self.lie is None or request.fits[0].partition("/")[0] not in self.about:
            return honest
        self.lies += 1
        return self.lie(honest, request)

    def _require_sound(self, fault: str | None) -> None:
        del fault


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes
    ----------
    by
        What caught the site: ``bounds``, ``schema`` (or the mask's own range), ``off_maximum``;
        ``no_maximum`` where a fit failed otherwise; empty where nothing did.
    round
        Wrong reply, from 1, after which it was caught.
    fitted
        None where the run ended.
    """

    by: str
    round: int
    fitted: Fitted | None = None


def studies_of(
    rows: Mapping[str, SiteRows], plan: FederationPlan, *, lie: Lie | None = None
) -> dict[str, SiteStudy]:
    """Give each site's part; one of them lies about the model, or only skips its own check.

    Encoders are Cox models in either case, so that of a discrete-time model the site lies about the
    fusion alone.
    """
    keys = {site: SigningKey(site.encode().ljust(32, b".")) for site in rows}
    trusted = {site: key.public for site, key in keys.items()}
    found: dict[str, SiteStudy] = {}
    for site, of_site in rows.items():
        kind = Liar if site == BAD else SiteStudy
        found[site] = kind(plan, of_site, identity=SiteIdentity(site, keys[site], trusted))
    liar = _liar(found)
    liar.lie, liar.about = lie, plan.arms if plan.n_baseline else plan.designs
    return found


def _liar(studies: Mapping[str, SiteStudy]) -> Liar:
    liar = studies[BAD]
    assert isinstance(liar, Liar)
    return liar


def ending_of(plan: FederationPlan, studies: dict[str, SiteStudy]) -> Ending:
    """Run a study to its end, whatever that is."""
    liar, left = _liar(studies), 0

    def watch(_: object) -> None:
        nonlocal left
        found = coordinator.talk.outcomes.get(BAD)
        if not left and found is not None and found.code:
            left = liar.lies

    coordinator, fitted = Coordinator(plan, InProcess(studies), on_round=watch), None
    try:
        fitted = coordinator.run()
    except BoundsBroken:
        return Ending("bounds", liar.lies)
    except ConvergenceError as error:
        by = "off_maximum" if "ended off its maximum" in str(error) else "no_maximum"
        return Ending(by, liar.lies)
    except QuorumNotMet:
        left = left or liar.lies
    code = coordinator.talk.outcomes[BAD].code
    by = {"": "", "not_within_bounds": "bounds"}.get(code, "schema")
    return Ending(by, left, fitted)


def plan_of(model: str, mode: str) -> FederationPlan:
    """Plan of a model, with sums in the clear or added up behind masks."""
    return replace(MODELS[model], secure_sum=mode == "secure_sum")


# Sums that no rows have.


def _times(factor: float, *names: str) -> Lie:
    def lie(reply: m.Sums, _: m.AskSums) -> m.Sums:
        with np.errstate(invalid="ignore"):  # infinity times zero is the lie
            return replace(reply, **{x: factor * getattr(reply, x) for x in names})

    return lie


def _more_patients(reply: m.Sums, _: m.AskSums) -> m.Sums:
    return replace(reply, n_patients=3 * reply.n_patients, n_events=3 * reply.n_events)


def _outweighed(reply: m.Sums, request: m.AskSums, *, at_zero: bool) -> m.Sums:
    if not at_zero and not request.coefficients.any():
        return reply
    nothing = _times(0.0, "gradient", "information")(reply, request)
    return replace(nothing, log_likelihood=np.full_like(reply.log_likelihood, _LOWEST))


_WHOLE = ("gradient", "information", "log_likelihood")
LIES: dict[str, Lie] = {
    "not a number": _times(np.nan, "gradient"),
    "infinite": _times(np.inf, "information"),
    **{f"gradient x{x:g}": _times(x, "gradient") for x in (100.0, 1e6, -1.0, 0.0, 2.0, 1.2)},
    **{f"information x{x:g}": _times(x, "information") for x in (100.0, -1.0)},
    "log-likelihood x2": _times(2.0, "log_likelihood"),
    **{f"everything x{x:g}": _times(x, *_WHOLE) for x in (100.0, 1e6, 1.2, 1.5, 2.0, 3.0, 5.0)},
    "more patients": _more_patients,
    "outweighed at 0": partial(_outweighed, at_zero=True),
    "outweighed at every later step": partial(_outweighed, at_zero=False),
}


def sums_caught(seeds: Sequence[int]) -> dict[str, Any]:
    """Count, per lie, model and mode, how often what caught it, and after which round."""
    return {
        name: {
            f"{model}, {mode}": _counted(
                ending_of(plan_of(model, mode), studies_of(draw(s), plan_of(model, mode), lie=lie))
                for s in seeds
            )
            for model in MODELS
            for mode in MODES
        }
        for name, lie in LIES.items()
    }


def _counted(endings: Iterable[Ending]) -> dict[str, Any]:
    found = list(endings)
    caught = [x for x in found if x.by]
    return {
        "caught": len(caught),
        "by": dict(Counter(x.by for x in caught)),
        "latest_round": max((x.round for x in caught), default=None),
    }


# Rows that are wrong.


def _outcome(
    rows: SiteRows, *, change: Callable[[Flags, Floats], tuple[Flags, Floats]]
) -> SiteRows:
    n = len(rows.train)
    event, time = change(
        np.concatenate([rows.train.event, rows.test.event]),
        np.concatenate([rows.train.time, rows.test.time]),
    )
    return replace(rows, train=Outcome(event[:n], time[:n]), test=Outcome(event[n:], time[n:]))


def _tables(rows: SiteRows, *, change: Callable[[Floats], Floats]) -> SiteRows:
    tables = {x: Split(change(t.train), change(t.test)) for x, t in rows.tables.items()}
    return replace(rows, tables=tables)


def _one_wild_row(values: Floats) -> Floats:
    return values * np.where(np.arange(len(values)) == 3, 1e6, 1.0)[:, None]


def _shuffled(event: Flags, time: Floats) -> tuple[Flags, Floats]:
    order = np.random.default_rng(0).permutation(len(event))
    return event[order], time[order]


def _noisy(event: Flags, time: Floats) -> tuple[Flags, Floats]:
    return event ^ (np.random.default_rng(0).random(len(event)) < 0.1), time


def _copied(rows: SiteRows) -> SiteRows:
    n = len(rows.train)
    again = np.arange(n) % (n // 2)

    def copied(values: Split) -> Split:
        return Split(values.train[again], values.test)

    return replace(
        rows,
        train=Outcome(rows.train.event[again], rows.train.time[again]),
        tables={x: copied(t) for x, t in rows.tables.items()},
        local={x: copied(v) for x, v in rows.local.items()},
    )


_REVERSED: Change = partial(
    _outcome, change=lambda event, time: (event, time.max() + time.min() - time)
)
WRONG: dict[str, Change] = {
    "one row x1e6": partial(_tables, change=_one_wild_row),
    "tables x100": partial(_tables, change=lambda x: 100.0 * x),
    "tables x1e6": partial(_tables, change=lambda x: 1e6 * x),
    "order of time reversed": _REVERSED,
    "events inverted": partial(_outcome, change=lambda event, time: (~event, time)),
    "all events": partial(_outcome, change=lambda event, time: (event | True, time)),
    "outcomes permuted": partial(_outcome, change=_shuffled),
    "inputs negated": partial(_tables, change=lambda x: -x),
    "tables x2": partial(_tables, change=lambda x: 2.0 * x),
    "10 % of events wrong": partial(_outcome, change=_noisy),
}
# Such a site has nothing to train on, or trains as before: only its own check is asked.
ONLY_CHECKED: dict[str, Change] = {
    "copied rows": _copied,
    "constant tables": partial(_tables, change=lambda x: 0.0 * x + 3.0),
    "same times": partial(_outcome, change=lambda event, time: (event, 0.0 * time + 9.0)),
    "no events": partial(_outcome, change=lambda event, time: (event & False, time)),
}


def rows_caught(seeds: Sequence[int]) -> dict[str, Any]:
    """Count, per kind of wrong rows, what told of them; beyond its own check the site lies."""
    found: dict[str, Any] = {}
    for name, change in (WRONG | ONLY_CHECKED).items():
        told: Counter[str] = Counter()
        for seed in seeds:
            rows = draw(seed)
            rows[BAD] = change(rows[BAD])
            told["self_check"] += self_check(rows[BAD]) is not None
            if name in WRONG:
                told.update(_told_of(rows))
        columns = ("self_check", *(() if name in ONLY_CHECKED else _COLUMNS))
        found[name] = {column: told[column] for column in columns}
    return found


def knowing(n: int, seed: int) -> SiteRows:
    """Draw a site whose own encoder was fitted before anything went wrong, and knows something."""
    rows = draw_site(n, seed)
    table, risk = rows.tables["clinical"], np.linspace(0.0, 0.5, 4)
    return replace(rows, local={"clinical": Split(table.train @ risk, table.test @ risk)})


def seen_by_a_good_encoder(seeds: Sequence[int]) -> dict[str, int]:
    """Count, by training patients, the sites that see themselves that their time is reversed."""
    return {
        str(n): sum(
            self_check(_REVERSED(knowing(round(n / _TRAINING_SHARE), s))) is not None for s in seeds
        )
        for n in (280, 700)
    }


_COLUMNS = (
    "left", "training_sums", "held_out", "honest_site_named_by_training_sums",
    "secure_sum_left", "secure_sum_held_out",
)  # fmt: skip


def _told_of(rows: Mapping[str, SiteRows]) -> dict[str, bool]:
    plain = ending_of(PLAIN, studies_of(rows, PLAIN))
    secure_plan = plan_of("cox", "secure_sum")
    secure = ending_of(secure_plan, studies_of(rows, secure_plan))
    of_sums, of_tests = _alarmed(plain.fitted)
    return {
        "left": plain.by != "",
        "training_sums": BAD in of_sums,
        "held_out": BAD in of_tests,
        "honest_site_named_by_training_sums": bool(of_sums - {BAD}),
        "secure_sum_left": secure.by != "",
        "secure_sum_held_out": BAD in _alarmed(secure.fitted)[1],
    }


def _alarmed(fitted: Fitted | None) -> tuple[set[str], set[str]]:
    """Sites that training sums, and that held-out rows, raise an alarm of."""
    if fitted is None:
        return set(), set()
    of_sums = {x.site for x in fitted.alarms if x.reason == "unlike_in_training"}
    return of_sums, {x.site for x in fitted.alarms if x.reason != "unlike_in_training"}


# Honest sites, of every shape.


def _monthly(rows: SiteRows) -> SiteRows:
    return _outcome(rows, change=lambda event, time: (event, np.ceil(time / 90.0) * 90.0))


def _separated(rows: SiteRows) -> SiteRows:
    table = rows.tables["clinical"]
    train, test = table.train.copy(), table.test.copy()
    train[:, 0], test[:, 0] = rows.train.time > 400.0, rows.test.time > 400.0
    return replace(rows, tables={**rows.tables, "clinical": Split(train, test)})


def _absent(rows: SiteRows) -> SiteRows:
    without = {x: t for x, t in rows.tables.items() if x != "radiology"}
    return replace(
        rows, tables=without, local={x: v for x, v in rows.local.items() if x != "radiology"}
    )


def _nearly_empty(values: Floats) -> Floats:
    return np.where((np.arange(len(values)) % 4 == 0)[:, None], values, np.nan)


HONEST: dict[str, Change] = {
    "as drawn": lambda rows: rows,
    "ties": _monthly,
    "separation": _separated,
    "collinear": partial(
        _tables, change=lambda x: x[:, [0, 0, 0, 0, 0, 0][: x.shape[1]]] + 1e-9 * x
    ),
    "one constant input": partial(
        _tables, change=lambda x: np.where(np.arange(x.shape[1]), x, 5.0)
    ),
    "long tails": partial(_tables, change=lambda x: np.sinh(x - np.nanmean(x, axis=0))),
    "no radiology": _absent,
    "nearly empty tables": partial(_tables, change=_nearly_empty),
}
PLANS: dict[str, dict[str, Any]] = {
    "one strength": {},
    "five strengths": {
        "encoder_ridge": dict.fromkeys(_MODALITIES, (0.003, 0.01, 0.03, 0.1, 0.3)),
        "fusion_ridge": (0.003, 0.01, 0.03, 0.1, 0.3),
    },
    "L1": {"l1_ratio": dict.fromkeys(_MODALITIES, 0.5)},
    "PCA": {"components": {"radiology": 3}},
    "discrete": {"fusion_model": "logistic_hazard"},
}


def honest(seeds: Sequence[int]) -> dict[str, int]:
    """Count what is held against honest sites in runs, one of three having an odd shape."""
    told: Counter[str] = Counter()
    for seed in seeds:
        for change in HONEST.values():
            rows = draw(seed)
            rows[BAD] = change(rows[BAD])
            for options in PLANS.values():
                for mode in MODES:
                    plan = replace(PLAIN, **options, secure_sum=mode == "secure_sum")
                    told.update(_held_against(rows, plan))
    return {name: told[name] for name in _HELD}


_HELD = (
    "runs", "bounds_broken", "off_maximum", "no_maximum", "plain_runs",
    "plain_runs_with_an_alarm_of_training_sums", "evaluations",
    "evaluations_with_an_alarm_of_held_out_rows",
)  # fmt: skip


def self_checked(seeds: Sequence[int]) -> dict[str, int]:
    """Count honest sites, of every shape, and those that their own check stops."""
    found = [
        self_check(change(rows)) is not None
        for seed in seeds
        for rows in draw(seed).values()
        for change in HONEST.values()
    ]
    return {"sites": len(found), "stopped": sum(found)}


def _held_against(rows: Mapping[str, SiteRows], plan: FederationPlan) -> dict[str, int]:
    found = ending_of(plan, studies_of(rows, plan))
    of_sums, of_tests = _alarmed(found.fitted)
    plain = not plan.secure_sum
    return {
        "runs": 1,
        "bounds_broken": found.by == "bounds",
        "off_maximum": found.by == "off_maximum",
        "no_maximum": found.by == "no_maximum",
        "plain_runs": plain,
        "plain_runs_with_an_alarm_of_training_sums": plain and bool(of_sums),
        "evaluations": 0 if found.fitted is None else len(found.fitted.evaluations),
        "evaluations_with_an_alarm_of_held_out_rows": len(of_tests),
    }


def study(arguments: argparse.Namespace) -> Figures:
    """Count over all consortia."""
    seeds = range(arguments.seed + 1, arguments.seed + 1 + arguments.consortia)
    others = range(arguments.seed + 1, arguments.seed + 1 + arguments.honest)
    return {
        "benchmark": "bad_sites",
        "consortia": arguments.consortia,
        "training_patients": [int(n * _TRAINING_SHARE) for n in SIZES],
        "sums": sums_caught(seeds),
        "rows": rows_caught(seeds),
        "time_reversed_seen_by_a_good_encoder": seen_by_a_good_encoder(seeds),
        "honest": honest(others),
        "honest_self_checks": self_checked(seeds),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and print one JSON object."""
    parser = argparse.ArgumentParser(description="Bad sites: what is caught, and by what.")
    parser.add_argument("--consortia", type=whole(1), default=5, help="per wrong sum and wrong row")
    parser.add_argument("--honest", type=whole(1), default=1, help="consortia per shape of rows")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--json", action="store_true", help="the only form there is")
    return run(parser, study, arguments)


if __name__ == "__main__":
    sys.exit(main())
