"""A model is loaded as it was signed, by whom it was signed, or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from flows import model_signing
from flows.identity import identity, rotate
from flows.mlflow_store import client_of, quietly_imported
from flows.model_signing import (
    SIGNATURE_FILE,
    ModelNotTrusted,
    keys_of_environment,
    load_signed,
    read_signature,
    sign_model,
    trusted_keys,
    verify_model,
)
from flows.registry import track_study
from fusion.federation.consortium import COORDINATOR, Consortium
from fusion.keys import SigningKey
from infra.settings import Workspace
from tests.simulated_record import full_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.border

KEY, OTHER = SigningKey(b"k" * 32), SigningKey(b"o" * 32)
TRUSTED = [KEY.public]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "artifacts").mkdir(parents=True)
    (folder / "MLmodel").write_text("flavors: {}\n")
    (folder / "artifacts" / "fusion.json").write_text("{}")
    sign_model(folder, KEY, study="lung", run="a" * 64)
    return folder


def test_a_signed_model_is_trusted_and_says_where_it_comes_from(model: Path) -> None:
    signed = verify_model(model, TRUSTED)
    assert (signed.study, signed.run, signed.signed_by) == ("lung", "a" * 64, KEY.public)
    assert set(signed.files) == {"MLmodel", "artifacts/fusion.json"}


def test_what_mlflow_adds_to_a_fetched_model_does_not_count(model: Path) -> None:
    (model / "registered_model_meta").write_text("model_name: lung-fusion\n")
    verify_model(model, TRUSTED)


def test_signing_again_replaces_the_signature(model: Path) -> None:
    (model / "MLmodel").write_text("flavors: {other: {}}\n")
    sign_model(model, OTHER)
    assert verify_model(model, [OTHER.public]).study == ""


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda m: _flip(m / "MLmodel"), "MLmodel changed"),
        (lambda m: _flip(m / "artifacts" / "fusion.json"), "artifacts/fusion.json changed"),
        (lambda m: (m / "artifacts" / "fusion.json").unlink(), "artifacts/fusion.json missing"),
        (lambda m: (m / "more.py").write_text(""), "more.py added"),
        (lambda m: (m / "more").symlink_to("/"), "more added"),
        (lambda m: (m / SIGNATURE_FILE).unlink(), "found no signature.json"),
        (lambda m: (m / SIGNATURE_FILE).write_text("[]"), "signature.json damaged"),
    ],
)
def test_an_altered_model_is_refused_by_name(
    model: Path, harm: Callable[[Path], Any], told: str
) -> None:
    harm(model)
    with pytest.raises(ModelNotTrusted, match=told):
        verify_model(model, TRUSTED)


@pytest.mark.parametrize("field", ["study", "run", "files", "signed_by", "signature"])
def test_a_signature_holds_for_its_own_text_only(model: Path, field: str) -> None:
    values = json.loads((model / SIGNATURE_FILE).read_text())
    other = {"files": {}, "signed_by": OTHER.public, "signature": "0" * 128}
    values[field] = other.get(field, "another")
    (model / SIGNATURE_FILE).write_text(json.dumps(values))
    with pytest.raises(ModelNotTrusted, match=r"signature\.json changed"):
        verify_model(model, [*TRUSTED, OTHER.public])


def test_every_byte_of_the_signature_file_is_guarded(model: Path) -> None:
    path = model / SIGNATURE_FILE
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        if whole[at : at + 1].isspace():
            continue
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ModelNotTrusted):
            verify_model(model, TRUSTED)


def test_a_model_that_somebody_else_signed_is_refused(model: Path) -> None:
    sign_model(model, OTHER)
    with pytest.raises(ModelNotTrusted, match=f"signed by {OTHER.public[:12]}"):
        verify_model(model, TRUSTED)
    with pytest.raises(ModelNotTrusted, match="found no key to trust"):
        verify_model(model, [])


def _consortium(coordinator: str, *, revoked: tuple[str, ...] = ()) -> bytes:
    sites = {x: SigningKey(x.encode() * 32).public for x in "ab"}
    return Consortium("lung", coordinator, sites, 2, revoked).to_bytes()


def test_the_coordinators_keys_are_trusted_and_revoked_ones_not(tmp_path: Path) -> None:
    assert trusted_keys(tmp_path) == frozenset()
    own = identity(tmp_path / COORDINATOR).public
    assert trusted_keys(tmp_path) == {own}
    later = rotate(tmp_path / COORDINATOR, party=COORDINATOR).new
    assert trusted_keys(tmp_path) == {own, later}
    kit = tmp_path / "kits" / "a"
    kit.mkdir(parents=True)
    (kit / "consortium.json").write_bytes(_consortium(KEY.public, revoked=(own,)))
    assert trusted_keys(tmp_path) == {later, KEY.public}
    (kit / "consortium.json").write_bytes(b"{}")
    with pytest.raises(ModelNotTrusted, match=r"consortium\.json"):
        trusted_keys(tmp_path)


def test_the_environment_says_whose_models_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSILIUM_ROOT", str(tmp_path))
    own = identity(tmp_path / COORDINATOR).public
    assert keys_of_environment() == {own}
    monkeypatch.setenv("CONSILIUM_MODEL_KEYS", f"{KEY.public}, {OTHER.public}")
    assert keys_of_environment() == {KEY.public, OTHER.public}
    monkeypatch.setenv("CONSILIUM_MODEL_KEYS", "")
    assert keys_of_environment() == frozenset()
    monkeypatch.setenv("CONSILIUM_MODEL_KEYS", "a key")
    with pytest.raises(ModelNotTrusted, match="no public key"):
        keys_of_environment()
    with model_signing.trusting([KEY.public]):
        assert keys_of_environment() == {KEY.public}


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's folder with a registered, signed model."""
    root = tmp_path_factory.mktemp("study")
    workspace = Workspace(root=root)
    unsigned = dataclasses.replace(full_record(), run="b" * 64)
    track_study(unsigned, tracking_uri=workspace.mlflow_uri, artifact_root=root / "artifacts")
    track_study(
        full_record(),
        tracking_uri=workspace.mlflow_uri,
        artifact_root=root / "artifacts",
        key=identity(root / COORDINATOR),
    )
    return root


