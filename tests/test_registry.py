from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import yaml

from flows import registry
from flows.mlflow_store import client_of, tracking_at
from flows.protocol import GateSection, StudyProtocol, read_protocol
from flows.records import StudyRecord
from flows.registry import Registered, RegistryError, find_version, model_card, track_study
from flows.registry_values import shortened
from fusion.federation import (
    PROTOCOL,
    InProcess,
    Outcome,
    SiteRows,
    SiteStudy,
    Split,
    run_federation,
    summarise,
)
from fusion.keys import SigningKey

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ROOT = Path(__file__).resolve().parents[1]
POLICY = ROOT / "mlflow"
GRID_DAYS = (365.0, 730.0, 1095.0)
COORDINATOR = SigningKey(b"c" * 32)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def study_protocol() -> StudyProtocol:
    return read_protocol(
        {
            "study": {
                "name": "lung", "data": "simulated", "horizon_days": 730, "grid_days": GRID_DAYS,
            },
            "modality": {
                "blood": {"kind": "tabular", "columns": ["b0", "b1", "b2"]},
                "clinical": {"kind": "clinical", "numeric": ["age", "stage"]},
            },
            "privacy": {"cell": 1},
        }
    )  # fmt: skip


def site_rows(rng: np.random.Generator, n: int, *, external: bool = False) -> SiteRows:
    blood, clinical = rng.normal(size=(n, 3)), rng.normal(size=(n, 2))
    log_hazard = blood.sum(axis=1) / 2 + clinical.sum(axis=1) / 3
    event_time = np.ceil(rng.exponential(900 * np.exp(-log_hazard)))
    censored = rng.uniform(300, 2500, n)
    event, time_days = event_time <= censored, np.minimum(event_time, censored)
    blood[rng.random(n) < 0.2] = np.nan
    cut = 0 if external else int(0.7 * n)
    tables = {"blood": blood, "clinical": clinical}
    return SiteRows(
        cohort=f"{rng.integers(2**60):064x}",
        train=Outcome(event[:cut], time_days[:cut]),
        test=Outcome(event[cut:], time_days[cut:]),
        folds=rng.integers(0, 5, cut),
        tables={k: Split(v[:cut], v[cut:]) for k, v in tables.items()},
        local={} if external else {"clinical": Split(clinical[:cut, 0], clinical[cut:, 0])},
    )


def study_record(run: str = "a" * 64) -> StudyRecord:
    rng = np.random.default_rng(0)
    protocol = study_protocol()
    plan = protocol.plan(run)
    rows = {"site-01": site_rows(rng, 300), "site-02": site_rows(rng, 180)}
    rows["site-03"] = site_rows(rng, 50, external=True)
    fitted = run_federation(plan, InProcess({s: SiteStudy(plan, x) for s, x in rows.items()}))
    return StudyRecord(run, protocol, fitted, summarise(fitted), "c0ffee" * 6 + "c0de")


@dataclasses.dataclass(frozen=True)
class Store:
    uri: str
    artifacts: Path

    @property
    def client(self) -> MlflowClient:
        return client_of(self.uri)

    def track(self, record: StudyRecord) -> Registered:
        return track_study(
            record, tracking_uri=self.uri, artifact_root=self.artifacts, key=COORDINATOR
        )

    def runs(self, record: StudyRecord) -> tuple[Run, list[Run]]:
        """The one study run, and its rounds in order."""
        experiment = self.client.get_experiment_by_name("consilium/lung").experiment_id
        found = self.client.search_runs([experiment], f"tags.`consilium.run` = '{record.run}'")
        parents = [r for r in found if "mlflow.parentRunId" not in r.data.tags]
        children = [r for r in found if "mlflow.parentRunId" in r.data.tags]
        assert len(parents) == 1
        assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parents[0].info.run_id}
        return parents[0], sorted(children, key=lambda r: int(r.data.params["round"]))


def new_store(folder: Path) -> Store:
    return Store(f"sqlite:///{folder}/store/mlflow.db", folder / "store" / "artifacts")


@pytest.fixture(scope="module")
def record() -> StudyRecord:
    return study_record()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, record: StudyRecord) -> Store:
    """A store that holds one registered study."""
    found = new_store(tmp_path_factory.mktemp("registry"))
    assert find_version(found.uri, "lung", record.run) is None
    assert found.track(record) == Registered(
        "lung-fusion", 1, found.runs(record)[0].info.run_id, False
    )
    return found


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSILIUM_MODEL_KEYS", COORDINATOR.public)


@pytest.fixture
def empty(tmp_path: Path) -> Store:
    return new_store(tmp_path)


