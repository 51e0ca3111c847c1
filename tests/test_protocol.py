from __future__ import annotations

import copy
import json
import tomllib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.demo import demo_protocol, template
from flows.protocol import (
    KINDS,
    ProtocolError,
    StudyProtocol,
    kind_of,
    load_protocol,
    read_protocol,
    read_protocol_text,
)
from fusion.federation import LOCAL_ENCODERS, PROTOCOL
from modalities.pathology import UnknownEncoder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VALUES: dict[str, Any] = {
    "study": {
        "name": "lung-os", "data": "simulated", "horizon_days": 730, "grid_days": [365, 730],
    },
    "modality": {
        "clinical": {
            "kind": "clinical", "numeric": ["age"], "ordinal": {"stage": ["I", "II", "III"]},
            "categorical": {"sex": ["female", "male"], "arm": ["a", "b"]},
        },
        "pathology": {"kind": "pathology"},
        "omics": {"kind": "omics", "gene_sets": {"b": ["B1", "B2"], "a": ["A1"]}},
        "blood": {"kind": "tabular", "columns": ["hb", "wbc"]},
        "radiology": {"kind": "radiology"},
    },
    "encoder": {"radiology": {"inputs": ["original_shape_MeshVolume"]}},
}  # fmt: skip


def values() -> dict[str, Any]:
    return copy.deepcopy(VALUES)


def merged(changes: dict[str, Any]) -> dict[str, Any]:
    """The values with some of them replaced, named by dotted keys."""
    found = values()
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        at = found
        for section in sections:
            at = at.setdefault(section, {})
        at[key] = value
    return found


