"""What a version of a model was made from and what belongs to it, in one signed statement.

It is the run's artifact ``lineage.json``, and its signature is a tag of the version. Everything in
it is public to the consortium: of a site's data its keyed digest, of an encoder that never leaves a
site the word ``local``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from flows.reports import is_external
from flows.versions import CODE, lock_digest, source_digest
from fusion.keys import canonical_json, digest, verify
from modalities.files import digest_path

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from flows.model_signing import ModelSignature
    from flows.records import StudyRecord
    from fusion.keys import SigningKey

LINEAGE_FILE: Final = "lineage.json"
LOCAL: Final = "local"
_WHAT: Final = "consilium lineage"


class LineageError(ValueError):
    """A lineage that cannot be read, or a model that the registry does not have."""


@dataclass(frozen=True)
class Provenance:
    """Where a version comes from; digests are SHA-256, 64 hex digits.

    Attributes
    ----------
    study, run
        Names of the study and of its run.
    protocol, protocol_file
        Fingerprint of the protocol, and digest of the bytes of ``study.toml``.
    commit, code, lock
        Git commit or version of the package, digest of our sources, digest of the locked
        dependencies.
    encoders
        Per modality the digest of the numbers that the sites share, or ``local``.
    cohorts
        Per site the digest of its cohort under its own secret.
    external
        Sites that evaluated and did not train.
    model
        Digest of the signature file's content: of every file of the model.
    artifacts
        Digest of each artifact of the run.
    signed_by, signature
        Public key of who signed the statement, and the signature; both empty where nobody did.
    """

    study: str
    run: str
    protocol: str
    protocol_file: str
    commit: str
    code: str
    lock: str
    encoders: Mapping[str, str]
    cohorts: Mapping[str, str]
    external: tuple[str, ...]
    model: str
    artifacts: Mapping[str, str]
    signed_by: str = ""
    signature: str = ""

    def text(self) -> bytes:
        """Bytes that are signed."""
        return canonical_json({"what": _WHAT, **asdict(replace(self, signature=""))})

    def is_signed(self) -> bool:
        """Whether the signature is that of the key it names."""
        return bool(self.signature) and verify(
            self.signed_by, bytes.fromhex(self.signature), self.text()
        )

    def tags(self) -> dict[str, str]:
        """Tags of the version, by which the registry's page shows the same."""
        found = {
            "consilium.protocol": self.protocol,
            "consilium.source": self.code,
            "consilium.lock": self.lock,
            "consilium.encoders": "; ".join(f"{k} {v}" for k, v in self.encoders.items()),
            "consilium.signed_by": self.signed_by,
            "consilium.signature": self.signature,
        }
        return {name: value for name, value in found.items() if value}


def provenance_of(
    record: StudyRecord, *, study_file: Path | None, model: ModelSignature | None, artifacts: Path
) -> Provenance:
    """State where a run's model comes from.

    Parameters
    ----------
    study_file
        The protocol as the coordinator keeps it.
    model
        Signature of the model's folder.
    artifacts
        Folder of everything that is logged with the run.
    """
    sites = [site for site in record.fitted.sites if site.cohort]
    return Provenance(
        study=record.protocol.study.name,
        run=record.run,
        protocol=record.protocol.fingerprint(),
        protocol_file="" if study_file is None else digest_path(study_file),
        commit=record.code_version,
        code=source_digest(*CODE),
        lock=lock_digest(),
        encoders=encoder_digests(record),
        cohorts={site.site: site.cohort for site in sites},
        external=tuple(site.site for site in sites if is_external(site)),
        model="" if model is None else digest(model.text()),
        artifacts={
            path.relative_to(artifacts).as_posix(): digest_path(path)
            for path in sorted(artifacts.rglob("*"))
            if path.is_file()
        },
    )


def encoder_digests(record: StudyRecord) -> dict[str, str]:
    """Digest the numbers of each encoder that the sites share; those that stay are ``local``."""
    shared: dict[str, Any] = {
        name: encoder.to_dict() for name, encoder in record.fitted.encoders.items()
    } | {name: weights.tolist() for name, weights in record.fitted.networks.items()}
    return {
        name: digest(canonical_json(shared[name])) if name in shared else LOCAL
        for name in record.protocol.modalities
    }


def signed(provenance: Provenance, key: SigningKey) -> Provenance:
    """Sign a statement."""
    named = replace(provenance, signed_by=key.public)
    return replace(named, signature=key.sign(named.text()).hex())


def write_provenance(provenance: Provenance, path: Path) -> None:
    """Write a statement as JSON."""
    values = {"what": _WHAT, **asdict(provenance)}
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_provenance(path: Path) -> Provenance:
    """Read a statement; its signature is not checked.

    Raises
    ------
    LineageError
        If it is missing or none of ours.
    """
    try:
        values = json.loads(path.read_bytes())
        if values.pop("what") != _WHAT:
            raise ValueError
        found = Provenance(**{**values, "external": tuple(values["external"])})
        found.text()
        bytes.fromhex(found.signature)
    except FileNotFoundError:
        raise LineageError(
            f"{LINEAGE_FILE}: found none with this version, needed the one that its registration "
            "wrote; run the study again with this release"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise LineageError(
            f"{LINEAGE_FILE}: found it changed, needed it as it was signed; restore it from a "
            "backup"
        ) from None
    return found