@pytest.fixture
def study(registered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy of it: the registry in the copy still names the first folder's paths."""
    for name in ("CONSILIUM_MODEL_KEYS", "CONSILIUM_TRACKING_URI", "CONSILIUM_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(registered, tmp_path / "copy")
    return Workspace(root=tmp_path / "copy")


URI = "models:/lung-os-fusion@candidate"


def _model_files(study: Workspace) -> Path:
    (signed,) = study.root.glob(f"artifacts/*/models/*/artifacts/{SIGNATURE_FILE}")
    return signed.parent


def test_a_registered_model_loads_and_its_version_bears_the_signature(study: Workspace) -> None:
    model = load_signed(URI, study)
    assert model.unwrap_python_model().model.modalities
    version = client_of(study.mlflow_uri).get_model_version("lung-os-fusion", "2")
    assert version.tags["consilium.signed_by"] == identity(study.root / COORDINATOR).public
    assert len(version.tags["consilium.signature"]) == 128


@pytest.mark.parametrize("name", ["artifacts/fusion.json", "fusion_pyfunc.py", "conda.yaml"])
def test_an_altered_registered_model_never_loads(
    study: Workspace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _model_files(study) / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ModelNotTrusted, match=f"{name} changed"):
        load_signed(URI, study)
    pyfunc = quietly_imported("mlflow.pyfunc")
    monkeypatch.setenv("CONSILIUM_ROOT", str(study.root))
    with pytest.raises(ModelNotTrusted, match=f"{name} changed"):
        pyfunc.load_model(str(_model_files(study)))


def test_code_that_somebody_put_into_a_model_does_not_run(study: Workspace) -> None:
    code = _model_files(study) / "fusion_pyfunc.py"
    code.write_text(f"open({str(study.root / 'ran')!r}, 'w')\n" + code.read_text())
    with pytest.raises(ModelNotTrusted, match=r"fusion_pyfunc\.py changed"):
        load_signed(URI, study)
    assert not (study.root / "ran").exists()


def test_mlflow_alone_refuses_what_is_unsigned_or_nobodys(
    study: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyfunc = quietly_imported("mlflow.pyfunc")
    folder = str(_model_files(study))
    with pytest.raises(ModelNotTrusted, match="found no key to trust"):
        pyfunc.load_model(folder)
    monkeypatch.setenv("CONSILIUM_ROOT", str(study.root))
    assert pyfunc.load_model(folder).unwrap_python_model().model.modalities
    sign_model(_model_files(study), OTHER)
    with pytest.raises(ModelNotTrusted, match="signed by"):
        pyfunc.load_model(folder)
    (_model_files(study) / SIGNATURE_FILE).unlink()
    with pytest.raises(ModelNotTrusted, match="found no signature"):
        pyfunc.load_model(folder)


def test_a_model_registered_without_a_key_does_not_load(study: Workspace) -> None:
    with pytest.raises(ModelNotTrusted, match="found no signature"):
        load_signed("models:/lung-os-fusion/1", study)


def test_reading_a_signature_does_not_check_it(model: Path) -> None:
    _flip(model / "MLmodel")
    assert read_signature(model).signed_by == KEY.public