def fault(changes: dict[str, Any]) -> str:
    with pytest.raises(ProtocolError) as error:
        read_protocol(merged(changes))
    assert error.value.__cause__ is None
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("fusions", "fusion"),
        ("study.horizon_years", "horizon_days"),
        ("study.grid_months", "grid_days"),
        ("fusion.riged", "ridge"),
        ("federation.sum", "sums"),
        ("privacy.patient", "patients"),
        ("gates.min_site", "min_sites"),
        ("encoder.omics.max_input", "max_inputs"),
        ("encoder.omics.learning_rat", "learning_rate"),
        ("modality.pathology.tile_mp", "tile_mpp"),
        ("modality.radiology.spacing_m", "spacing_mm"),
        ("modality.omics.gene_set", "gene_sets"),
        ("modality.clinical.numerics", "numeric"),
        ("modality.blood.column", "columns"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(key: str, hint: str) -> None:
    assert fault({key: 1}) == f"study.toml: {key}: unknown key; did you mean {hint}?"


def test_an_unknown_key_near_nothing_has_no_hint() -> None:
    assert fault({"privacy.zzz": 1}) == "study.toml: privacy.zzz: unknown key"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study.name": "Lung OS"}, "study.name: needed lower-case letters, digits and hyphens"),
        ({"study.grid_days": [730, 365]}, "study.grid_days: found [730.0, 365.0], needed incr"),
        ({"study.grid_days": [365, 365, 730]}, "study.grid_days: found [365.0, 365.0, 730.0]"),
        ({"study.grid_days": [730]}, "study.grid_days: tuple should have at least 2 items"),
        ({"study.horizon_days": 731}, "study.horizon_days: found 731, needed one of grid_days"),
        ({"study.horizon_days": -1}, "study.horizon_days: input should be greater than 0"),
        ({"study.horizon_days": "two years"}, "study.horizon_days: input should be a valid numb"),
        ({"study.test_fraction": 0.9}, "study.test_fraction: input should be less than 0.6"),
        ({"study.data": "synthetic"}, "study.data: input should be 'patients', 'public' or"),
        ({"study": 3}, "study: input should be a valid dictionary"),
        ({"schema_version": 2}, "schema_version: input should be 1, found 2"),
        ({"fusion.ridge": -1}, "fusion.ridge.0: input should be greater than or equal to 0"),
        ({"fusion.ridge": [0.1, 0.01]}, "fusion.ridge: found [0.1, 0.01], needed increasing pen"),
        ({"fusion.ridge": [0.1, 0.1]}, "fusion.ridge: found [0.1, 0.1], needed increasing pena"),
        ({"fusion.ridge": []}, "fusion.ridge: tuple should have at least 1 item"),
        ({"fusion.ridge": True}, "fusion.ridge: input should be a valid tuple, found True"),
        ({"fusion.model": "forest"}, "fusion.model: input should be 'cox', 'logistic_hazard' or"),
        ({"fusion.hidden": 0}, "fusion.hidden: input should be greater than or equal to 1"),
        ({"fusion.averaging": "mean"}, "fusion.averaging: input should be 'fedavg', 'fedprox' o"),
        ({"fusion.learning_rate": 0}, "fusion.learning_rate: input should be greater than 0"),
        ({"encoder.omics.ridge": [1, 0.1]}, "encoder.omics.ridge: found [1.0, 0.1], needed inc"),
        ({"evaluation.thresholds": [0.4, 0.2]}, "evaluation.thresholds: found [0.4, 0.2], need"),
        ({"evaluation.thresholds": [1.0]}, "evaluation.thresholds.0: input should be less than"),
        ({"evaluation.subgroups": {"age": []}}, "evaluation.subgroups.age: found bounds [], ne"),
        (
            {"evaluation.subgroups": {"age": [70, 60]}},
            "evaluation.subgroups.age: found bounds [70.0, 60.0], needed at least one, increas",
        ),
        (
            {"evaluation.subgroups": {"sex": [1]}},
            "evaluation.subgroups.sex: found bounds [1.0], needed none, as its levels are lis",
        ),
        (
            {"evaluation.subgroups": {"smoker": []}},
            "evaluation.subgroups.smoker: found no such column among the clinical covariates",
        ),
        (
            {"evaluation.treatment": "stage"},
            "evaluation.treatment: found stage, needed a categorical column of "
            "[modality.clinical]: arm, sex",
        ),
        (
            {"evaluation.treatment": "arm", "evaluation.subgroups": {"arm": []}},
            "evaluation.treatment: found arm among the subgroups too, needed it once",
        ),
        (
            {"study.data": "patients", "encoder.omics.sharing": "weights"},
            "encoder.omics.sharing: found a network trained by averaging weights, which can t",
        ),
        (
            {"study.data": "patients", "fusion.model": "gated"},
            "fusion.model: found a network trained by averaging weights, which can tell who w",
        ),
        (
            {"encoder.omics.sharing": "weights", "encoder.omics.harmonise": "none"},
            "encoder.omics.harmonise: found none, needed site, because a network's inputs mus",
        ),
        (
            {"encoder.blood.sharing": "weights", "modality.blood.columns": []},
            "encoder.blood.inputs: sharing weights needs the same inputs at every site; name",
        ),
        (
            {"encoder.blood.components": 1, "encoder.blood.sharing": "local"},
            "encoder.blood.components: found 1 with sharing local, needed sums",
        ),
        (
            {"federation.sums": "homomorphic"},
            "federation.sums: input should be 'plain' or 'secure_sum', found",
        ),
        ({"privacy.cell": 0}, "privacy.cell: input should be greater than or equal to 1"),
        ({"modality": {}}, "modality: found none, needed at least one [modality.NAME] section"),
        ({"modality": "slides"}, "modality: found none, needed at least one [modality.NAME]"),
        ({"modality.pathology": "slides"}, "modality.pathology.kind: found 'slides', needed one"),
        ({"modality.mri": {"kind": "mri"}}, "modality.mri.kind: found 'mri', needed one of path"),
        ({"modality.mri": {"kind": ["mri"]}}, "modality.mri.kind: found ['mri'], needed one of"),
        ({"modality.mri": {}}, "modality.mri.kind: found None, needed one of pathology"),
        ({"modality.MRI": {"kind": "tabular"}}, "modality.MRI: needed a name of lower-case"),
        ({f"modality.{PROTOCOL}": {"kind": "tabular"}}, f"modality.{PROTOCOL}: needed a name"),
        ({f"modality.{LOCAL_ENCODERS}": {"kind": "tabular"}}, f"modality.{LOCAL_ENCODERS}: need"),
        ({"modality.pathology.tile_px": 3}, "modality.pathology.tile_px: Input should be greater"),
        ({"modality.clinical.ordinal": {"stage": ["I"]}}, "modality.clinical: stage: needed at"),
        ({"modality.omics.gene_sets": {}}, "modality.omics: gene_sets: found none, needed at"),
        ({"modality.registry": VALUES["modality"]["clinical"]}, "modality: found 2 of kind clin"),
        ({"modality.clinical": {"kind": "tabular"}}, "modality: found 0 of kind clinical, needed"),
        ({"encoder": 3}, "encoder: input should be a valid dictionary, found 3"),
        ({"encoder.omics": 3}, "encoder.omics: input should be a valid dictionary"),
        ({"encoder.mri": {}}, "encoder.mri: found no [modality.mri]"),
        ({"encoder.omics.model": "mean_pooling"}, "encoder.omics.model: found mean_pooling, nee"),
        ({"encoder.pathology.model": "mlp"}, "encoder.pathology.model: found mlp, needed one"),
        ({"encoder.omics.sharing": "all"}, "encoder.omics.sharing: input should be 'local', 's"),
        ({"encoder.omics.inputs": ["a", "a"]}, "encoder.omics.inputs: found repeated names"),
        ({"encoder.omics.inputs": ["aa"]}, "encoder.omics.inputs: found unknown aa; did you mean"),
        (
            {"encoder.omics": {"inputs": ["q"], "sharing": "local"}},
            "encoder.omics.inputs: found unknown q",
        ),
        ({"modality.blood.columns": []}, "encoder.blood.inputs: sharing sums needs the same"),
        (
            {"encoder.blood.max_inputs": 1, "encoder.blood.harmonise": "none"},
            "encoder.blood.harmonise: found none, needed site, because 2 inputs are",
        ),
        (
            {"study.data": "patients", "privacy.events": 5, "privacy.cell": 2},
            "privacy.events: found events 5 (default 20); lower minimums are for study.data",
        ),
    ],
)
def test_a_refusal_names_its_key_in_one_sentence(changes: dict[str, Any], message: str) -> None:
    found = fault(changes)
    assert found.startswith(f"study.toml: {message}")
    assert "\n" not in found


