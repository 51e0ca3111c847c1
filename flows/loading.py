"""What a site made of its cohort, read back from its disk: inputs and trained encoders."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from flows.inputs import LocalEncoder, site_inputs
from flows.sealed import note
from flows.snapshots import released
from flows.versions import source_digest
from modalities.cohort import DataError, read_cohort
from modalities.files import fingerprint

if TYPE_CHECKING:
    from pathlib import Path

    from flows.inputs import SiteInputs
    from flows.protocol import StudyProtocol
    from flows.snapshots import Released
    from infra.settings import SiteSettings


def load_inputs(
    settings: SiteSettings,
    protocol: StudyProtocol,
    *,
    roster: tuple[str, ...] = (),
    snapshot: Released | None = None,
) -> SiteInputs:
    """Read the site's released cohort as encoders and federation see it.

    Parameters
    ----------
    roster
        Names of the sites whose sums it may go into; none for training at the site.
    snapshot
        What was released already; what may be released now where None.

    Raises
    ------
    DataError
        If there is no cohort, it was prepared under another protocol, or none may be released.
    """
    snapshot = released(settings, protocol, roster=roster) if snapshot is None else snapshot
    cohort = read_cohort(snapshot.cohort)
    if str(cohort.uns["protocol_fingerprint"]) != protocol.fingerprint():
        raise DataError(
            "other_protocol",
            "cohort: found one of another protocol; run `consilium site prepare` again",
        )
    return site_inputs(
        cohort,
        protocol,
        site=settings.name,
        features=snapshot.features,
        secret=settings.key,
    )


def encoder_parts(cohort: str, protocol: StudyProtocol) -> dict[str, str]:
    """Fingerprints of what a trained encoder depends on, kept to say later what has changed."""
    code = source_digest("fusion", "modalities")
    return {"cohort": cohort, "protocol": protocol.fingerprint(), "code": code}


def encoder_key(cohort: str, protocol: StudyProtocol, modality: str) -> str:
    """Fingerprint of everything that a trained encoder depends on: cohort, protocol and code."""
    parts = encoder_parts(cohort, protocol)
    return fingerprint([parts["cohort"], parts["protocol"], modality, parts["code"]])


def about_encoder(folder: Path) -> dict[str, Any] | None:
    """Read which cohort, protocol and code a trained encoder belongs to; None without one."""
    try:
        about = json.loads((folder / "encoder.json").read_text())
        whole = not about["trained"] or (folder / "encoder.safetensors").is_file()
        return about if whole and {"key", "reason"} <= set(about) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _kept(folder: Path, key: str, *, weights: bool) -> LocalEncoder | None:
    about = about_encoder(folder)
    if about is None or about["key"] != key:
        return None
    try:
        log_hazard = np.load(folder / "log_hazard.npy")
        if not about["trained"]:
            return LocalEncoder(None, log_hazard, about["reason"])
        if not weights:
            return LocalEncoder(None, log_hazard)
        from fusion.encoders import FittedEncoder  # torch takes seconds to import

        content = (folder / "encoder.safetensors").read_bytes()
        return LocalEncoder(FittedEncoder.from_bytes(content), log_hazard)
    except (OSError, ValueError) as error:
        note(error)
        return None


def load_encoders(
    settings: SiteSettings, protocol: StudyProtocol, inputs: SiteInputs, *, weights: bool = True
) -> dict[str, LocalEncoder]:
    """Read the encoders that this cohort was trained to; missing ones are absent.

    Parameters
    ----------
    weights
        Whether the networks are wanted, or only what they say of the patients, which is quick.
    """
    found = {}
    for modality in protocol.modalities:
        folder = settings.path("encoders", modality)
        key = encoder_key(inputs.cohort, protocol, modality)
        kept = _kept(folder, key, weights=weights)
        if kept is not None:
            found[modality] = kept
    return found
