"""The items of CLAIM, 2024 update, in our own short words, and what a run can say to each.

References
----------
Tejani et al., Checklist for Artificial Intelligence in Medical Imaging (CLAIM): 2024 update,
Radiology: Artificial Intelligence 6 (2024) e240300.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from markupsafe import Markup

from flows.dossier_page import Part, Table
from flows.protocol import NOT_STATED
from flows.report_checklist import CHECKLIST, Item
from flows.report_page import SECTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flows.dossier_page import Block
    from flows.shown import Shown

IMAGING: Final = ("pathology", "radiology")
CLAIM: dict[str, tuple[Item, ...]] = {
    "Title and abstract": (
        Item("1", "Say that the method is machine learning, and of which family", ("summary",)),
        Item("2", "Abstract: design, methods, results, conclusion", ("summary",),
             "setting and registration"),
    ),
    "Introduction": (
        Item("3", "Background, and what the method is meant to do in care", (),
             "the clinical question"),
        Item("4", "Aims and hypotheses", ("summary",), "hypotheses as planned"),
    ),
    "Methods: design": (
        Item("5", "Were data gathered before or after the study was planned", (),
             "prospective or retrospective, per site"),
        Item("6", "What kind of study it is: making, testing, comparing a model", ("methods",),
             "the goal as planned"),
    ),
    "Methods: data": (
        Item("7", "Where the data are from", ("participants", "reproducibility"),
             "scanners, laboratories and registries of each site"),
        Item("8", "Whom and what images were let in or left out", (),
             "criteria; counts of inputs set aside stay at a site"),
        Item("9", "What is done to images before a model sees them",
             ("predictors", "reproducibility"), "work done before files reached the extractors"),
        Item("10", "Which parts of the data were used, and how chosen", ("predictors", "methods"),
             "regions and slides chosen at the sites"),
        Item("11", "How identity was removed", ("limitations",),
             "how sites make pseudonyms; images never leave a site"),
        Item("12", "What happens where data are missing", ("methods", "model"),
             "reasons for missing images"),
        Item("13", "How images were acquired", (), "protocols of scanners and of staining"),
    ),
    "Methods: reference standard": (
        Item("14", "What counts as truth, in enough detail to repeat it", ("predictors",),
             "how the outcome was assessed"),
        Item("15", "Why that is taken for truth", (), "the reason for this outcome"),
        Item("16", "Who supplied it, and their training", (),
             "registrars; readers of contours and slides"),
        Item("17", "How test cases were annotated", (), "annotation of the test patients"),
        Item("18", "How far readers agree with one another and themselves", (),
             "agreement on contours and slides"),
    ),
    "Methods: partitions": (
        Item("19", "How cases were assigned to training, tuning and testing",
             ("participants", "methods")),
        Item("20", "At which level the partitions do not overlap: patient, site",
             ("participants", "methods")),
    ),
    "Methods: testing data": (
        Item("21", "How many cases were planned, and why", ("participants",), "a calculation"),
    ),
    "Methods: model": (
        Item("22", "The model in full: inputs, layers, outputs", ("model", "predictors",
             "reproducibility"), "networks that stay at a site"),
        Item("23", "Software, with versions", ("reproducibility",)),
        Item("24", "Where parameters start from", ("methods", "reproducibility"),
             "terms and training data of published weights"),
    ),
    "Methods: training": (
        Item("25", "How the model was trained: settings, augmentation, stopping", ("methods",
             "reproducibility"), "augmentation, of which extractors do none"),
        Item("26", "How the final model was chosen", ("methods", "model")),
        Item("27", "Ensembles, if any", ("methods", "predictors"), "why this number of networks"),
    ),
    "Methods: evaluation": (
        Item("28", "Measures of performance", ("performance",)),
        Item("29", "Uncertainty, and tests of significance", ("performance", "comparison")),
        Item("30", "Robustness, and sensitivity to choices", ("contributions", "heterogeneity",
             "subgroups"), "sensitivity to scanners and staining"),
        Item("31", "Means of explaining what the model does", ("model", "contributions"),
             "review of attention maps, which stay at the sites"),
        Item("32", "Evaluation on data of the sites that trained", ("performance",)),
        Item("33", "Evaluation on data of other sites", ("participants", "left-out",
             "performance"), "why these sites are far enough from the others"),
        Item("34", "Registration as a clinical trial", (), "register and number, or none"),
    ),
    "Results": (
        Item("35", "Patients or examinations let in and left out", ("participants",),
             "those who never reached a cohort"),
        Item("36", "Characteristics in each partition", ("participants", "subgroups"),
             "a table of characteristics from each site"),
        Item("37", "Performance with uncertainty, on every partition", ("performance",
             "comparison", "left-out")),
        Item("38", "Accuracy of decisions with its precision", ("performance", "decision",
             "subgroups"), "the clinical meaning of the thresholds"),
        Item("39", "Where and why the model fails", ("subgroups", "limitations"),
             "review of single cases at the sites"),
    ),
    "Discussion": (
        Item("40", "Limitations: methods, bias, uncertainty, generalisation", ("limitations",),
             "those of the data and the setting"),
        Item("41", "What it means for practice, and the role in care", (),
             "the reading in context"),
    ),
    "Other information": (
        Item("42", "Where the protocol and technical details are", ("reproducibility",),
             "where it is published; its fingerprint identifies it"),
        Item("43", "Whether software, model and data can be had", ("reproducibility",),
             "terms of access"),
        Item("44", "Funding, and the funder's part", (), "funding"),
    ),
}  # fmt: skip
# Items that the study lead answers in [governance] of study.toml, by checklist.
STATED_CLAIM: Final[Mapping[str, str]] = {
    "3": "intended_use", "8": "population", "11": "ethics", "41": "intended_use", "44": "funding",
}  # fmt: skip
STATED_TRIPOD: Final[Mapping[str, str]] = {
    "3b": "intended_use", "6b": "population", "17": "ethics", "18a": "funding",
}  # fmt: skip


def imaging_modalities(shown: Shown) -> list[str]:
    """Names of the modalities that are made from images."""
    found = shown.get("/protocol/modality")
    return [name for name, spec in found.items() if spec["kind"] in IMAGING]


def tripod_part(shown: Shown) -> Part:
    """TRIPOD+AI, item by item, with where the run's report answers it."""
    about = Markup(
        "After <cite>Collins et al., BMJ 2024;385:e078378</cite>, items in our own short words. "
        "The sections named are those of the report of the run."
    )
    table = _items_table(shown, CHECKLIST, STATED_TRIPOD)
    return Part("tripod", "TRIPOD+AI checklist", (about, table))


