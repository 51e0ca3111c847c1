from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pytest

from flows.figure_style import group_colour, group_names, p_text, readable_units, span
from flows.figures import (
    convergence_figure,
    figures,
    kaplan_meier_figure,
    net_benefit_figure,
    to_svg,
    treatment_figure,
)
from flows.forests import (
    ablation_figure,
    heterogeneity_figure,
    left_out_figure,
    modality_weights_figure,
    subgroup_figure,
)
from fusion.federation import PROTOCOL
from tests.simulated_record import GRID_DAYS, MODALITIES, bare_record, full_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flows.records import StudyRecord

ALL = {
    "convergence", "modality_weights", "kaplan_meier", "calibration", "ablation", "heterogeneity",
    "left_out", "subgroups", "net_benefit", "treatment",
}  # fmt: skip


@pytest.fixture(scope="module")
def record() -> StudyRecord:
    return full_record()


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def labels(axes: Axes) -> list[str]:
    return [x.get_text() for x in axes.get_yticklabels()]


def points(axes: Axes) -> list[float]:
    marked = [x for x in axes.get_lines() if x.get_marker() in ("o", "D")]
    return [float(x.get_xdata()[0]) for x in marked]


def words(axes: Axes) -> list[str]:
    return [x.get_text() for x in axes.texts]


def replaced(record: StudyRecord, **results: Any) -> StudyRecord:
    return dataclasses.replace(record, results=dataclasses.replace(record.results, **results))


def test_every_figure_is_drawn_and_labelled(record: StudyRecord) -> None:
    found = figures(record)
    assert set(found) == ALL
    for figure in found.values():
        assert figure.axes[0].get_xlabel()
        assert figure.axes[0].get_title(loc="left")


def test_figures_whose_sums_nobody_released_are_left_out() -> None:
    assert set(figures(bare_record())) == {"modality_weights"}


def test_svg_is_the_same_each_time_and_changes_nothing_else(record: StudyRecord) -> None:
    from matplotlib import _pylab_helpers, rcParams

    before = dict(rcParams)
    first, second = (to_svg(drawn(kaplan_meier_figure(x))) for x in (record, full_record()))
    assert first == second
    assert dict(rcParams) == before
    assert not _pylab_helpers.Gcf.figs
    assert ElementTree.fromstring(first).tag.endswith("svg")
    assert not re.search(r"<dc:date>|font-family|<text", first)


def test_survival_is_drawn_in_years_from_one(record: StudyRecord) -> None:
    figure = drawn(kaplan_meier_figure(record))
    curves = figure.axes[0].get_lines()
    survival = record.results.arms[PROTOCOL].survival
    assert survival is not None
    assert len(curves) == len(survival.value)
    for curve, value in zip(curves, survival.value, strict=True):
        assert curve.get_xdata()[-1] == pytest.approx(1825 / 365.25)
        np.testing.assert_allclose(curve.get_ydata(), [1.0, *value])
    assert "years" in figure.axes[0].get_xlabel()
    assert len({str(x.get_linestyle()) + str(x.get_marker()) for x in curves}) == len(curves)


def test_numbers_at_risk_begin_with_all_test_patients(record: StudyRecord) -> None:
    figure = drawn(kaplan_meier_figure(record))
    texts = [x for x in figure.axes[1].texts if x.get_position()[0] == 0.0]
    n_test = sum(s.n_test for s in record.fitted.sites)
    assert sum(int(x.get_text()) for x in texts) == n_test


def test_weights_are_hazard_ratios_and_skip_flags_that_nobody_raised(record: StudyRecord) -> None:
    (axes,) = drawn(modality_weights_figure(record)).axes
    assert labels(axes) == [
        "radiology (per SD)", "clinical (per SD)", "pathology (per SD)", "pathology missing",
        "radiology missing",
    ]  # fmt: skip
    model = record.fitted.models[PROTOCOL]
    assert points(axes)[0] == pytest.approx(np.exp(model.coefficients.max()))
    assert axes.get_xlabel().startswith("Hazard ratio")


def test_an_interval_is_drawn_where_its_figures_are(record: StudyRecord) -> None:
    (axes,) = drawn(modality_weights_figure(record)).axes
    spans = [x.get_xdata() for x in axes.get_lines() if len(x.get_xdata()) == 2]
    told = [tuple(map(float, re.findall(r"\d+\.\d+", text))) for text in words(axes)]
    drawn_at = [x for x in spans if x[0] != x[1]]
    for (_, low, high), ends in zip([x for x in told if len(x) == 3], drawn_at, strict=True):
        assert ends == pytest.approx((low, high), abs=0.006)


def test_a_modality_is_shown_alone_and_by_what_is_lost_without_it(record: StudyRecord) -> None:
    alone, lost = drawn(ablation_figure(record)).axes
    assert labels(alone) == [*MODALITIES, "All together"]
    assert "no figure" in words(alone)
    assert labels(lost) == list(MODALITIES)
    assert points(lost) == pytest.approx([0.004, 0.024, 0.044])
    assert any("−0.008" in x for x in words(lost))


