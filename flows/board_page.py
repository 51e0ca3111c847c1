"""A patient's page as HTML: no network, no script, no other file, and one sheet of A4."""

from __future__ import annotations

import base64
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flows.board_figures import (
    attention_figure,
    contributions_figure,
    shares_figure,
    survival_figure,
)
from flows.figure_style import span

if TYPE_CHECKING:
    from flows.board import BoardPatient

_FOLDER: Final = "templates/board"
_STUDY_WORDS: Final = {
    "train": "The model was trained on this patient among others, so that it fits better than it "
    "would a new patient.",
    "test": "The model was evaluated on this patient among others, not trained on.",
    "no": "This patient took no part in making the model.",
    "unknown": "Whether this patient took part in making the model is not known here.",
}


def render(patient: BoardPatient) -> str:
    """Write the page of a patient; whatever stands in a name is text, never markup."""
    environment = Environment(
        loader=PackageLoader("flows", _FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = resources.files("flows").joinpath(_FOLDER, "style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        style=Markup(style),
        patient=patient,
        study=patient.model.protocol.study,
        horizon=span(patient.model.protocol.study.horizon_days),
        made=patient.made.strftime("%Y-%m-%d %H:%M UTC"),
        registered=_day(patient.model.registered_ms),
        risk=_risk(patient),
        rank=_rank(patient),
        survival=_survival_rows(patient),
        modalities=_modalities(patient),
        lacking=[x for x, one in _named(patient) if not one],
        in_study=_STUDY_WORDS[str(patient.row["in_study"])],
        figures=_figures(patient),
    )


def _named(patient: BoardPatient) -> list[tuple[str, bool]]:
    return list(zip(patient.model.fusion.modalities, patient.has.tolist(), strict=True))


def _day(milliseconds: int) -> str:
    return str(np.datetime64(milliseconds, "ms").astype("datetime64[D]"))


def _percent(value: float) -> str:
    """Whole per cent, without ever saying that something is certain."""
    if value > 0.995:
        return ">99"
    return "<1" if value < 0.005 else f"{100.0 * value:.0f}"


def _risk(patient: BoardPatient) -> dict[str, Any]:
    key = f"risk_by_{patient.model.protocol.study.horizon_days:g}_days"
    low, value, high = (float(patient.row[f"{key}{x}"]) for x in ("_low", "", "_high"))
    return {
        "text": _percent(value),
        "low": _percent(low),
        "high": _percent(high),
        "of_ten": round(10 * value),
        "is_vague": high - low > 0.5,
    }


def _rank(patient: BoardPatient) -> dict[str, Any] | None:
    if patient.rank is None:
        return None
    whose = (
        "this hospital\u2019s patients that the model was trained on"
        if patient.beside_trained
        else "this hospital\u2019s patients that the model was evaluated on"
    )
    return {"percent": round(100 * patient.rank), "n": len(patient.beside), "whose": whose}


def _survival_rows(patient: BoardPatient) -> list[dict[str, str]]:
    rows = []
    for days in patient.model.protocol.study.grid_days:
        low, value, high = (
            _percent(float(patient.row[f"survival_{days:g}{x}"])) for x in ("_low", "", "_high")
        )
        rows.append({"time": span(days), "value": value, "low": low, "high": high})
    return rows


def _modalities(patient: BoardPatient) -> list[dict[str, Any]]:
    return [
        {"name": name, "has": has, "factor": f"{np.exp(part):.2f}"}
        for (name, has), part in zip(_named(patient), patient.parts.tolist(), strict=True)
    ]


def _figures(patient: BoardPatient) -> dict[str, str]:
    fusion = patient.model.fusion
    m = len(fusion.modalities)
    drawn = {
        "survival": _svg(
            survival_figure(
                patient.times_days,
                patient.survival,
                usual=patient.usual,
                horizon_days=patient.model.protocol.study.horizon_days,
            )
        ),
        "contributions": _svg(
            contributions_figure(
                fusion.modalities,
                patient.parts,
                patient.has,
                spread=np.abs(fusion.coefficients[:m]),
            )
        ),
    }
    if patient.tiles is not None and patient.tiles.share is not None:
        drawn["shares"] = shares_figure(patient.tiles)
    if patient.tiles is not None and patient.tiles.attention is not None:
        drawn["attention"] = attention_figure(patient.tiles)
    return drawn


def _svg(text: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()