def load(store: Store, uri: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow.pyfunc
    with tracking_at(store.uri):
        return mlflow.pyfunc.load_model(uri)


def test_looking_up_in_no_store_makes_none(tmp_path: Path) -> None:
    assert find_version(f"sqlite:///{tmp_path}/none.db", "lung", "a" * 64) is None
    assert not list(tmp_path.iterdir())


def test_a_study_run_is_registered_once(store: Store, record: StudyRecord) -> None:
    first = find_version(store.uri, "lung", record.run)
    assert first is not None
    assert first.reused
    assert store.track(record) == first
    assert len(store.client.search_model_versions("name = 'lung-fusion'")) == 1
    store.runs(record)


def test_rounds_are_child_runs_with_what_they_cost(store: Store, record: StudyRecord) -> None:
    parent, children = store.runs(record)
    assert len(children) == len(record.fitted.rounds)
    for child, done in zip(children, record.fitted.rounds, strict=True):
        assert child.data.params["stage"] == done.stage
        assert child.data.metrics["bytes_received"] == done.bytes_received
        assert child.data.metrics["n_sites"] == done.n_sites
        assert ("objective" in child.data.metrics) == math.isfinite(done.objective)
        assert parent.info.start_time <= child.info.start_time <= child.info.end_time
        assert child.info.status == parent.info.status == "FINISHED"
    assert parent.info.run_name == "study-aaaaaaaa"


def test_metrics_are_the_released_ones_and_name_their_data(
    store: Store, record: StudyRecord
) -> None:
    parent, _ = store.runs(record)
    metrics = parent.data.metrics
    result = record.results.arms[PROTOCOL]
    assert result.concordance is not None
    assert metrics["federated/concordance"] == pytest.approx(result.concordance.value)
    assert metrics["federated/concordance_low"] == pytest.approx(result.concordance.low)
    assert metrics["site-03/federated/concordance"] == pytest.approx(
        result.by_site["site-03"].value
    )
    assert "site-03/local_only/concordance" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())
    (output,) = parent.outputs.model_outputs
    named = {m.key: m.dataset_name for m in store.client.get_logged_model(output.model_id).metrics}
    assert named["site-01/federated/concordance"] == "site-01"
    assert named["federated/concordance"] is None


def test_each_site_is_a_data_set_by_name_and_keyed_digest(
    store: Store, record: StudyRecord
) -> None:
    parent, _ = store.runs(record)
    inputs = {x.dataset.name: x for x in parent.inputs.dataset_inputs}
    assert set(inputs) == {"site-01", "site-02", "site-03"}
    for site in record.fitted.sites:
        dataset = inputs[site.site].dataset
        assert site.cohort.startswith(dataset.digest)
        assert json.loads(dataset.source) == {"site": site.site, "cohort": site.cohort}
    assert inputs["site-03"].tags[0].value == "external"


def test_the_version_has_its_lineage_and_its_card(store: Store, record: StudyRecord) -> None:
    version = store.client.get_model_version_by_alias("lung-fusion", "candidate")
    assert version.tags["consilium.run"] == record.run
    assert version.tags["consilium.protocol"] == record.protocol.fingerprint()
    assert version.tags["consilium.code"] == record.code_version
    assert version.tags["consilium.data"] == "simulated"
    assert version.tags["consilium.sites"] == "site-01,site-02"
    assert version.tags["consilium.external_sites"] == "site-03"
    assert version.tags["consilium.rounds"] == str(max(record.fitted.fit_rounds.values()))
    assert version.tags["consilium.lowered_minimums"] == "cell 1 (default 10)"
    assert version.description == model_card(record)
    parent, _ = store.runs(record)
    assert parent.data.tags["mlflow.source.git.commit"] == record.code_version


def test_artifacts_are_figures_table_card_protocol_and_encoders(
    store: Store, record: StudyRecord
) -> None:
    parent, _ = store.runs(record)
    folder = store.artifacts / "lung" / parent.info.run_id / "artifacts"
    assert {x.name for x in folder.iterdir()} == {
        "figures", "results.md", "model_card.md", "protocol.json", "encoders.json",
        "networks.json", "lineage.json", "logged.json",
    }  # fmt: skip
    assert {x.stem for x in (folder / "figures").iterdir()} == {
        "kaplan_meier", "calibration", "modality_weights", "convergence", "ablation",
        "heterogeneity", "net_benefit",
    }  # fmt: skip
    assert read_protocol(json.loads((folder / "protocol.json").read_text())) == record.protocol
    assert set(json.loads((folder / "encoders.json").read_text())) == {"blood", "clinical"}


