"""The report of a run: one page that stands alone, every number of it taken from the record."""

from __future__ import annotations

import base64
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flows import report_sentences as sentences
from flows import report_words as words
from flows.figure_style import sentence
from flows.record_values import KEYS, LEFT, ratio_name
from flows.report_checklist import CHECKLIST
from flows.shown import Shown, listed, missing, pointer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# In the order of TRIPOD+AI; each is a template of its own.
SECTIONS = {
    "summary": "Summary",
    "participants": "Who took part",
    "predictors": "Outcome and predictors",
    "methods": "How the model was made",
    "model": "The model itself",
    "performance": "Performance",
    "comparison": "Beside other ways to train",
    "contributions": "What each modality adds",
    "heterogeneity": "Differences between sites",
    "left-out": "Each site as external validation",
    "subgroups": "Subgroups",
    "decision": "Decision curve",
    "treatment": "Treatment within risk groups",
    "reference": "Beside pooled rows",
    "limitations": "Limitations",
    "reproducibility": "Reproducibility",
    "checklist": "TRIPOD+AI checklist",
}
_FOLDER = "templates/report"
_BASELINES = {
    "hazard_per_day": "Hazard per day",
    "alpha": "Log odds α of the interval",
}


def render(values: dict[str, Any], figures: Mapping[str, str]) -> str:
    """Write the report as one HTML page that needs no network, no script and no other file.

    Every number on it is a ``data`` element whose ``value`` is the record's and whose ``data-key``
    is the JSON pointer to it in the record, which the page holds as JSON.

    Parameters
    ----------
    values
        As from :func:`flows.record_values.record_values`, or read from ``record.json``.
    figures
        SVG text by name, as from :func:`flows.figures.figure_svgs`.

    Raises
    ------
    ValueError
        If the record lacks a part, or has one that a report may not show.
    """
    _check_parts(values)
    shown = Shown(values)
    environment = _environment(shown)
    # A macro sees no variable of the page that calls it.
    environment.globals["figures"] = {name: _data_uri(svg) for name, svg in figures.items()}
    return environment.get_template("page.html").render(
        values=values,
        study=values["protocol"]["study"],
        sections=list(SECTIONS.items()),
        titles=SECTIONS,
        checklist=list(CHECKLIST.items()),
        style=Markup(_template("style.css")),
        record=embedded(values),
        **_sentences(shown),
        **_lists(shown),
    )


def embedded(values: dict[str, Any]) -> Markup:
    """Write a record as JSON that can stand within a script element."""
    text = json.dumps(values, sort_keys=True, allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _check_parts(values: dict[str, Any]) -> None:
    lacking = [key for key in KEYS if key not in values]
    if lacking:
        raise ValueError(
            f"record: found no {lacking[0]}, needed one of this version; run the study again"
        )
    foreign = sorted(set(values) - set(KEYS))
    if foreign:
        raise ValueError(f"record: found {foreign[0]}, needed only what a report may show")


def _environment(shown: Shown) -> Environment:
    environment = Environment(
        loader=PackageLoader("flows", _FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(_showing(shown))
    environment.globals.update(
        code_words=words.code_words,
        minimum_words=words.minimum_words,
        reference_name=words.reference_name,
        why_no_arm=words.why_no_arm,
        why_no_figure=words.why_no_figure,
        why_no_test=words.why_no_test,
        why_no_training=words.why_no_training,
        none_released=words.NONE_RELEASED,
        arm_name=words.ARM_WORDS.__getitem__,
    )
    return environment


def _showing(shown: Shown) -> dict[str, Callable[..., Any]]:
    """Give what templates call to show a value of the record."""

    def of_record(function: Callable[..., Markup]) -> Callable[..., Markup]:
        return lambda *args, **options: function(shown, *args, **options)

    def worded(at: str) -> str:
        return words.word(at.rpartition("/")[2], shown.get(at))

    return {
        "key": pointer,
        "get": shown.get,
        "missing": missing,
        "n": shown.number,
        "t": shown.text,
        "named": shown.name,
        "items": shown.items,
        "est": shown.estimate,
        "change": shown.difference,
        "nth": shown.nth,
        "triple": shown.interval,
        "counted": shown.counted,
        "grid": shown.days,
        "word": worded,
        "part_of": of_record(_part_of),
        "verdict": of_record(sentences.verdict),
        "ridge_of": of_record(sentences.ridge_of),
        "cross_fitting_of": of_record(sentences.cross_fitting_of),
        "inputs_of": of_record(sentences.inputs_of),
    }


def _part_of(shown: Shown, at: str) -> Markup:
    """Say whether a site trained, or validated, or left and why."""
    if shown.get(f"{at}/role") != LEFT:
        return shown.text(f"{at}/role")
    return Markup("left: {}").format(words.code_words(shown.get(f"{at}/code")))


def _sentences(shown: Shown) -> dict[str, Any]:
    return {
        "findings": sentences.findings(shown),
        "conclusions": sentences.conclusions(shown),
        "alarms": sentences.alarms(shown),
        "limitations": sentences.limitations(shown),
        "calibration_in_words": sentences.calibration_in_words(shown),
        "decision_in_words": sentences.decision_in_words(shown),
    }


def _lists(shown: Shown) -> dict[str, Any]:
    """Give the names along the edges of tables."""
    arms = [arm for arm in words.COMPARED if arm in shown.values["results"]["arms"]]
    baseline = next(x for x in _BASELINES if x in shown.values["models"]["protocol"])
    n_edges = len(shown.get("/risk_groups/edges_days"))
    treatments = range(len(shown.get("/risk_groups/treatments")))
    at_treatments = [shown.text(pointer("risk_groups", "treatments", i)) for i in treatments]
    return {
        "compared": arms,
        "compared_names": [words.ARM_WORDS[arm] for arm in arms],
        "ratio_name": sentence(ratio_name(shown.values["fusion_kind"])),
        "baseline_field": baseline,
        "baseline_name": _BASELINES[baseline],
        "fusion_sharing": words.fusion_sharing(shown.values["fusion_kind"]),
        "modalities": shown.values["models"]["protocol"]["modalities"],
        "modality_list": listed(shown.values["models"]["protocol"]["modalities"]),
        "at_times": [
            shown.number(pointer("risk_groups", "edges_days", i), "span") for i in range(n_edges)
        ],
        "term_names": [
            f"{x['modality']}{', missing' if x['absent'] else ''}"
            for x in shown.values["models"]["protocol"]["terms"]
        ],
        "treatment_columns": [*at_treatments, "Log-rank p"],
    }


def _template(name: str) -> str:
    return resources.files("flows").joinpath(_FOLDER, name).read_text(encoding="utf-8")


def _data_uri(svg: str) -> str:
    """Give a figure as an address that holds it, so that its names cannot clash with others'."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