def test_an_unknown_tile_encoder_is_named_with_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise UnknownEncoder(f"encoder: found {name!r}, needed a timm model name")

    monkeypatch.setattr("flows.protocol.check_encoder_name", refuse)
    found = fault({"modality.pathology.encoder": "resnet18x"})
    assert found.startswith("study.toml: modality.pathology.encoder: encoder: found 'resnet18x'")


def test_a_missing_section_and_a_missing_key_are_named() -> None:
    without = values()
    del without["study"]
    with pytest.raises(ProtocolError, match=r"^study\.toml: study: found nothing, needed a value$"):
        read_protocol(without)
    without = values()
    del without["study"]["horizon_days"]
    with pytest.raises(ProtocolError, match=r"study\.horizon_days: found nothing"):
        read_protocol(without)


def test_every_key_at_fault_is_named() -> None:
    lines = fault({"study.seed": -1, "gates.min_sites": 1, "fusion.zzz": 0}).splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "study.seed",
        "fusion.zzz",
        "gates.min_sites",
    ]


def test_files_that_are_none_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    with pytest.raises(ProtocolError, match=r"study\.toml: found no such file; write one with"):
        load_protocol(path)
    with pytest.raises(ProtocolError, match="needed a readable text file"):
        load_protocol(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ProtocolError, match="in UTF-8"):
        load_protocol(path)
    path.write_text("[study\n")
    with pytest.raises(ProtocolError, match=r"found no valid TOML: .*line 1"):
        load_protocol(path)


TEMPLATES: dict[str, Callable[[], str]] = {
    "study.toml": lambda: template("study.toml").format(name="lung-os", sums="plain", epsilon=0),
    "demo.toml": lambda: demo_protocol(tables_only=False),
    "demo_tables.toml": lambda: demo_protocol(tables_only=True),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_templates_are_valid(name: str) -> None:
    protocol = read_protocol_text(TEMPLATES[name](), source=name)
    assert set(protocol.modalities) == {"pathology", "radiology", "omics", "clinical"}
    assert bool(protocol.privacy.lowered()) == (name != "study.toml")


def test_the_written_protocol_reads_back() -> None:
    protocol = read_protocol_text(TEMPLATES["study.toml"](), source="study.toml")
    again = read_protocol(json.loads(json.dumps(protocol.values())))
    assert again == protocol
    assert again.fingerprint() == protocol.fingerprint()


def _shuffled(value: Any, order: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: _shuffled(value[k], order) for k in order.draw(st.permutations(list(value)))}


@given(st.data())
def test_the_fingerprint_does_not_see_the_order_of_keys(data: Any) -> None:
    shuffled = read_protocol(_shuffled(values(), data))
    assert shuffled.fingerprint() == read_protocol(values()).fingerprint()
    assert shuffled.encoder_inputs("clinical") == ("age", "stage", "arm=b", "sex=male")
    assert shuffled.sums_inputs() == read_protocol(values()).sums_inputs()


DEFAULTS = [
    (section, key)
    for section, content in read_protocol(VALUES).values().items()
    if isinstance(content, dict)
    for key in content
] + [
    (f"{part}.{name}", key)
    for part in ("encoder", "modality")
    for name, content in read_protocol(VALUES).values()[part].items()
    for key in content
]


@given(st.sets(st.sampled_from(DEFAULTS)))
def test_the_fingerprint_does_not_see_whether_defaults_are_written(
    written: set[tuple[str, str]],
) -> None:
    protocol = read_protocol(values())
    whole: Any = protocol.values()
    changes = {}
    for section, key in sorted(written):
        at = whole
        for part in section.split("."):
            at = at[part]
        changes[f"{section}.{key}"] = at[key]
    assert read_protocol(merged(changes)).fingerprint() == protocol.fingerprint()


def test_part_of_an_encoders_section_leaves_the_rest_at_its_kinds_defaults() -> None:
    found = read_protocol(merged({"encoder.omics.ridge": 0.2, "encoder.pathology.max_tiles": 9}))
    omics, slides, clinical = (found.encoder[x] for x in ("omics", "pathology", "clinical"))
    assert (omics.model, omics.sharing, omics.harmonise) == ("linear", "sums", "site")
    assert (slides.model, slides.sharing) == ("gated_attention", "local")
    assert (clinical.sharing, clinical.harmonise) == ("sums", "none")


def _leaves(value: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, (*at, key))]
    return [at]