def test_the_loaded_model_predicts_as_the_fitted_one(store: Store, record: StudyRecord) -> None:
    columns = {"blood": [0.3, np.nan, -1.0], "clinical": [0.1, 0.2, np.nan]}
    frame = pd.DataFrame({"clinical": columns["clinical"], "blood": columns["blood"]})
    predicted = load(store, "models:/lung-fusion@candidate").predict(frame)
    model = record.fitted.models[PROTOCOL]
    values = frame[list(model.modalities)].to_numpy()
    expected = model.predict_survival_function(values, GRID_DAYS)
    assert list(predicted) == [
        "log_hazard", "log_hazard_se", "survival_365", "survival_730", "survival_1095",
    ]  # fmt: skip
    np.testing.assert_allclose(predicted["log_hazard"], model.predict(values))
    np.testing.assert_allclose(predicted["log_hazard_se"], model.predict_standard_error(values))
    np.testing.assert_allclose(predicted.filter(like="survival_"), expected)


def test_the_input_example_is_there_made_up_and_of_no_patient(
    store: Store, record: StudyRecord
) -> None:
    version = store.client.get_model_version_by_alias("lung-fusion", "candidate")
    (folder,) = store.artifacts.glob(f"lung/models/{version.source.split('/')[-1]}/artifacts")
    model = load(store, "models:/lung-fusion@candidate")
    example = model.metadata.load_input_example(str(folder))
    modalities = record.fitted.models[PROTOCOL].modalities
    assert model.metadata.get_input_schema().input_names() == list(modalities)
    assert list(example.columns) == list(modalities) == ["blood", "clinical"]
    assert example.to_numpy(dtype=float) == pytest.approx(
        np.array([[0.0, 0.0], [0.5, np.nan]]), nan_ok=True
    )
    assert np.isfinite(model.predict(example)).all(axis=None)
    # What MLflow shows and serves of it, against every number that is a patient's.
    rng = np.random.default_rng(0)
    real = [site_rows(rng, 300), site_rows(rng, 180), site_rows(rng, 50, external=True)]
    assert [x.cohort for x in real] == [site.cohort for site in record.fitted.sites]
    values = {
        float(x)
        for rows in real
        for of in (*rows.tables.values(), *rows.local.values())
        for part in (of.train, of.test)
        for x in part[np.isfinite(part)]
    }
    values |= {float(x) for rows in real for of in (rows.train, rows.test) for x in of.time}
    files = sorted(x.name for x in folder.glob("*example*"))
    assert files == ["input_example.json", "serving_input_example.json"]
    shown = [float(x) for file in files for x in NUMBER.findall((folder / file).read_text())]
    assert len(shown) >= 6
    assert values.isdisjoint(shown)


@pytest.mark.parametrize("frame", [{"blood": [0.1]}, {"blood": [0.1], "clinical": ["old"]}])
def test_the_loaded_model_refuses_other_columns(store: Store, frame: dict[str, Any]) -> None:
    model = load(store, "models:/lung-fusion/1")
    with pytest.raises(Exception, match="clinical"):
        model.predict(pd.DataFrame(frame))


def test_the_model_itself_names_a_column_at_fault(record: StudyRecord) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from flows.fusion_pyfunc import FusionPyfunc
    served = FusionPyfunc()
    served.model, served.grid_days = record.fitted.models[PROTOCOL], GRID_DAYS
    with pytest.raises(ValueError, match="columns: found none for blood"):
        served.predict(None, pd.DataFrame({"clinical": [0.0]}))
    with pytest.raises(ValueError, match="infinite"):
        served.predict(None, pd.DataFrame({"clinical": [0.0], "blood": [np.inf]}))


def test_nothing_tells_of_this_machine(store: Store, record: StudyRecord) -> None:
    parent, children = store.runs(record)
    secrets = [str(store.artifacts.parent), str(ROOT), str(Path.home())]
    for run in (parent, *children):
        told = {**run.data.tags, **run.data.params, **dict.fromkeys(run.data.metrics, "")}
        text = json.dumps(told)
        assert not [x for x in secrets if x in text]
        assert run.data.tags["mlflow.user"] == run.data.tags["mlflow.source.name"] == "consilium"
    for file in (x for x in store.artifacts.rglob("*") if x.is_file()):
        content = file.read_bytes()
        assert not [x for x in secrets if x.encode() in content], file.name
    assert not [x for x in parent.data.params.values() if re.search(r"(^|\s)/", x)]


