from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest

from flows.record_values import KEYS, fusion_terms, plain, record_values
from flows.report_checklist import CHECKLIST
from flows.report_files import render_again, write_report
from flows.report_page import SECTIONS, render
from flows.report_sentences import (
    alarms,
    conclusions,
    decision_in_words,
    findings,
    limitations,
    verdict,
)
from flows.report_words import alarm_words, code_words
from flows.shown import Shown, formatted, pointer, resolve
from fusion.federation import LOCAL_ENCODERS, LOCAL_ONLY, PROTOCOL
from fusion.federation.alarms import Alarm
from fusion.late import GatedModel, LogisticHazardModel
from fusion.late.gated import initial_gated_weights
from fusion.privacy import Refusal
from modalities.cohort import DataError
from tests.simulated_record import bare_record, cox_model, full_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flows.records import StudyRecord

CREATED = datetime(2026, 11, 23, 20, 0, tzinfo=UTC)
SVG = '<svg xmlns="http://www.w3.org/2000/svg"><path d="M0.5 0.25"/></svg>'
FIGURES = {
    "convergence", "modality_weights", "kaplan_meier", "calibration", "ablation", "heterogeneity",
    "left_out", "subgroups", "net_benefit", "treatment",
}  # fmt: skip
VOID = {"meta", "img", "br", "link", "input", "hr"}
Values = dict[str, Any]


