"""A site's audit: each of its models, results that stay there, and what they allow."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from flows import membership
from flows.cli import app
from flows.inputs import LocalEncoder, ModalityInputs, SiteInputs, train_local
from flows.loading import encoder_key
from flows.membership import (
    FUSION,
    MEMBERSHIP,
    audit_inputs,
    audit_site,
    may_share_weights,
    planned_models,
    read_results,
    write_results,
)
from flows.protocol import StudyProtocol, load_protocol, read_protocol
from fusion.membership import MIN_MODELS, Effort, MembershipResult
from infra.settings import SiteSettings, Workspace
from modalities.cohort import DataError
from tests.simulated import simulate_bags, simulate_survival

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.border

N = 64
EFFORT = Effort(n_models=8)
COHORT = "c" * 64
PASSING = MembershipResult(
    "blood", 300, 150, MIN_MODELS, 0.55, 0.52, 0.58, 0.06, 0.05, 0.07, 0.51, 0.5, 0.52
)


def protocol(**section: Any) -> StudyProtocol:
    return read_protocol(
        {
            "study": {
                "name": "small", "data": "simulated", "horizon_days": 730,
                "grid_days": [365, 730], "seed": 3,
            },
            "modality": {
                "clinical": {"kind": "clinical", "numeric": ["age"]},
                "blood": {"kind": "tabular", "columns": ["hb", "crp"]},
                "pathology": {"kind": "pathology"},
            },
            "encoder": {
                "blood": {
                    "model": "mlp", "sharing": "weights", "hidden": 2, "rounds": 3,
                    "local_steps": 2,
                },
                "pathology": {"n_components": 3, "hidden": 2, "max_steps": 5, "ridge": 0.1},
            },
            "privacy": {"patients": 20, "events": 5, "patients_per_input": 2},
        } | section
    )  # fmt: skip


@pytest.fixture(scope="module")
def inputs() -> SiteInputs:
    """A site where four patients lack blood."""
    rng = np.random.default_rng(0)
    bags, _, _ = simulate_bags(N, 0, dim=8)
    age, blood = rng.normal(size=(N, 1)), rng.normal(size=(N - 4, 2))
    event, time = simulate_survival(age[:, 0], rng)
    everyone = np.arange(N)
    return SiteInputs(
        site="site-01",
        cohort=COHORT,
        patient_ids=np.array([f"p{i}" for i in everyone]),
        event=event,
        time=time,
        train=everyone % 5 > 0,
        folds=everyone % 3,
        modalities={
            "clinical": ModalityInputs(everyone, age),
            "blood": ModalityInputs(everyone[4:], blood),
            "pathology": ModalityInputs(everyone, bags),
        },
    )


@pytest.fixture(scope="module")
def local(inputs: SiteInputs) -> dict[str, LocalEncoder]:
    study = protocol()
    return {
        name: train_local(inputs, name, study.encoder[name], seed=3) for name in study.modalities
    }


@pytest.fixture
def site(tmp_path: Path) -> SiteSettings:
    return SiteSettings(name="site-01", home=tmp_path / "home", secret="s" * 32)


@pytest.fixture
def prepared(
    monkeypatch: pytest.MonkeyPatch, inputs: SiteInputs, local: dict[str, LocalEncoder]
) -> None:
    monkeypatch.setattr(membership, "load_inputs", lambda *_, **__: inputs)
    monkeypatch.setattr(membership, "load_encoders", lambda *_, **__: local)


@pytest.mark.usefixtures("prepared")
def test_each_encoder_and_the_fusion_model_are_audited_and_kept(site: SiteSettings) -> None:
    done: list[int] = []
    study = protocol()
    results = audit_site(site, study, effort=EFFORT, advance=done.append)
    assert [x.name for x in results] == ["blood", "clinical", "pathology", FUSION]
    assert sum(done) == planned_models(study, EFFORT) == 32
    n_train = sum(1 for i in range(N) if i % 5)
    assert [x.n_patients for x in results] == [n_train - 4 + 1, n_train, n_train, n_train]
    assert all(x.n_models == 8 for x in results)
    found = read_results(site, study)
    assert found == {encoder_key(COHORT, study, x.name): x for x in results}
    assert audit_site(site, study, effort=EFFORT) == results  # by the protocol's seed


@pytest.mark.usefixtures("prepared")
def test_results_stay_at_the_site_for_its_owner_and_name_no_patient(site: SiteSettings) -> None:
    audit_site(site, protocol(), effort=EFFORT)
    assert [x.name for x in site.home.iterdir()] == [MEMBERSHIP]
    path = site.path(MEMBERSHIP)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    values = json.loads(path.read_text())
    assert set(values) == {"format", "protocol", "code", "results", "seal"}
    assert values["protocol"] == protocol().fingerprint()
    assert "p1" not in path.read_text()


def test_an_encoder_shared_as_weights_is_audited_as_it_is_shared(
    inputs: SiteInputs, local: dict[str, LocalEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    real = membership.shared_fit

    def spy(*args: Any) -> Any:
        plans.append(args[4])
        return real(*args)

    monkeypatch.setattr(membership, "shared_fit", spy)
    audit_inputs(inputs, local, protocol(), effort=EFFORT)
    assert [(x.rounds, x.local_steps) for x in plans] == [(3, 2)]


def test_a_modality_without_an_encoder_has_no_result(
    inputs: SiteInputs, local: dict[str, LocalEncoder]
) -> None:
    done: list[int] = []
    without = local | {"pathology": LocalEncoder(None, np.full(N, np.nan), "too few events")}
    found = audit_inputs(inputs, without, protocol(), effort=EFFORT, advance=done.append)
    assert [x.name for x in found] == ["blood", "clinical", FUSION]
    assert sum(done) == planned_models(protocol(), EFFORT)


@pytest.mark.parametrize("model", ["logistic_hazard", "gated"])
def test_every_fusion_model_can_be_audited(
    inputs: SiteInputs, local: dict[str, LocalEncoder], model: str
) -> None:
    study = protocol(fusion={"model": model, "ridge": 0.1, "hidden": 2})
    some = {"clinical": local["clinical"]}
    bare = replace(inputs, modalities={"clinical": inputs.modalities["clinical"]})
    assert [x.name for x in audit_inputs(bare, some, study, effort=EFFORT)] == ["clinical", FUSION]


def test_nothing_to_audit_is_said(
    site: SiteSettings, inputs: SiteInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "load_encoders", lambda *_, **__: {})
    monkeypatch.setattr(membership, "load_inputs", lambda *_, **__: inputs)
    with pytest.raises(DataError, match="site train"):
        audit_site(site, protocol())
    untrained = replace(inputs, train=np.zeros(N, dtype=bool))
    monkeypatch.setattr(membership, "load_inputs", lambda *_, **__: untrained)
    with pytest.raises(DataError, match="does not train"):
        audit_site(site, protocol())
    assert not site.path(MEMBERSHIP).exists()


def test_weights_leave_after_a_passing_audit_of_this_cohort_protocol_and_model_only(
    site: SiteSettings,
) -> None:
    study = protocol()
    key = encoder_key(COHORT, study, "blood")
    assert not may_share_weights(site, study, "blood", key)
    write_results(site, study, [PASSING], cohort=COHORT)
    assert may_share_weights(site, study, "blood", key)
    assert not may_share_weights(site, study, "pathology", key)
    assert not may_share_weights(site, study, "blood", encoder_key("d" * 64, study, "blood"))
    other = protocol(fusion={"folds": 4})
    assert not may_share_weights(site, other, "blood", encoder_key(COHORT, other, "blood"))
    assert not may_share_weights(site, other, "blood", key)
    write_results(site, study, [replace(PASSING, auc=0.61)], cohort=COHORT)
    assert not may_share_weights(site, study, "blood", key)
    write_results(site, study, [replace(PASSING, n_models=MIN_MODELS - 2)], cohort=COHORT)
    assert not may_share_weights(site, study, "blood", key)


def test_an_audit_of_other_sources_lets_nothing_leave(
    site: SiteSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(site, protocol(), [PASSING], cohort=COHORT)
    monkeypatch.setattr("flows.loading.source_digest", lambda *_: "e" * 64)
    key = encoder_key(COHORT, protocol(), "blood")
    assert not may_share_weights(site, protocol(), "blood", key)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("0.61", "0.59"),
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "seal"}),
    ],
)
def test_an_edited_audit_lets_nothing_leave(site: SiteSettings, edit: Any) -> None:
    study = protocol()
    path = write_results(site, study, [replace(PASSING, auc=0.61)], cohort=COHORT)
    path.write_text(edit(path.read_text()))
    assert not may_share_weights(site, study, "blood", encoder_key(COHORT, study, "blood"))
    assert read_results(site, study) == {}


def test_an_audit_copied_from_another_site_lets_nothing_leave(
    site: SiteSettings, tmp_path: Path
) -> None:
    study = protocol()
    other = SiteSettings(name="site-02", home=tmp_path / "other", secret="t" * 32)
    text = write_results(other, study, [PASSING], cohort=COHORT).read_text()
    site.home.mkdir()
    site.path(MEMBERSHIP).write_text(text)
    key = encoder_key(COHORT, study, "blood")
    assert may_share_weights(other, study, "blood", key)
    assert not may_share_weights(site, study, "blood", key)


def study_folder(root: Path, *, data: str) -> Path:
    """Write the protocol of these tests as a folder with one site has it."""
    study = f'''
[study]
name = "small"
data = "{data}"
horizon_days = 730
grid_days = [365, 730]
seed = 3
[modality.clinical]
kind = "clinical"
numeric = ["age"]
[modality.blood]
kind = "tabular"
columns = ["hb", "crp"]
[modality.pathology]
kind = "pathology"
[encoder.blood]
model = "mlp"
sharing = "weights"
hidden = 2
rounds = 3
local_steps = 2
[federation]
sums = "secure_sum"
'''
    (root / "study.toml").write_text(study)
    (root / "site.toml").write_text(f'name = "site-01"\nsecret = "{"s" * 32}"\n')
    return root


def audited(root: Path, *options: str) -> tuple[int, str]:
    command = ["audit", "membership", "--root", str(root), *options]
    done = CliRunner().invoke(app, command)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


@pytest.mark.usefixtures("prepared")
def test_the_command_tells_of_every_model_and_fails_for_one_whose_weights_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSILIUM_ROOT", "")  # restored afterwards: commands set it
    root = study_folder(tmp_path, data="patients")
    status, said = audited(root, "--models", "8")  # too few to pass anything
    lines = said.splitlines()
    assert status == 1
    assert [x.partition(": fails: AUC ")[0] for x in lines] == [
        "blood", "clinical", "pathology", FUSION,
    ]  # fmt: skip
    assert all("true positives at 5 % false ones" in x and x.endswith("8 models") for x in lines)
    status, said = audited(root, "--models", "8", "--json")
    assert status == 1
    found = json.loads(said)
    assert [(x["name"], x["passes"], x["n_models"]) for x in found] == [
        (name, False, 8) for name in ("blood", "clinical", "pathology", FUSION)
    ]
    assert all(x["auc_low"] <= x["auc"] <= x["auc_high"] for x in found)
    kept = read_results(Workspace(root=root).site("site-01"), load_protocol(root / "study.toml"))
    assert {x.name for x in kept.values()} == {x["name"] for x in found}


@pytest.mark.usefixtures("prepared")
def test_the_command_succeeds_where_no_patients_network_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSILIUM_ROOT", "")
    status, said = audited(study_folder(tmp_path, data="simulated"), "--models", "8")
    assert status == 0
    assert "blood: fails: " in said


def test_the_command_succeeds_once_the_shared_network_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSILIUM_ROOT", "")
    monkeypatch.setattr(membership, "audit_site", lambda *_, **__: [PASSING])
    status, said = audited(study_folder(tmp_path, data="patients"))
    assert status == 0
    assert said.splitlines()[0].startswith("blood: passes: AUC 0.55 (0.52 to 0.58), ")
    assert said.splitlines()[1:] == [
        f"{x}: not audited; logs/consilium.log says why" for x in ("clinical", "pathology", FUSION)
    ]
