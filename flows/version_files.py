"""The files of one version of a study's model: fetched from the registry, or out of one file.

``consilium model export`` writes them into a zip file, which the coordinator signs as a whole: what
a site needs to score its patients where it reaches no registry. Nothing in it is trusted before its
signatures were checked, and nothing of it is run before.
"""

from __future__ import annotations

import json
import stat
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from flows.mlflow_store import artifacts_below, tracking_at
from flows.model_signing import ADDED_BY_MLFLOW, SIGNATURE_FILE, fetch_model, unknown_signer
from flows.provenance import LINEAGE_FILE
from fusion.keys import canonical_json, verify
from modalities.files import digest_path, replacing

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from fusion.keys import SigningKey
    from infra.settings import Workspace

SUFFIX: Final = ".zip"
ENCODERS, NETWORKS, PROTOCOL = "encoders.json", "networks.json", "protocol.json"
CARD: Final = "model_card.md"
RUN_FILES: Final = (ENCODERS, NETWORKS, PROTOCOL, LINEAGE_FILE, CARD)
_ABOUT: Final = "version.json"
_MODEL, _RUN = "model", "run"
_WHAT: Final = "consilium model export"
_MOMENT: Final = (2020, 1, 1, 0, 0, 0)
# What is read before anybody vouches for it must not fill the disk.
_MAX_BYTES: Final = 1 << 30
_MAX_FILES: Final = 1000
_DAMAGE: Final = (
    zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, FileExistsError, NotADirectoryError,
    IsADirectoryError,
)  # fmt: skip


class ExportRefused(ValueError):
    """A file that is no exported model, or none that this study's coordinator exported."""


@dataclass(frozen=True)
class VersionFiles:
    """A version's files on this disk, and what is said of it.

    Attributes
    ----------
    aliases
        Under which the registry knows it, sorted; in an export, when that was made.
    registered_ms
        When it was registered, in milliseconds since 1970.
    model, run
        Folders of the signed model, and of what its run keeps beside it.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    registered_ms: int
    model: Path
    run: Path


def fetched(
    workspace: Workspace, client: MlflowClient, found: ModelVersion, into: Path
) -> VersionFiles:
    """Copy a registered version's files, unverified."""
    run, copy = into / _RUN, into / _MODEL
    for folder in (run, copy):
        folder.mkdir()
    model = fetch_model(f"models:/{found.name}/{found.version}", workspace, into=copy)
    here = artifacts_below(workspace.root, found.run_id)
    with tracking_at(workspace.mlflow_uri):
        for name in RUN_FILES:
            if here is None:
                client.download_artifacts(found.run_id, name, str(run))
            else:
                (run / name).write_bytes((here / name).read_bytes())
    return VersionFiles(
        name=str(found.name),
        version=int(found.version),
        aliases=tuple(sorted(found.aliases)),
        registered_ms=int(found.creation_timestamp),
        model=model,
        run=run,
    )


def write_export(files: VersionFiles, out: Path, key: SigningKey) -> None:
    """Write a version's files as one, signed; the same version gives the same bytes."""
    about = {
        "what": _WHAT,
        "name": files.name,
        "version": files.version,
        "aliases": list(files.aliases),
        "registered_ms": files.registered_ms,
        "lineage": digest_path(files.run / LINEAGE_FILE),
        "signed_by": key.public,
    }
    about["signature"] = key.sign(canonical_json(about)).hex()
    parts = {f"{_MODEL}/{name}": path for name, path in _files(files.model).items()}
    parts |= {f"{_RUN}/{name}": files.run / name for name in RUN_FILES}
    with replacing(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        _add(archive, _ABOUT, (json.dumps(about, indent=1, sort_keys=True) + "\n").encode())
        for name, path in parts.items():
            _add(archive, name, path.read_bytes())
    out.chmod(0o644)


def _files(folder: Path) -> dict[str, Path]:
    found = {x.relative_to(folder).as_posix(): x for x in sorted(folder.rglob("*")) if x.is_file()}
    return {name: path for name, path in found.items() if name != ADDED_BY_MLFLOW}


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, _MOMENT)
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    archive.writestr(entry, content, zipfile.ZIP_DEFLATED)


def exported(path: Path, trusted: Collection[str], into: Path) -> VersionFiles:
    """Unpack an exported version and check who vouches for it; its parts are not checked yet.

    Parameters
    ----------
    trusted
        Public keys of the coordinator, 64 hex digits each.

    Raises
    ------
    ExportRefused
        If it is no such file, is damaged, or was not signed by one of these keys.
    """
    with _opened(path) as archive:
        _unpack(archive, into)
    try:
        about = json.loads((into / _ABOUT).read_bytes())
        signed_by, signed = str(about["signed_by"]), _is_signed(about)
        files = _described(about, into)
        same = about["lineage"] == digest_path(files.run / LINEAGE_FILE)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _no_export() from None
    if not signed or not same:
        raise ExportRefused(
            f"--model: found {LINEAGE_FILE if signed else _ABOUT} in the file changed, needed it "
            "as it was signed; get the file anew from the coordinator"
        )
    if signed_by not in trusted:
        raise ExportRefused(unknown_signer(signed_by, trusted))
    return files


def _is_signed(about: dict[str, Any]) -> bool:
    text = {key: value for key, value in about.items() if key != "signature"}
    signature = bytes.fromhex(about["signature"])
    return about["what"] == _WHAT and verify(about["signed_by"], signature, canonical_json(text))


def _described(about: dict[str, Any], into: Path) -> VersionFiles:
    return VersionFiles(
        name=str(about["name"]),
        version=int(about["version"]),
        aliases=tuple(map(str, about["aliases"])),
        registered_ms=int(about["registered_ms"]),
        model=into / _MODEL,
        run=into / _RUN,
    )


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise ExportRefused(
            f"--model: found no file {path.name}, needed one that `consilium model export` wrote"
        ) from None
    except _DAMAGE:
        raise _no_export() from None


def _no_export() -> ExportRefused:
    return ExportRefused(
        "--model: found a file that is no whole export, needed one that `consilium model export` "
        "wrote; get it anew from the coordinator"
    )


def _unpack(archive: zipfile.ZipFile, into: Path) -> None:
    entries = archive.infolist()
    if not _is_layout(entries):
        raise _no_export()
    for entry in entries:
        target = into / entry.filename
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(entry) as source:
            content = source.read(entry.file_size + 1)
        if len(content) != entry.file_size:  # more than the listing says
            raise _no_export()
        target.write_bytes(content)


def _is_layout(entries: Sequence[zipfile.ZipInfo]) -> bool:
    """Whether these are the files of an export, each once, of bearable size, none elsewhere."""
    names = [entry.filename for entry in entries]
    others = {name for name in names if not name.startswith(f"{_MODEL}/")}
    return (
        len(names) == len(set(names)) <= _MAX_FILES
        and sum(entry.file_size for entry in entries) <= _MAX_BYTES
        and others == {_ABOUT, *(f"{_RUN}/{name}" for name in RUN_FILES)}
        and f"{_MODEL}/{SIGNATURE_FILE}" in names
        and f"{_MODEL}/{ADDED_BY_MLFLOW}" not in names
        and all(_is_plain(name) for name in names)
    )


def _is_plain(name: str) -> bool:
    return "\\" not in name and name == PurePosixPath(name).as_posix() and ".." not in name