def test_sites_are_compared_on_one_scale_per_modality(record: StudyRecord) -> None:
    figure = drawn(heterogeneity_figure(record))
    assert [x.get_title(loc="left") for x in figure.axes] == [x.capitalize() for x in MODALITIES]
    assert len({x.get_xlim() for x in figure.axes}) == 1
    assert labels(figure.axes[1]) == ["site-01", "site-02", "site-03", "Consortium"]
    assert words(figure.axes[1]).count("no figure") == 1
    assert points(figure.axes[0])[:3] == pytest.approx(np.exp([0.44, 0.35, 0.41]))
    low, high = figure.axes[0].get_xlim()
    assert low < np.exp(0.17 - 1.96 * 0.15)
    assert np.exp(0.71 + 1.96 * 0.15) < high


def test_a_modality_of_one_site_has_no_panel(record: StudyRecord) -> None:
    found = record.results.heterogeneity
    assert found is not None
    lone = found.estimates.copy()
    lone[1:, 0] = math.nan
    only = replaced(record, heterogeneity=dataclasses.replace(found, estimates=lone))
    assert len(drawn(heterogeneity_figure(only)).axes) == len(MODALITIES) - 1


def test_left_out_sites_stand_above_all_of_them(record: StudyRecord) -> None:
    (axes,) = drawn(left_out_figure(record)).axes
    assert labels(axes) == ["site-01 (n = 300)", "site-02 (n = 180)", "site-03", "All of them"]
    assert points(axes) == pytest.approx([0.712, 0.731, 0.719])
    assert left_out_figure(replaced(record, left_out=())) is None


def test_a_hidden_level_is_named_without_a_figure(record: StudyRecord) -> None:
    (axes,) = drawn(subgroup_figure(record)).axes
    assert labels(axes) == [
        "Age", "below 60.5 (n = 112)", "60.5 and above (n = 134)", "Sex", "female (n = 120)",
        "male", "All test patients",
    ]  # fmt: skip
    assert words(axes).count("no figure") == 1
    assert subgroup_figure(replaced(record, subgroups=())) is None


def test_the_decision_curve_ends_where_figures_end(record: StudyRecord) -> None:
    (axes,) = drawn(net_benefit_figure(record)).axes
    model, everybody, nobody = axes.get_lines()
    np.testing.assert_allclose(model.get_xdata(), [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(everybody.get_ydata(), [0.3, 0.21, 0.1, -0.01])
    assert set(nobody.get_ydata()) == {0.0}
    assert axes.get_ylim()[0] < 0.0
    assert [x.get_text() for x in axes.get_xticklabels()][2:] == ["30%\nn = 204", "40%\nn = 204"]
    assert net_benefit_figure(replaced(record, net_benefit=None)) is None


def test_treatments_are_drawn_in_the_risk_groups_that_have_them(record: StudyRecord) -> None:
    figure = drawn(treatment_figure(record))
    assert [x.get_title(loc="left") for x in figure.axes] == ["Middle risk", "High risk"]
    legend = figure.axes[0].get_legend()
    assert [x.get_text() for x in legend.get_texts()] == ["surgery", "both"]
    assert treatment_figure(replaced(record, treatment=())) is None


def test_convergence_has_a_panel_per_fitted_stage(record: StudyRecord) -> None:
    figure = drawn(convergence_figure(record))
    assert [x.get_title(loc="left") for x in figure.axes] == [
        "Fitting the encoders",
        "Fitting the fusion",
    ]


def test_a_mean_over_fewer_fits_is_not_drawn(record: StudyRecord) -> None:
    rounds = [
        dataclasses.replace(r, n_fits=1) if r.number == 13 else r for r in record.fitted.rounds
    ]
    fitted = dataclasses.replace(record.fitted, rounds=tuple(rounds))
    figure = drawn(convergence_figure(dataclasses.replace(record, fitted=fitted)))
    assert list(figure.axes[1].get_lines()[0].get_xdata()) == [9, 10, 11, 12]


def test_a_discrete_model_has_odds_ratios(record: StudyRecord) -> None:
    fusion = record.protocol.fusion.model_copy(update={"model": "logistic_hazard"})
    protocol = record.protocol.model_copy(update={"fusion": fusion})
    (axes,) = drawn(modality_weights_figure(dataclasses.replace(record, protocol=protocol))).axes
    assert axes.get_xlabel().startswith("Odds ratio")


def test_units_and_names_are_those_that_people_use() -> None:
    assert readable_units(np.array([0.0, 200.0, 400.0]))[1] == "days"
    assert readable_units(np.array([0.0, *GRID_DAYS]))[1] == "years"
    assert [span(x) for x in (365.0, 1095.0, 100.0)] == ["1 year", "3 years", "100 days"]
    assert [p_text(x) for x in (1e-9, 0.0312)] == ["< 0.001", "= 0.031"]
    assert group_names(2) == ("Low", "High")
    assert group_names(4)[3] == "Group 4 of 4"
    for n_groups in (2, 3, 5):
        assert len({str(group_colour(x, n_groups)) for x in range(n_groups)}) == n_groups