OTHER: dict[str, Any] = {
    "study.name": "other", "study.endpoint": "relapse", "study.data": "public",
    "study.horizon_days": 365, "study.grid_days": [365, 730, 1000], "study.test_fraction": 0.31,
    "study.seed": 1, "fusion.ridge": 0.02, "fusion.folds": 4, "privacy.patients": 51,
    "privacy.events": 21, "privacy.patients_per_input": 6, "privacy.cell": 11,
    "privacy.test_events": 11, "privacy.pooled_patients": 101, "gates.min_sites": 3,
    "gates.min_test_events": 11, "gates.min_concordance": 0.6,
    "gates.max_champion_loss": 0.03, "gates.min_calibration_slope": 0.6,
    "gates.max_calibration_slope": 1.6, "gates.min_observed_expected": 0.6,
    "gates.max_observed_expected": 1.6, "gates.min_left_out_concordance": 0.55,
    "governance.intended_use": "triage", "governance.population": "adults",
    "governance.ethics": "approved", "governance.funding": "none",
    "governance.contact_role": "study office",
    "modality.clinical.numeric": ["height"], "modality.clinical.event": "dead",
    "modality.clinical.ordinal": {"stage": ["III", "II", "I"]},
    "modality.clinical.landmark_days": 30, "modality.pathology.tile_px": 256,
    "modality.pathology.pretrained": False, "modality.omics.target_sum": 1e6,
    "modality.omics.gene_sets": {"b": ["B2", "B1"], "a": ["A1"]},
    "modality.blood.columns": ["wbc", "hb"], "modality.radiology.bin_width": 10,
    "encoder.omics.sharing": "local", "encoder.omics.ridge": 1, "encoder.omics.inputs": ["a"],
    "encoder.blood.projection_seed": 3, "encoder.clinical.harmonise": "site",
    "encoder.pathology.model": "mean_pooling", "encoder.pathology.max_tiles": 7,
    "encoder.blood.sharing": "weights", "encoder.omics.l1_ratio": 0.5,
    "encoder.radiology.components": 1, "encoder.blood.averaging": "fedadam",
    "fusion.model": "gated", "fusion.hidden": 3, "fusion.averaging": "fedprox",
    "fusion.rounds": 7, "fusion.local_steps": 2, "fusion.learning_rate": 0.01,
    "fusion.proximal": 0.2, "evaluation.subgroups": {"sex": []},
    "evaluation.treatment": "arm", "evaluation.thresholds": [0.25],
    "evaluation.leave_one_site_out": True, "privacy.snapshot": 12,
}  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(OTHER)), st.booleans(), min_size=1))
def test_the_fingerprint_sees_every_value(chosen: dict[str, bool]) -> None:
    changes = {key: OTHER[key] for key, yes in chosen.items() if yes}
    changed = read_protocol(merged(changes)).fingerprint()
    assert (changed == read_protocol(values()).fingerprint()) == (not changes)


def test_every_section_is_in_the_fingerprint() -> None:
    sections = {key.split(".")[0] for key in OTHER}
    apart = {"federation", "differential_privacy", "schema_version"}  # not beside all the others
    assert {*sections, *apart} == set(StudyProtocol.model_fields)
    assert all(leaf[0] in StudyProtocol.model_fields for leaf in _leaves(VALUES))


def test_a_protocol_is_frozen() -> None:
    protocol = read_protocol(values())
    for section, key in (
        (protocol, "fusion"),
        (protocol.study, "name"),
        (protocol.privacy, "cell"),
    ):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, key, 1)