def test_a_study_killed_half_way_is_logged_anew_without_a_duplicate(
    empty: Store, record: StudyRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry, "_register", killed)
        with pytest.raises(KeyboardInterrupt):
            empty.track(record)
    assert find_version(empty.uri, "lung", record.run) is None
    again = empty.track(record)
    parent, children = empty.runs(record)
    assert (again.version, again.run_id, again.reused) == (1, parent.info.run_id, False)
    assert len(children) == len(record.fitted.rounds)
    experiment = empty.client.get_experiment_by_name("consilium/lung").experiment_id
    assert len(empty.client.search_logged_models([experiment])) == 1


def test_a_version_without_its_alias_is_finished_and_a_later_one_kept(
    empty: Store, record: StudyRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alias() -> str:
        return str(empty.client.get_model_version_by_alias("lung-fusion", "candidate").version)

    monkeypatch.setattr(registry, "_log_rounds", lambda *_, **__: None)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_point_candidate_at", lambda *_: None)
        assert not empty.track(record).reused
    assert find_version(empty.uri, "lung", record.run) is None
    assert empty.track(record).reused
    assert alias() == "1"
    later = empty.track(dataclasses.replace(record, run="b" * 64))
    assert (later.version, later.reused) == (2, False)
    assert empty.track(record).version == 1
    assert alias() == "2"


def test_a_card_that_is_too_long_points_to_the_whole_one() -> None:
    short = shortened("word\n" * 2000)
    assert len(short) <= 5000
    assert "model_card.md" in short


def test_a_missing_template_is_named(
    record: StudyRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_TEMPLATE", tmp_path / "model_card.md.template")
    with pytest.raises(RegistryError, match="found none beside the package"):
        model_card(record)


def test_the_policy_mirrors_the_protocol_s_gates(store: Store, record: StudyRecord) -> None:
    policy = yaml.safe_load((POLICY / "registry.yaml").read_text(encoding="utf-8"))
    defaults = {name: gate["default"] for name, gate in policy["gates"].items()}
    assert defaults == GateSection().model_dump()
    parent, _ = store.runs(record)
    asked_of_few = {"leave_one_site_out/concordance"}
    metrics = {gate["metric"] for gate in policy["gates"].values()}
    assert metrics - asked_of_few <= set(parent.data.metrics)
    assert list(policy["aliases"]) == [registry.CANDIDATE, "challenger", "champion"]
    assert policy["model"].format(study="lung") == registry.model_name("lung")
    assert policy["experiment"].format(study="lung") == "consilium/lung"


def test_the_folder_holds_configuration_only() -> None:
    assert not list(POLICY.rglob("*.py"))
    project = yaml.safe_load((POLICY / "MLproject").read_text(encoding="utf-8"))
    assert project["entry_points"]["demo"]["command"].startswith("consilium demo")


def test_twenty_rounds_are_logged_in_seconds(empty: Store, record: StudyRecord) -> None:
    rounds = [dataclasses.replace(record.fitted.rounds[0], number=i) for i in range(1, 21)]
    fitted = dataclasses.replace(record.fitted, rounds=tuple(rounds))
    empty.client.search_experiments()
    begins = time.process_time()
    empty.track(dataclasses.replace(record, fitted=fitted))
    assert time.process_time() - begins < 10.0
    assert Counter(r.data.params["stage"] for r in empty.runs(record)[1]) == {"describe": 20}


@pytest.mark.slow
def test_a_fresh_process_loads_the_candidate_with_warnings_as_errors(store: Store) -> None:
    code = (
        "import mlflow, mlflow.pyfunc, pandas as pd, sys, warnings\n"
        "mlflow.MlflowClient().search_experiments()\n"
        "warnings.simplefilter('error')\n"
        "model = mlflow.pyfunc.load_model('models:/lung-fusion@candidate')\n"
        "print(model.predict(pd.DataFrame({'blood': [0.0], 'clinical': [None]}, dtype=float)))\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": store.uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "survival_1095" in done.stdout


@pytest.mark.slow
def test_a_server_works_with_only_the_address_changed(tmp_path: Path, record: StudyRecord) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination", str(tmp_path / "artifacts"),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    log = (tmp_path / "log").open("wb")
    with log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server:
        try:
            wait_for(port)
            served = Store(f"http://127.0.0.1:{port}", tmp_path / "unused")
            registered = served.track(record)
            assert not registered.reused
            assert served.track(record).reused
            model = load(served, "models:/lung-fusion@candidate")
            assert len(model.predict(pd.DataFrame({"blood": [0.0], "clinical": [0.0]}))) == 1
            assert not served.artifacts.exists()
        finally:
            server.terminate()


def wait_for(port: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError("server: no answer in 120 s")
