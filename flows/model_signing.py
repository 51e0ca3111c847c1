"""Signatures of models: what the coordinator signed is loaded, and nothing else.

Beside the files of a model lies ``signature.json``: the SHA-256 of each of them, the study and the
run that they come from, and an Ed25519 signature over all of that. Whoever loads a model says whose
keys count. A model that is altered, unsigned, or signed by somebody else is refused with one
sentence.

A model's folder holds the code that MLflow runs to load it. :func:`load_signed` verifies before any
of that runs. Loaded plainly by MLflow, the code itself verifies before it reads a number; that
finds an altered model, but cannot stop code that somebody put in its place.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from flows.identity import former_keys, public_key
from flows.mlflow_store import model_folder, quietly_imported, tracking_at
from fusion.federation.consortium import CONSORTIUM_FILE, COORDINATOR, read_consortium
from fusion.keys import SIGNATURE_BYTES, canonical_json, verify
from modalities.files import digest_path, replacing

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from mlflow.pyfunc import PyFuncModel

    from fusion.keys import SigningKey
    from infra.settings import Workspace

SIGNATURE_FILE: Final = "signature.json"
KEYS_VARIABLE: Final = "CONSILIUM_MODEL_KEYS"
_ROOT_VARIABLE: Final = "CONSILIUM_ROOT"
_WHAT: Final = "consilium model"
_KEY: Final = re.compile(r"[0-9a-f]{64}")
_SIGNATURE: Final = re.compile(rf"[0-9a-f]{{{2 * SIGNATURE_BYTES}}}")
_FIELDS: Final = {"what", "study", "run", "files", "signed_by", "signature"}
# MLflow notes a name and a version in a model that it fetched from the registry.
ADDED_BY_MLFLOW: Final = "registered_model_meta"
_TRUSTED: ContextVar[frozenset[str] | None] = ContextVar("trusted", default=None)


class ModelNotTrusted(ValueError):
    """A model that is altered, unsigned, or signed by a key that does not count here."""


@dataclass(frozen=True)
class ModelSignature:
    """What a model's ``signature.json`` says.

    Attributes
    ----------
    study, run
        Where the model comes from.
    files
        SHA-256 of each file, by its name below the model's folder.
    signed_by
        Public key.
    signature
        128 hex digits over all of the above.
    """

    study: str
    run: str
    files: Mapping[str, str]
    signed_by: str
    signature: str

    def text(self) -> bytes:
        """Bytes that are signed."""
        return _text(self.study, self.run, self.files, self.signed_by)


def sign_model(folder: Path, key: SigningKey, *, study: str = "", run: str = "") -> ModelSignature:
    """Sign every file of a model's folder; write ``signature.json`` there, in place of any other.

    Parameters
    ----------
    key
        Of the party that vouches for the model: the coordinator, or a site for its own encoder.
    """
    files = _digests(folder)
    signature = key.sign(_text(study, run, files, key.public)).hex()
    signed = ModelSignature(study, run, files, key.public, signature)
    values = {"what": _WHAT, **vars(signed)}
    with replacing(folder / SIGNATURE_FILE) as temporary:
        temporary.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
    return signed


def verify_model(folder: Path, trusted: Collection[str]) -> ModelSignature:
    """Check that a model is exactly what a trusted key signed.

    Parameters
    ----------
    trusted
        Public keys, 64 hex digits each.

    Raises
    ------
    ModelNotTrusted
        If it is not; the sentence names the file that was changed, added or is missing, or says
        that the signature is missing, wrong, or of an unknown key.
    """
    signed = read_signature(folder)
    if not verify(signed.signed_by, bytes.fromhex(signed.signature), signed.text()):
        raise ModelNotTrusted(
            f"model: found {SIGNATURE_FILE} changed, needed it as it was signed; fetch the model "
            "anew from the coordinator"
        )
    if signed.signed_by not in trusted:
        raise ModelNotTrusted(unknown_signer(signed.signed_by, trusted))
    faults = model_faults(folder, signed)
    for name, state in faults.items():
        raise ModelNotTrusted(
            f"model: found {name} {state}, needed every file as it was signed; fetch the model "
            "anew from the coordinator"
        )
    return signed


def model_faults(folder: Path, signed: ModelSignature) -> dict[str, str]:
    """Say of each file of a model that is not as it was signed what became of it.

    Returns
    -------
    dict
        Name below the folder to ``changed``, ``missing`` or ``added``, sorted.
    """
    found = _digests(folder)
    states = {
        name: "missing" if name not in found else "added" if name not in signed.files else "changed"
        for name in {*found, *signed.files}
        if found.get(name) != signed.files.get(name)
    }
    return dict(sorted(states.items()))


def read_signature(folder: Path) -> ModelSignature:
    """Read a model's ``signature.json``; what it says is not checked.

    Raises
    ------
    ModelNotTrusted
        If there is none, or it is none of ours.
    """
    try:
        values = json.loads((folder / SIGNATURE_FILE).read_bytes())
    except FileNotFoundError:
        raise ModelNotTrusted(
            f"model: found no {SIGNATURE_FILE}, needed a signed model; register it with "
            "`consilium study run`"
        ) from None
    except (OSError, ValueError, RecursionError):
        values = None
    if not _is_signature(values):
        raise ModelNotTrusted(
            f"model: found {SIGNATURE_FILE} damaged, needed it as it was signed; fetch the model "
            "anew from the coordinator"
        )
    return ModelSignature(**{x: values[x] for x in _FIELDS - {"what"}})


def trusted_keys(root: Path) -> frozenset[str]:
    """Keys whose models count in a folder of a study, at a site or at the coordinator.

    They are the coordinator's: of ``consortium.json``, in the folder or in a kit of it, and in the
    coordinator's own folder its key and those that it had before; never one that was revoked.

    Raises
    ------
    ModelNotTrusted
        If a ``consortium.json`` cannot be read.
    """
    files = [root / CONSORTIUM_FILE, *sorted(root.glob(f"kits/*/{CONSORTIUM_FILE}"))]
    try:
        known = [read_consortium(path) for path in files if path.is_file()]
    except ValueError as error:
        raise ModelNotTrusted(str(error)) from None
    revoked = {key for consortium in known for key in consortium.revoked}
    own = {*former_keys(root / COORDINATOR), public_key(root / COORDINATOR) or ""} - {""}
    return frozenset(({consortium.coordinator for consortium in known} | own) - revoked)


def keys_of_environment() -> frozenset[str]:
    """Keys that count for a model which MLflow loads by itself.

    Those of ``CONSILIUM_MODEL_KEYS`` where it is set, 64 hex digits each with commas between; else
    those of the study's folder, ``CONSILIUM_ROOT`` or the working folder. Without any nothing is
    loaded: a signature by a key that nobody here knows says nothing.
    """
    within = _TRUSTED.get()
    if within is not None:
        return within
    given = os.environ.get(KEYS_VARIABLE)
    if given is not None:
        keys = [x.strip() for x in given.split(",") if x.strip()]
        if not all(_KEY.fullmatch(x) for x in keys):
            raise ModelNotTrusted(
                f"{KEYS_VARIABLE}: found what is no public key, needed 64 hex digits each, with "
                "commas between"
            )
        return frozenset(keys)
    return trusted_keys(Path(os.environ.get(_ROOT_VARIABLE, ".")))


@contextmanager
def trusting(keys: Collection[str]) -> Iterator[None]:
    """Let only these keys count for models that MLflow loads within the block."""
    token = _TRUSTED.set(frozenset(keys))
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def load_signed(uri: str, workspace: Workspace) -> PyFuncModel:
    """Load a registered model after verifying it; none of its code runs before.

    Parameters
    ----------
    uri
        ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``, or the path of a model's folder.
    workspace
        Folder of a study: where MLflow keeps the models, and whose keys count.

    Raises
    ------
    ModelNotTrusted
        If it is altered, unsigned or signed by somebody else.
    """
    with TemporaryDirectory() as copy:
        # A copy of our own, so that nobody changes it between the check and the loading.
        folder = fetch_model(uri, workspace, into=Path(copy))
        return load_folder(folder, keys_of(workspace))


def load_folder(folder: Path, keys: Collection[str]) -> PyFuncModel:
    """Load a model from a folder that nobody else writes to, after verifying it.

    Raises
    ------
    ModelNotTrusted
        If it is altered, unsigned or signed by somebody else.
    """
    pyfunc = quietly_imported("mlflow.pyfunc")
    verify_model(folder, keys)
    with trusting(keys):
        model: PyFuncModel = pyfunc.load_model(str(folder))
        return model


def keys_of(workspace: Workspace) -> frozenset[str]:
    """Keys whose models count: of ``CONSILIUM_MODEL_KEYS`` where it is set, or of the folder.

    Raises
    ------
    ModelNotTrusted
        If the variable or a ``consortium.json`` cannot be read.
    """
    given = os.environ.get(KEYS_VARIABLE)
    return trusted_keys(workspace.root) if given is None else keys_of_environment()


def fetch_model(uri: str, workspace: Workspace, *, into: Path) -> Path:
    """Copy a registered model's folder, unverified, and give the copy's path."""
    artifacts = quietly_imported("mlflow.artifacts")
    with tracking_at(workspace.mlflow_uri):
        source = model_folder(uri, workspace)
        found = artifacts.download_artifacts(uri if source is None else str(source), dst_path=into)
    return Path(found)


def _is_signature(values: Any) -> bool:
    if not isinstance(values, dict) or set(values) != _FIELDS or values["what"] != _WHAT:
        return False
    files = values["files"]
    texts = [values["study"], values["run"], values["signed_by"], values["signature"]]
    return (
        all(isinstance(x, str) for x in texts)
        and isinstance(files, dict)
        and all(isinstance(x, str) for x in files.values())
        and _KEY.fullmatch(values["signed_by"]) is not None
        and _SIGNATURE.fullmatch(values["signature"]) is not None
    )


def _text(study: str, run: str, files: Mapping[str, str], signed_by: str) -> bytes:
    return canonical_json(
        {"what": _WHAT, "study": study, "run": run, "files": dict(files), "signed_by": signed_by}
    )


def _digests(folder: Path) -> dict[str, str]:
    files = (x for x in folder.rglob("*") if x.is_symlink() or not x.is_dir())
    names = (x.relative_to(folder).as_posix() for x in files)
    # A link is never what was signed, wherever it leads.
    return {
        name: "link" if (folder / name).is_symlink() else digest_path(folder / name)
        for name in sorted(names)
        if name not in (SIGNATURE_FILE, ADDED_BY_MLFLOW)
    }


def unknown_signer(signed_by: str, trusted: Collection[str]) -> str:
    """Say that something was signed by a key that does not count here."""
    if not trusted:
        return (
            "model: found no key to trust, needed the public key of the study's coordinator; put "
            "the start-up kit below kits/ of the study's folder, name that folder in "
            f"{_ROOT_VARIABLE}, or the key in {KEYS_VARIABLE}"
        )
    return (
        f"model: found it signed by {signed_by[:12]}, needed the study's coordinator "
        f"({', '.join(sorted(x[:12] for x in trusted))}); fetch the model anew from the coordinator"
    )