def claim_part(shown: Shown) -> Part:
    """CLAIM, item by item, or why it does not apply."""
    names = imaging_modalities(shown)
    blocks: tuple[Block, ...] = (
        Markup(
            "The checklist is for studies of medical images. No modality of this study is made "
            "from images by its extractors, so that it does not apply."
        ),
    )
    if names:
        about = Markup(
            "After <cite>Tejani et al., Radiology: Artificial Intelligence 2024;6:e240300</cite>, "
            "items in our own short words, for: {}. The sections named are those of the report of "
            "the run."
        ).format(", ".join(names))
        blocks = (about, _items_table(shown, CLAIM, STATED_CLAIM))
    return Part("claim", "CLAIM checklist", blocks)


def answers(
    shown: Shown, checklist: Mapping[str, tuple[Item, ...]], stated: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Give each item with who answers it, where, and what is left to the authors.

    Parameters
    ----------
    stated
        Items that a key of the protocol's governance section answers.
    """
    for section, items in checklist.items():
        for item in items:
            key = stated.get(item.number, "")
            said = shown.get(f"/protocol/governance/{key}") if key else NOT_STATED
            yield {
                "section": section,
                "item": item.number,
                "asks": item.asks,
                "state": item.state if said == NOT_STATED else "◐ In part",
                "report": [SECTIONS[place] for place in item.places],
                "stated": "" if said == NOT_STATED else key,
                "authors": item.authors,
            }


def tripod_values(shown: Shown) -> list[dict[str, Any]]:
    """Give TRIPOD+AI's items for programs: ``said`` holds what the study lead stated."""
    return [
        {
            **{name: value for name, value in found.items() if name != "stated"},
            "said": shown.get(f"/protocol/governance/{found['stated']}")
            if found["stated"]
            else "nothing beyond the report",
            "report": found["report"] or ["nothing: a run cannot know it"],
            "authors": found["authors"] or "nothing to add",
        }
        for found in answers(shown, CHECKLIST, STATED_TRIPOD)
    ]


def _items_table(
    shown: Shown, checklist: Mapping[str, tuple[Item, ...]], stated: Mapping[str, str]
) -> Table:
    rows = tuple(
        (
            Markup("<code>{}</code>").format(found["item"]),
            Markup("{}").format(found["asks"]),
            Markup("{}").format(found["state"].replace("this page", "the report's page")),
            _where(shown, found),
        )
        for found in answers(shown, checklist, stated)
    )
    return Table("Items", ("Item", "What is asked", "State", "Where, or what is missing"), rows)


def _where(shown: Shown, found: Mapping[str, Any]) -> Markup:
    parts = []
    if found["report"]:
        parts.append(Markup("Report: {}.").format(", ".join(found["report"])))
    if found["stated"]:
        said = shown.text(f"/protocol/governance/{found['stated']}")
        parts.append(Markup("Study lead: {}.").format(said))
    if found["authors"]:
        parts.append(Markup("Authors: {}.").format(found["authors"]))
    return Markup(" ").join(parts)
