"""The statements of a dossier about data and privacy: what was used, and what may be told of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from markupsafe import Markup

from flows.dossier_page import Listed, Pairs, Part, Table
from flows.gates import epsilon_of_run
from flows.report_words import code_words
from flows.shown import Shown, missing, pointer
from fusion.privacy import MinimumCounts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flows.dossier_page import Block

_MODES: Final = {
    "plain": "plain: the coordinator sees the sums of each site",
    "secure_sum": "secure sum: the coordinator sees the sums of at least three sites together, "
    "never those of one",
}
_MINIMUMS: Final = {
    "patients": "training patients behind any sum",
    "events": "observed events behind any sum",
    "patients_per_input": "training patients per input of a fit",
    "cell": "patients in any cell of a table",
    "test_events": "test events behind any figure of performance",
    "pooled_patients": "training patients over all sites",
    "snapshot": "patients by which two cohorts of a site differ",
    "intervals": "intervals of the time grid, at most",
}
_NOBODY: Final = "no site told"
_DIGITS: Final = 4


def privacy_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """Give what a run tells of privacy beyond its protocol: budgets spent, verdicts of audits."""
    epsilon = _epsilon_of_run(record)
    return {
        "sums": _MODES[record["protocol"]["federation"]["sums"]],
        "defaults": MinimumCounts().model_dump(),
        "budgets": [{"site": x["site"], **_spent(epsilon, x)} for x in record["sites"]],
        "audits": [_audit(record, name) for name in _networks(record)],
    }


def _epsilon_of_run(record: Mapping[str, Any]) -> float | str:
    """Epsilon of all that the run released of each site that trained, or why there is none."""
    if not record["protocol"]["differential_privacy"]["epsilon"]:
        return "no budget: sums without noise"
    try:
        return round(epsilon_of_run(record), _DIGITS)
    except ValueError:
        return "unknown: the releases of this run cannot be counted from its protocol"


def _spent(epsilon: float | str, site: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(epsilon, str):
        return {"spent": epsilon}
    if not site["trains"]:
        return {"spent": "nothing: it trained nothing"}
    words = "at most: it left before the end" if site["code"] else "over all releases"
    return {"spent": words, "epsilon": epsilon}


def _networks(record: Mapping[str, Any]) -> list[str]:
    encoders = record["protocol"]["encoder"]
    shared = sorted(name for name, spec in encoders.items() if spec["sharing"] == "weights")
    return [*shared, *(["fusion"] if record["fusion_kind"] == "gated" else [])]


def _audit(record: Mapping[str, Any], name: str) -> dict[str, str]:
    """Verdict on a network whose weights leave sites, as far as the coordinator can know it."""
    if record["protocol"]["study"]["data"] != "patients":
        return {"model": name, "sites": "none", "verdict": "not asked for: no patients' data"}
    trained = [s for s in record["sites"] if s["trains"] and not s["code"]]
    passed = [s["site"] for s in trained if name == "fusion" or name in s["contributes"]]
    return {
        "model": name,
        "sites": ", ".join(passed) or "none",
        "verdict": "passed: a site without a passed audit of its own lets no weights leave",
    }


def data_part(shown: Shown) -> Part:
    """State what data a model was made from, without any small cell."""
    blocks: list[Block] = [
        Markup(
            "The data are {}. Patients' rows stayed at their sites; what is counted here are the "
            "numbers that sites let leave."
        ).format(shown.text("/protocol/study/data")),
        Pairs(
            (
                ("Patients", shown.text("/protocol/governance/population")),
                ("Outcome", shown.text("/protocol/study/endpoint")),
                ("Followed to", shown.number("/protocol/study/horizon_days", "span")),
                ("Held out for testing", shown.number("/protocol/study/test_fraction", "percent")),
                ("Ethics and consent", shown.text("/protocol/governance/ethics")),
            )
        ),
        _sites_table(shown),
        _sources_table(shown),
        Listed(tuple(_on_small_cells(shown))),
    ]
    return Part("data", "Data statement", tuple(blocks))


def _sites_table(shown: Shown) -> Table:
    rows = [_site_row(shown, i) for i in range(len(shown.get("/sites")))]
    whole = (
        Markup("All"),
        Markup("all of the above"),
        counted(shown, "/totals/n_train", "/totals/n_train_events", why=_NOBODY),
        counted(shown, "/totals/n_test", "/totals/n_test_events", why=_NOBODY),
        Markup("as above"),
    )
    return Table(
        "Patients by site, events in parentheses",
        ("Site", "Part", "Training patients", "Test patients", "Cohort, as a digest of the site's"),
        (*rows, whole),
    )


def _site_row(shown: Shown, i: int) -> tuple[Markup, ...]:
    at, site = pointer("sites", i), shown.get(pointer("sites", i))
    part = shown.text(f"{at}/role")
    if site["code"]:
        part = Markup("left: {}").format(code_words(site["code"]))
    return (
        shown.text(f"{at}/site"),
        part,
        counted(shown, f"{at}/n_train", f"{at}/n_train_events", why="it trained nothing"),
        counted(shown, f"{at}/n_test", f"{at}/n_test_events", why="it told none"),
        shown.text(f"{at}/cohort", why="it told none"),
    )


def counted(shown: Shown, patients: str, events: str, *, why: str) -> Markup:
    """Show patients with events in parentheses, small and telling counts hidden.

    Parameters
    ----------
    patients, events
        JSON pointers.
    why
        Why there is no figure, where nothing is hidden.
    """
    first = _hidden(shown, patients)
    if first is not None:
        return first
    if not shown.get(patients):
        return missing(why)
    second = _hidden(shown, events)
    return Markup("{} ({})").format(
        shown.number(patients), shown.number(events) if second is None else second
    )


def _hidden(shown: Shown, at: str) -> Markup | None:
    state = shown.get("/dossier/hidden").get(at)
    if state is None:
        return None
    if state == "small":
        return Markup("&lt; {}").format(shown.number("/protocol/privacy/cell"))
    return Markup("hidden")


def _sources_table(shown: Shown) -> Table:
    rows = []
    for name in shown.get("/protocol/modality"):
        at = pointer("protocol", "encoder", name)
        holders = [
            site["site"] for site in shown.get("/sites") if name in (site["contributes"] or ())
        ]
        rows.append(
            (
                Markup("{}").format(name),
                shown.text(pointer("protocol", "modality", name, "kind")),
                shown.name(f"{at}/sharing"),
                Markup("{}").format(", ".join(holders) or "no site passed the minimum counts"),
            )
        )
    columns = ("Modality", "Kind", "Its encoder shares", "Trained on at")
    return Table("Sources of data", columns, tuple(rows))


def _on_small_cells(shown: Shown) -> Iterator[Markup]:
    yield Markup(
        "The smallest cell of the study is {}. A smaller count of patients, of events, or of "
        "patients without one is hidden, and so is any count from which one would follow."
    ).format(shown.number("/protocol/privacy/cell"))
    if shown.get("/lowered_minimums"):
        yield Markup("Lowered, which no study of patients' data may do: {}.").format(
            shown.items("/lowered_minimums")
        )
    if shown.get("/totals/n_hidden_sites"):
        yield Markup("Sites that told nothing of their test patients: {}.").format(
            shown.number("/totals/n_hidden_sites")
        )


def privacy_part(shown: Shown) -> Part:
    """State how patients were protected, and what is known of it here."""
    blocks: list[Block] = [
        Pairs(
            (
                ("Sums", shown.text("/dossier/privacy/sums")),
                ("Noise", _noise(shown)),
                ("Snapshots", _snapshots(shown)),
                ("Rows", Markup("No row, and nothing computed for one patient, left a site.")),
            )
        ),
        _minimums_table(shown),
        _budgets_table(shown),
        _audits(shown),
    ]
    return Part("privacy", "Privacy statement", tuple(blocks))


def _noise(shown: Shown) -> Markup:
    at = "/protocol/differential_privacy"
    if not shown.get(f"{at}/epsilon"):
        return Markup("none: the study asks for no differential privacy (epsilon {})").format(
            shown.number(f"{at}/epsilon", "g")
        )
    return Markup(
        "differential privacy of the sums that models are fitted from: epsilon {}, delta {}, "
        "no patient adds more than {} to a summed gradient. Figures of performance are without "
        "noise and stand behind the minimum counts."
    ).format(
        shown.number(f"{at}/epsilon", "g"),
        shown.number(f"{at}/delta", "g"),
        shown.number(f"{at}/clip_norm", "g"),
    )


def _snapshots(shown: Shown) -> Markup:
    return Markup(
        "Models see released snapshots of a cohort only; two of a site differ by at least {} "
        "patients, or are the same."
    ).format(shown.number("/protocol/privacy/snapshot"))


def _minimums_table(shown: Shown) -> Table:
    rows = tuple(
        (
            Markup("{}").format(words),
            shown.number(pointer("protocol", "privacy", name)),
            shown.number(pointer("dossier", "privacy", "defaults", name)),
        )
        for name, words in _MINIMUMS.items()
    )
    return Table(
        "Minimum counts", ("What", "In this study", "Usual"), rows,
        "A site may demand more than the study does, and then the site's own hold there.",
    )  # fmt: skip


def _budgets_table(shown: Shown) -> Table:
    rows = []
    for i, one in enumerate(shown.get("/dossier/privacy/budgets")):
        at = pointer("dossier", "privacy", "budgets", i)
        spent = shown.text(f"{at}/spent")
        if "epsilon" in one:
            spent = Markup("{} {}").format(shown.number(f"{at}/epsilon", ".3f"), spent)
        rows.append((shown.text(f"{at}/site"), spent))
    return Table(
        "Epsilon spent in this run", ("Site", "Spent"), tuple(rows),
        "Computed from every noisy sum that the run released, as the gate of the privacy budget "
        "does; what a site spent over all studies is in its own ledger.",
    )  # fmt: skip


def _audits(shown: Shown) -> Block:
    audits = shown.get("/dossier/privacy/audits")
    if not audits:
        return Markup(
            "Membership audit: none was needed, as no network's weights left a site; linear models "
            "fitted from sums are bounded by the minimum counts."
        )
    rows = tuple(
        tuple(shown.text(pointer("dossier", "privacy", "audits", i, x)) for x in ("model", "sites",
              "verdict"))
        for i in range(len(audits))
    )  # fmt: skip
    return Table("Membership audits", ("Network", "Sites", "Verdict"), rows)
