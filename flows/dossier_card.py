"""A dossier's model card, its list of materials, and its history: what, how good, who agreed."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

from markupsafe import Markup

from flows import report_sentences as sentences
from flows.dossier_page import Listed, Pairs, Part, Table
from flows.dossier_statements import counted
from flows.report_words import ARM_WORDS, COMPARED
from flows.shown import Shown, missing, pointer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flows.dossier_page import Block

_FITTED: Final = {
    "cox": "ridge-penalised Cox model, stratified by site,",
    "logistic_hazard": "ridge-penalised logistic hazard in discrete time",
    "gated": "small gated network, fitted by averaging weights over sites",
}
_NO_FIGURE: Final = "no figure was released"
_FIGURES: Final = {
    "concordance": ".3f", "brier": ".3f", "observed_expected": ".2f", "calibration_slope": ".2f",
}  # fmt: skip


def card_part(shown: Shown) -> Part:
    """Say what the model is, whom it is for, how good it is, and what weakens it."""
    blocks: list[Block] = [
        Pairs(
            (
                ("What it is", _what(shown)),
                ("Intended use", shown.text("/protocol/governance/intended_use")),
                ("Not for", Markup("decisions about a patient: it is no medical device")),
                ("Patients", shown.text("/protocol/governance/population")),
                ("Trained on", _trained_on(shown)),
                ("Inputs", _inputs()),
                ("Funding", shown.text("/protocol/governance/funding")),
                ("Contact", shown.text("/protocol/governance/contact_role")),
            )
        ),
        Listed(tuple(sentences.findings(shown))),
        _modalities_table(shown),
        _performance_table(shown),
        _by_site_table(shown),
        _subgroups(shown),
        Markup("What weakens it:"),
        Listed(tuple(sentences.limitations(_with_counts(shown)))),
    ]
    return Part("summary", "Model card", tuple(blocks))


def _what(shown: Shown) -> Markup:
    return Markup("{} for {} up to {}, from one log hazard per modality; higher is worse").format(
        _FITTED[shown.get("/fusion_kind")],
        shown.text("/protocol/study/endpoint"),
        shown.number("/protocol/study/horizon_days", "span"),
    )


def _trained_on(shown: Shown) -> Markup:
    counts = counted(
        shown, "/totals/n_fitted", "/totals/n_fitted_events", why="no count was released"
    )
    words = "{} patients (events in parentheses) at {} sites; the data are {}"
    return Markup(words).format(
        counts, shown.number("/totals/n_training_sites"), shown.text("/protocol/study/data")
    )


def _inputs() -> Markup:
    return Markup(
        "what the study's extractors and encoders give; a modality that a patient lacks is "
        "missing, not zero"
    )


def _with_counts(shown: Shown) -> Shown:
    """Give the facts with nought for hidden totals, which sentences about few events then skip."""
    values = copy.deepcopy(shown.values)
    values["totals"] = {k: 0 if v is None else v for k, v in values["totals"].items()}
    return Shown(values)


def _modalities_table(shown: Shown) -> Table:
    rows = []
    for name in shown.get("/models/protocol/modalities"):
        encoder = pointer("protocol", "encoder", name)
        rows.append(
            (
                Markup("{}").format(name),
                shown.text(pointer("protocol", "modality", name, "kind")),
                shown.name(f"{encoder}/model"),
                shown.name(f"{encoder}/sharing"),
                shown.estimate(pointer("results", "alone", name), why=_NO_FIGURE),
            )
        )
    columns = ("Modality", "Kind", "Encoder", "It shares", "Concordance of this modality alone")
    return Table("Modalities", columns, tuple(rows))


def _performance_table(shown: Shown) -> Table:
    arms = [arm for arm in COMPARED if shown.get(pointer("results", "arms", arm)) is not None]
    rows = []
    for arm in arms:
        at = pointer("results", "arms", arm)
        figures = [
            shown.estimate(f"{at}/{name}", how, why=_NO_FIGURE) for name, how in _FIGURES.items()
        ]
        rows.append((Markup("{}").format(ARM_WORDS[arm]), *figures))
    if not rows:
        rows = [(Markup("Any"), *[missing(_NO_FIGURE)] * 4)]
    columns = ("Trained", "Concordance", "Integrated Brier score", "Observed over expected events",
               "Calibration slope")  # fmt: skip
    return Table(
        "Performance on test patients", columns, tuple(rows),
        "With intervals. Concordance: a half is chance, higher is better; Brier score: lower is.",
    )  # fmt: skip


def _by_site_table(shown: Shown) -> Block:
    found = shown.get("/results/arms/protocol/by_site") or {}
    if not found:
        return Markup("No site released a concordance of its own.")
    rows = tuple(
        (
            Markup("{}").format(site),
            shown.estimate(pointer("results", "arms", "protocol", "by_site", site), why=_NO_FIGURE),
        )
        for site in found
    )
    return Table("Concordance by site", ("Site", "Concordance"), rows)


def _subgroups(shown: Shown) -> Block:
    levels = shown.get("/results/subgroups")
    if not levels:
        return Markup("The protocol names no subgroups.")
    rows = []
    for i in range(len(levels)):
        at = pointer("results", "subgroups", i)
        why = "hidden by the sites"
        rows.append(
            (
                Markup("{}, {}").format(shown.name(f"{at}/variable"), shown.text(f"{at}/level")),
                counted(shown, f"{at}/n_patients", f"{at}/n_events", why=why),
                shown.estimate(f"{at}/concordance", why=why),
                shown.estimate(f"{at}/observed_expected", ".2f", why=why),
            )
        )
    columns = ("Subgroup", "Test patients", "Concordance", "Observed over expected events")
    return Table("Subgroups, events in parentheses", columns, tuple(rows))


def materials_part(shown: Shown) -> Part:
    """Say what the model is made of and with; the whole list is the file ``bom.cdx.json``."""
    at = "/dossier/materials"
    direct = [i for i, x in enumerate(shown.get(f"{at}/packages")) if x["direct"]]
    blocks: list[Block] = [
        Markup(
            "The model was made with {} packages, {} of them required by name; {} name no licence. "
            "All are in <code>bom.cdx.json</code>, in the form CycloneDX."
        ).format(
            *(shown.number(f"{at}/{x}") for x in ("n_packages", "n_direct", "n_without_licence"))
        ),
        Pairs(
            (
                ("Code", shown.text(f"{at}/commit")),
                ("List of packages", shown.text(f"{at}/source")),
                ("Its digest", shown.text(f"{at}/digest")),
            )
        ),
        _table_of(shown, f"{at}/models", range(len(shown.get(f"{at}/models"))),
                  title="Models and weights",
                  columns={"name": "Name", "part": "What it is", "licence": "Terms",
                           "digest": "Digest of its values"}),
        _table_of(shown, f"{at}/packages", direct, title="Packages required by name",
                  columns={"name": "Package", "version": "Version", "licence": "Licence"}),
    ]  # fmt: skip
    return Part("materials", "Bill of materials", tuple(blocks))


def history_part(shown: Shown) -> Part:
    """Say which versions there are, who approved the study, and who decided on each version."""
    history: Sequence[Any] = shown.get("/dossier/history")
    approvals: Sequence[Any] = shown.get("/dossier/approvals")
    versions: Block = Markup("No version of this model is registered yet.")
    if history:
        versions = _table_of(
            shown, "/dossier/history", range(len(history)), title="Versions, newest first",
            columns={"version": "Version", "date": "Registered", "run": "Run", "aliases": "Aliases",
                     "gates": "Gates", "decision": "Decision"},
        )  # fmt: skip
    signed: Block = Markup(
        "No site's approval lies with the coordinator: the sites were all in one process, or none "
        "has signed."
    )
    if approvals:
        signed = _table_of(
            shown, "/dossier/approvals", range(len(approvals)), title="Approvals of the study",
            columns={"site": "Site", "protocol": "Protocol", "same": "Of this run", "code": "Code",
                     "signature": "Signature"},
        )  # fmt: skip
    quorum = Pairs((("Quorum", shown.text("/dossier/quorum")),))
    protocol = Pairs((("Protocol of this run", shown.text("/protocol_fingerprint")),))
    return Part("history", "Versions and approvals", (versions, protocol, quorum, signed))


def _table_of(
    shown: Shown, at: str, rows: Sequence[int], *, title: str, columns: dict[str, str]
) -> Table:
    cells = tuple(tuple(shown.text(f"{at}/{i}/{name}") for name in columns) for i in rows)
    return Table(title, tuple(columns.values()), cells)