def test_kinds_are_named_as_written() -> None:
    protocol = read_protocol(values())
    assert {name: kind_of(spec) for name, spec in protocol.modality.items()} == {
        **{name: name for name in KINDS if name != "tabular"}, "blood": "tabular",
    }  # fmt: skip
    assert protocol.clinical == "clinical"
    assert protocol.modalities == ("blood", "clinical", "omics", "pathology", "radiology")


def test_the_plan_is_what_the_protocol_says() -> None:
    changes = {
        "encoder.pathology.sharing": "sums", "encoder.pathology.max_inputs": 2,
        "encoder.omics.max_inputs": 1, "encoder.omics.ridge": 0.7, "encoder.blood.sharing": "local",
        "encoder.clinical.components": 3, "encoder.radiology.components": 4,
        "encoder.clinical.l1_ratio": 0.2, "fusion.ridge": [0.1, 0.3], "fusion.folds": 3,
        "evaluation.subgroups": {"sex": [], "age": [50, 70]}, "evaluation.treatment": "arm",
        "evaluation.thresholds": [0.25, 0.5], "evaluation.leave_one_site_out": True,
    }  # fmt: skip
    protocol = read_protocol(merged(changes))
    plan = protocol.plan("a" * 64)
    assert plan.run == "a" * 64
    assert plan.protocol == protocol.fingerprint()
    assert plan.modalities == protocol.modalities
    assert dict(plan.sums) == {
        "clinical": ("age", "stage", "arm=b", "sex=male"),
        "omics": ("projection_0",),
        "pathology": ("projection_0", "projection_1"),
        "radiology": ("original_shape_MeshVolume",),
    }
    assert plan.encoder_ridge["omics"] == (0.7,)
    assert len(plan.encoder_ridge["clinical"]) > 1
    assert set(plan.encoder_ridge) == set(plan.l1_ratio) == set(plan.sums)
    assert plan.l1_ratio["clinical"] == 0.2
    assert plan.components == {"clinical": 3}  # four components of one input would keep it all
    assert (plan.fusion_ridge, plan.n_folds) == ((0.1, 0.3), 3)
    assert (plan.fusion_model, plan.gating, plan.networks) == ("cox", None, {})
    assert plan.subgroups == {
        "age": ("below 50", "50 to 70", "70 and above"), "sex": ("female", "male"),
    }  # fmt: skip
    assert plan.treatments == ("a", "b")
    assert plan.thresholds == (0.25, 0.5)
    assert len(plan.left_out_runs) == 10
    assert (plan.edges_days, plan.horizon_days) == ((365, 730), 730)
    assert plan.minimum == protocol.privacy


def test_networks_and_gates_are_planned_as_the_protocol_says() -> None:
    changes = {
        "encoder.blood": {
            "model": "mlp", "sharing": "weights", "averaging": "fedprox", "rounds": 9,
            "local_steps": 2, "local_learning_rate": 0.2, "proximal": 0.4, "hidden": 3,
        },
        "fusion.model": "gated", "fusion.rounds": 6, "fusion.averaging": "fedavg",
        "fusion.proximal": 0.7, "fusion.hidden": 2,
    }  # fmt: skip
    plan = read_protocol(merged(changes)).plan("a" * 64)
    (name,) = plan.networks
    blood = plan.networks[name]
    assert (name, blood.rule, blood.rounds, blood.local_steps) == ("blood", "fedprox", 9, 2)
    assert (blood.learning_rate, blood.proximal) == (0.2, 0.4)
    assert np.isfinite(blood.start).all()
    assert plan.n_weights("blood/2") == len(blood.start) > 3 * 2
    assert "blood" not in plan.sums
    assert set(plan.network_fits) == {"blood", *plan.fold_fits("blood"), PROTOCOL}
    assert plan.gating is not None
    assert (plan.gating.rule, plan.gating.rounds, plan.gating.proximal) == ("fedavg", 6, 0.0)
    assert plan.n_weights(PROTOCOL) == len(plan.gating.start)
    again = read_protocol(merged(changes)).plan("a" * 64)
    np.testing.assert_array_equal(again.networks["blood"].start, blood.start)


def test_a_projection_is_the_same_at_every_site() -> None:
    protocol = read_protocol(merged({"encoder.blood.max_inputs": 1}))
    found = protocol.projection("blood", 2)
    assert found is not None
    assert found.shape == (2, 1)
    np.testing.assert_array_equal(found, read_protocol(protocol.values()).projection("blood", 2))
    assert protocol.projection("clinical", 4) is None


def test_toml_and_values_are_one_protocol() -> None:
    text = TEMPLATES["demo.toml"]()
    read = read_protocol_text(text, source="demo.toml")
    assert read == read_protocol(tomllib.loads(text))