class Page(HTMLParser):
    """A page taken apart: what is nested how, what is shown, and which numbers say where from."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.headings: list[int] = []
        self.numbers: list[tuple[str, str, str]] = []
        self.cells: list[str] = []
        self.rows: list[int] = []
        self.prose = ""
        self.text = ""
        self.json = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        if tag in ("p", "table", "ul", "dl", "figure", "section", "div", "h2", "h3"):
            assert "p" not in self.open, f"{tag} within a paragraph: {self.getpos()}"
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "data":
            self.numbers.append((found["data-key"], found["value"], ""))
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += int(found.get("colspan", "1"))
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"nothing to close with {tag}: {self.getpos()}"
        assert self.open.pop() == tag, f"{tag} closes something else: {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "head" in self.open:
            return
        if "script" in self.open:
            self.json += data
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data
        if "data" in self.open:
            key, value, text = self.numbers[-1]
            self.numbers[-1] = (key, value, text + data)
        else:
            self.prose += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attrs for found, attrs in self.tags if found == tag]


def values_of(record: StudyRecord) -> Values:
    return json.loads(json.dumps(record_values(record, created=CREATED), allow_nan=False))


def with_model(kind: str) -> StudyRecord:
    """Give the full record with another kind of fusion model."""
    record, cox = full_record(), cox_model()
    shared = {
        x: getattr(cox, x)
        for x in ("modalities", "mean", "scale", "coefficients", "covariance", "edges_days")
    }
    model: Any = LogisticHazardModel(**shared, alpha=np.array([-1.8, -1.6, -1.7, -1.1]))
    if kind == "gated":
        weights = initial_gated_weights(cox.coefficients, hidden=2)
        model = GatedModel(
            **shared, hazard_per_day=cox.hazard_per_day, weights=weights, hidden=2
        )  # fmt: skip
    models = {**record.fitted.models, PROTOCOL: model}
    fusion = record.protocol.fusion.model_copy(update={"model": kind})
    return dataclasses.replace(
        record,
        fitted=dataclasses.replace(record.fitted, models=models),
        protocol=record.protocol.model_copy(update={"fusion": fusion}),
    )


@pytest.fixture(scope="module")
def full() -> Values:
    return values_of(full_record())


@pytest.fixture(scope="module")
def bare() -> Values:
    return values_of(bare_record())


@pytest.fixture(
    scope="module",
    params=[full_record, bare_record, lambda: with_model("logistic_hazard"),
            lambda: with_model("gated")],
    ids=["full", "bare", "logistic_hazard", "gated"],
)  # fmt: skip
def drawn(request: pytest.FixtureRequest) -> tuple[Values, Page]:
    make: Callable[[], StudyRecord] = request.param
    values = values_of(make())
    names = FIGURES if values["results"]["arms"] else ["modality_weights"]
    return values, Page(render(values, dict.fromkeys(names, SVG)))


def changed(values: Values, at: str, value: Any) -> Values:
    """Copy the values with another one at a JSON pointer."""
    copied = copy.deepcopy(values)
    above, _, last = at.rpartition("/")
    resolve(copied, above)[last] = value
    return copied


def test_every_number_is_the_record_s_where_it_says(drawn: tuple[Values, Page]) -> None:
    values, page = drawn
    record = json.loads(page.json)
    assert record == values
    assert len(page.numbers) > 100
    for key, value, text in page.numbers:
        found = resolve(record, key)
        assert found is not None, key
        assert not isinstance(found, dict | list | bool), key
        assert value == (found if isinstance(found, str) else json.dumps(found)), key
        assert text, key


def test_a_shown_number_is_the_rounded_one(drawn: tuple[Values, Page]) -> None:
    values, page = drawn
    plainly = [
        (resolve(values, key), text)
        for key, _, text in page.numbers
        if re.fullmatch(r"[−+]?\d+\.\d+", text) and "wall_s" not in key
    ]
    assert plainly
    for value, text in plainly:
        step = 10.0 ** -len(text.partition(".")[2])
        assert float(text.replace("−", "-")) == pytest.approx(float(value), abs=0.501 * step)


def test_no_decimal_stands_outside_what_the_record_gives(drawn: tuple[Values, Page]) -> None:
    assert re.findall(r".{20}\d[.,]\d.{10}", drawn[1].prose) == []


def test_nothing_is_blank_and_no_lack_looks_like_a_number(drawn: tuple[Values, Page]) -> None:
    _, page = drawn
    shown = page.text
    assert re.findall(r"\b(?:None|nan|NaN|inf|null|undefined|False|True)\b", shown) == []
    assert "()" not in shown
    assert all(cell.strip(" –\n") for cell in page.cells)


def test_a_page_stands_alone(drawn: tuple[Values, Page]) -> None:
    _, page = drawn
    assert page.of("link") == []
    assert [x.get("type") for x in page.of("script")] == ["application/json"]
    assert all(x["src"].startswith("data:image/svg+xml;base64,") for x in page.of("img"))
    assert [x for x in page.links if not x.startswith("#")] == []
    assert "default-src 'none'" in page.of("meta")[2]["content"]
    handlers = [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert handlers == []


def test_the_style_fetches_nothing(full: Values) -> None:
    text = render(full, {})
    style = text[text.index("<style>") : text.index("</style>")]
    assert re.findall(r"url\(|@import|http", style) == []
    assert style.count("{") == style.count("}")
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style


def test_a_page_can_be_read_without_seeing_it(drawn: tuple[Values, Page]) -> None:
    _, page = drawn
    assert page.of("html") == [{"lang": "en"}]
    assert page.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False))
    assert len(page.ids) == len(set(page.ids))
    assert {x.removeprefix("#") for x in page.links} <= set(page.ids)
    assert all(x["alt"] for x in page.of("img"))
    assert all(x.get("scope") in ("col", "row", "rowgroup") for x in page.of("th"))
    following = [
        b for (a, _), (b, _) in zip(page.tags, page.tags[1:], strict=False) if a == "table"
    ]
    assert set(following) == {"caption"}
    regions = [x for x in page.of("div") if x.get("role") == "region"]
    assert len(regions) == len(page.of("table"))
    assert all(x["tabindex"] == "0" and x["aria-label"] for x in regions)


def test_rows_are_as_long_as_their_table_s_head(drawn: tuple[Values, Page]) -> None:
    _, page = drawn
    widths: list[set[int]] = []
    rows = iter(page.rows)
    for tag, _ in page.tags:
        if tag == "table":
            widths.append(set())
        elif tag == "tr":
            widths[-1].add(next(rows))
    assert [len(x) for x in widths] == [1] * len(widths)


def test_every_section_says_something(drawn: tuple[Values, Page]) -> None:
    _, page = drawn
    assert [x["id"] for x in page.of("section")] == list(SECTIONS)
    assert [x["aria-labelledby"] for x in page.of("section")] == [f"{x}-title" for x in SECTIONS]


def test_a_lack_is_a_dash_with_its_reason(bare: Values) -> None:
    page = Page(render(bare, {}))
    cells = [x.strip() for x in page.cells]
    assert "– (hidden: too few test events)" in cells
    assert "– (no site could release it)" in cells
    for reason in ("names no subgroups", "names no treatment", "names no thresholds"):
        assert reason in page.prose
    assert "evaluated on 0" not in page.prose


def test_every_figure_is_shown_with_words_for_those_who_do_not_see_it(full: Values) -> None:
    page = Page(render(full, dict.fromkeys(FIGURES, SVG)))
    assert {x["id"].removeprefix("figure-") for x in page.of("figure")} == FIGURES
    assert len(page.of("figcaption")) == len(FIGURES)
    assert "No figure" not in page.prose
    assert Page(render(full, {})).prose.count("No figure: ") == len(FIGURES)


def test_text_of_a_record_cannot_leave_its_place(full: Values) -> None:
    nasty = '</script><b>death</b> & "relapse" <!--'
    page = Page(render(changed(full, "/protocol/study/endpoint", nasty), {}))
    assert page.of("b") == []
    assert resolve(json.loads(page.json), "/protocol/study/endpoint") == nasty
    assert any(text == nasty for _, _, text in page.numbers)


def test_a_record_holds_what_a_report_may_show_and_nothing_else(full: Values) -> None:
    assert set(full) == set(KEYS)
    with pytest.raises(ValueError, match="record: found patients, needed only"):
        render(full | {"patients": [0.1]}, {})
    with pytest.raises(ValueError, match="record: found no totals, needed one of this version"):
        render({k: v for k, v in full.items() if k != "totals"}, {})


def test_no_list_in_a_record_is_as_long_as_a_site_has_patients(full: Values) -> None:
    def longest(value: Any) -> int:
        if isinstance(value, dict):
            return max(map(longest, value.values()), default=0)
        if isinstance(value, list):
            return max(len(value), *map(longest, value)) if value else 0
        return 0

    fewest = min(s["n_test"] for s in full["sites"] if s["n_test"])
    assert longest(full) < fewest


def test_totals_count_those_who_stayed(full: Values) -> None:
    totals = full["totals"]
    assert totals["n_taking_part"] == totals["n_training_sites"] + totals["n_external_sites"] == 4
    assert (totals["n_left_sites"], totals["n_hidden_sites"]) == (1, 0)
    assert totals["n_test"] == sum(s["n_test"] for s in full["sites"])
    assert (totals["n_external"], totals["n_external_events"]) == (60, 33)


def test_ratios_are_exponentials_with_intervals_of_the_logarithm() -> None:
    model = cox_model()
    for term, beta, variance in zip(
        fusion_terms(model), model.coefficients, np.diag(model.covariance), strict=True
    ):
        ratio, half = term["ratio"], 1.959964 * math.sqrt(variance)
        assert math.log(ratio["value"]) == pytest.approx(beta)
        assert math.log(ratio["high"] / ratio["low"]) == pytest.approx(2 * half, rel=1e-5)
        assert term["varies"] == bool(beta)


@pytest.mark.parametrize("kind", ["cox", "logistic_hazard"])
def test_a_reader_can_compute_a_risk_from_the_page(kind: str) -> None:
    record = full_record() if kind == "cox" else with_model(kind)
    model = record.fitted.models[PROTOCOL]
    shown = values_of(record)["models"][PROTOCOL]
    patient = np.array([0.4, math.nan, -1.1])
    log_hazard, m = 0.0, len(patient)
    for i, value in enumerate(patient):
        if math.isnan(value):
            log_hazard += shown["terms"][m + i]["coefficient"]
        else:
            z = (value - shown["mean"][i]) / shown["scale"][i]
            log_hazard += shown["terms"][i]["coefficient"] * z
    if kind == "cox":
        survival = np.array(shown["survival_at_average"]) ** math.exp(log_hazard)
    else:
        hazard = 1.0 / (1.0 + np.exp(-(np.array(shown["alpha"]) + log_hazard)))
        survival = np.cumprod(1.0 - hazard)
    expected = model.predict_survival_function(patient[None], shown["edges_days"])[0]
    np.testing.assert_allclose(survival, expected, rtol=1e-9)


def test_what_is_not_finite_becomes_null_and_what_json_lacks_is_refused() -> None:
    found = plain({"a": np.array([1.5, math.nan]), 2: (np.float64(math.inf), True, None)})
    assert found == {"a": [1.5, None], "2": [None, True, None]}
    with pytest.raises(TypeError, match="record: found object"):
        plain(object())


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.05, "the federated model ranks better"),
        (-0.05, -0.01, "it ranks worse"),
        (-0.01, 0.05, "not told apart"),
        (0.0, 0.05, "not told apart"),
        (None, 0.05, "– "),
    ],
)
def test_a_verdict_is_where_the_interval_lies(
    full: Values, low: float | None, high: float, words: str
) -> None:
    at = pointer("results", "arms", LOCAL_ONLY, "difference")
    estimate = {"value": 0.02, "standard_error": 0.01, "low": low, "high": high}
    shown = Shown(changed(full, at, estimate))
    assert words in verdict(shown, at)


def test_the_conclusion_claims_no_gain_that_the_interval_does_not(full: Values) -> None:
    gain = " ".join(conclusions(Shown(full)))
    assert "better than chance, and better than what sites reach alone" in gain
    at = pointer("results", "arms", LOCAL_ONLY, "difference", "low")
    unclear = Shown(changed(full, at, -0.001))
    assert "a gain over what sites reach alone is not shown" in " ".join(conclusions(unclear))
    assert "not told apart" in " ".join(findings(unclear))
    assert "improves care is not shown" in gain


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ((1.1, 1.5), "predicted risks are too low"),
        ((0.6, 0.9), "predicted risks are too high"),
        ((0.9, 1.1), "includes one"),
    ],
)
def test_calibration_is_read_from_its_interval(
    full: Values, ends: tuple[float, float], words: str
) -> None:
    values = full
    for end, value in zip(("low", "high"), ends, strict=True):
        at = pointer("results", "arms", PROTOCOL, "observed_expected", end)
        values = changed(values, at, value)
    assert words in " ".join(conclusions(Shown(values)))


def test_alarms_stand_in_the_summary_and_beside_the_figures_of_the_sites(
    full: Values, bare: Values
) -> None:
    found = [str(x) for x in alarms(Shown(full))]
    assert len(found) == len(full["results"]["alarms"]) == 2
    assert "site-02" in found[0]
    assert "orders patients worse than" in found[0]
    assert ">−2.6<" in found[0]
    page = Page(render(full, {}))
    assert [key for key, *_ in page.numbers].count("/results/alarms/1/z") == 2
    assert page.prose.count("Alarm, for a person to look at:") == 2
    assert "No site raised one" not in page.prose
    assert "No site raised one" in Page(render(bare, {})).prose
    assert all(alarm_words(x) != x.replace("_", " ") for x in get_args(Alarm))


def test_thresholds_are_named_where_the_model_beats_both_rules(full: Values) -> None:
    words = re.sub("<[^>]*>", "", decision_in_words(Shown(full)))
    assert words.endswith("at 20 %, 30 % and 40 %.")
    none = changed(full, "/results/net_benefit/gain/low", [-0.1] * 5)
    assert "At no threshold" in decision_in_words(Shown(none))


def test_limitations_follow_from_the_run(full: Values, bare: Values) -> None:
    found = " ".join(limitations(Shown(full)))
    for words in (
        "The data are simulated", "Minimum counts are lowered", "left the study: too few training",
        "radiology: fitted without out-of-fold", "without pathology, whose encoders",
        "no pathology model", "Whether leaving out clinical makes the model worse is not shown",
        "not assigned at random", "Sums are plain",
    ):  # fmt: skip
        assert words in found
    assert "Sites differ" not in found
    assert "events among the test patients" not in found
    other = " ".join(limitations(Shown(bare)))
    assert "simulated" not in other
    assert "No site is external" in other
    few = limitations(Shown(changed(full, "/totals/n_test_events", 99)))
    assert any("events among the test patients" in x for x in few)
    apart = changed(full, "/results/heterogeneity/test/p_value", 0.012)
    assert any("Sites differ in the coefficients" in x for x in limitations(Shown(apart)))


def test_the_checklist_has_the_items_of_the_statement() -> None:
    items = [item for rows in CHECKLIST.values() for item in rows]
    parts = {
        "3": "abc", "5": "ab", "6": "abc", "8": "abc", "9": "abc", "12": "abcdefg", "18": "abcdef",
        "20": "abc", "23": "ab", "27": "abc",
    }  # fmt: skip
    expected = [f"{n}{x}" for n in range(1, 28) for x in parts.get(str(n), "") or [""]]
    assert [item.number for item in items] == expected
    assert len(items) == 52
    assert all(item.places or item.authors for item in items)
    assert {x for item in items for x in item.places} <= set(SECTIONS)
    assert {item.state[2:] for item in items} == {
        "On this page", "In part", "To be completed by the authors",
    }  # fmt: skip


def test_every_refusal_has_plain_words() -> None:
    for code in (*get_args(Refusal), "unreachable", "unexpected_reply"):
        assert code_words(code) != code.replace("_", " ")


@pytest.mark.parametrize(
    ("value", "how", "text"),
    [
        (1234, "count", "1,234"), (0.3, "percent", "30 %"), (0.0312, "percent1", "3.1 %"),
        (1e-9, "p", "< 0.001"), (0.0312, "p", "0.031"), (1095.0, "span", "3 years"),
        (999, "bytes", "999 bytes"), (48_213, "bytes", "48 kB"), (2_400_000, "bytes", "2.4 MB"),
        (3e9, "bytes", "3.0 GB"), (0.04, "seconds", "0.0 s"), (600, "seconds", "10 min"),
        (7200, "seconds", "2.0 h"), (-0.0123, ".3f", "−0.012"), (-1e-9, ".3f", "0.000"),
        (0.02, "+.3f", "+0.020"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(value: float, how: str, text: str) -> None:
    assert formatted(value, how) == text


def test_a_pointer_finds_keys_with_slashes_and_points() -> None:
    values = {"a": {"x/0": [{"without.b~": 7}]}}
    at = pointer("a", "x/0", 0, "without.b~")
    assert at == "/a/x~10/0/without.b~0"
    assert resolve(values, at) == 7
    assert resolve(values, "") == values
    assert resolve(values, "/a/x~10/3") is None
    assert resolve(values, at + "/deeper") is None


def test_a_number_that_is_not_there_needs_a_reason() -> None:
    shown = Shown({"a": None, "b": {"value": 0.5, "low": None, "high": 0.7}})
    with pytest.raises(KeyError, match="/a: found nothing"):
        shown.number("/a")
    assert "– " in shown.number("/a", why="hidden")
    assert shown.estimate("/b").endswith('<span class="why">(no interval)</span>')
    assert "hidden" in shown.estimate("/c", why="hidden")


def test_arms_without_a_figure_are_left_out_of_the_comparison(full: Values) -> None:
    arms = full["results"]["arms"]
    fewer = changed(
        full, "/results/arms", {k: v for k, v in arms.items() if k != LOCAL_ENCODERS}
    )  # fmt: skip
    page = Page(render(fewer, {}))
    assert "Federated with local encoders" not in [x.strip() for x in page.cells][:200]
    assert "/results/arms/local_encoders" not in " ".join(key for key, *_ in page.numbers)


def test_a_report_is_written_and_written_again_from_its_files(tmp_path: Path) -> None:
    written = write_report(bare_record(), tmp_path / "run", created=CREATED)
    assert {x.name for x in (tmp_path / "run").iterdir()} == {
        "record.json", "report.html", "figures",
    }  # fmt: skip
    assert {x.name for x in (tmp_path / "run" / "figures").iterdir()} == {"modality_weights.svg"}
    assert render_again(tmp_path / "run") == written.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "found none in the run's folder"), ("{", "no valid JSON"), ("[]", "found no record"),
     ("{}", "found no schema_version")],
)  # fmt: skip
def test_a_folder_without_a_usable_record_is_refused(
    tmp_path: Path, text: str | None, words: str
) -> None:
    if text is not None:
        (tmp_path / "record.json").write_text(text)
    with pytest.raises(DataError, match=words):
        render_again(tmp_path)
