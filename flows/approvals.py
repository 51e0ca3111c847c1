"""Signed approvals: a site runs only what it and a quorum of its consortium have agreed to."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flows.protocol import load_protocol
from flows.versions import CODE, source_digest
from fusion.keys import SIGNATURE_BYTES, canonical_json, verify
from infra.settings import STUDY_FILE
from modalities.files import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from flows.protocol import StudyProtocol
    from fusion import messages as m
    from fusion.federation.consortium import Consortium
    from fusion.keys import SigningKey
    from fusion.privacy import Refusal

FOLDER: Final = "approvals"
_FIELDS: Final = {"statement", "site", "signature"}
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_SIGNATURE: Final = re.compile(rf"[0-9a-f]{{{2 * SIGNATURE_BYTES}}}")
_SITE: Final = re.compile(r"[a-z][a-z0-9-]{0,39}")


@dataclass(frozen=True)
class Statement:
    """What is approved; each field but the first is a SHA-256 of 64 hex digits.

    Parameters
    ----------
    study
        Name of the study.
    protocol
        Fingerprint of its ``study.toml``.
    code
        Digest of our sources, as installed at the party.
    consortium
        Digest of the consortium's file.
    settings
        Digest of the approving site's own limits, which are its alone.
    """

    study: str
    protocol: str
    code: str
    consortium: str
    settings: str


@dataclass(frozen=True)
class Approval:
    """A statement signed by a site; ``signature`` has 128 hex digits."""

    statement: Statement
    site: str
    signature: str

    def to_bytes(self) -> bytes:
        """Canonical JSON, the content of its file."""
        return canonical_json(asdict(self))


def statement_of(protocol: StudyProtocol, consortium: Consortium, *, settings: str) -> Statement:
    """State what a party would run now: this protocol with the code that is installed here.

    Parameters
    ----------
    settings
        Digest of the site's own limits.

    Raises
    ------
    ValueError
        If the consortium is one of another study.
    """
    if protocol.study.name != consortium.study:
        raise ValueError(
            f"study.name: found {protocol.study.name}, needed {consortium.study}, the study of "
            "this consortium"
        )
    return Statement(
        study=protocol.study.name,
        protocol=protocol.fingerprint(),
        code=source_digest(*CODE),
        consortium=consortium.digest(),
        settings=settings,
    )


def approve(statement: Statement, site: str, key: SigningKey) -> Approval:
    """Sign a statement in the name of a site; the same again gives the same bytes."""
    return Approval(statement, site, key.sign(_signed_text(statement, site)).hex())


def write_approval(approval: Approval, folder: Path) -> Path:
    """Write an approval to ``<folder>/<site>.json`` and give that path."""
    target = folder / f"{approval.site}.json"
    with replacing(target) as temporary:
        temporary.write_bytes(approval.to_bytes() + b"\n")
    return target


def read_approvals(folder: Path) -> list[Approval]:
    """Read every approval of a folder, sorted by site; their signatures are not checked here.

    Raises
    ------
    ValueError
        If a file is not exactly what :func:`write_approval` writes for the site of its name.
    """
    return [_read_approval(path) for path in sorted(folder.glob("*.json"))]


def check_approvals(
    statement: Statement, approvals: Iterable[Approval], *, site: str, consortium: Consortium
) -> Refusal | None:
    """Say why a site does not run what is stated, or None if it may.

    It may with its own approval of exactly this statement, and with a quorum of sites, itself
    included, that approved the same but for their own settings. Unknown sites, revoked keys and
    signatures of somebody else count for nothing, and a site for one however often it signed.

    Parameters
    ----------
    statement
        As :func:`statement_of` gives it at this site, now.
    """
    if (statement.study, statement.consortium) != (consortium.study, consortium.digest()):
        return "not_approved"
    valid = [a for a in approvals if _is_valid(a, consortium)]
    own = any(a.site == site and a.statement == statement for a in valid)
    alike = {
        a.site for a in valid if _without_settings(a.statement) == _without_settings(statement)
    }
    return None if own and len(alike) >= consortium.quorum else "not_approved"


def sites_that_approved(
    approvals: Iterable[Approval], *, protocol: str, consortium: Consortium
) -> set[str]:
    """Names of the sites whose valid approval is of this protocol in this consortium.

    Parameters
    ----------
    protocol
        Fingerprint of a ``study.toml``.
    """
    return {
        a.site
        for a in approvals
        if _is_valid(a, consortium)
        and (a.statement.study, a.statement.protocol, a.statement.consortium)
        == (consortium.study, protocol, consortium.digest())
    }


def permit(
    request: m.Introduce,
    *,
    statement: Statement,
    approvals: Iterable[Approval],
    site: str,
    consortium: Consortium,
) -> Refusal | None:
    """Say why a site turns a coordinator's introduction away, or None if it lets it in.

    Parameters
    ----------
    request
        Names protocol, code and consortium, and carries the approvals of other sites.
    statement
        As :func:`statement_of` gives it at this site, now.
    approvals
        Those that lie at this site; its own counts from here only.
    """
    if request.protocol != statement.protocol:
        return "wrong_protocol"
    if (request.code, request.consortium) != (statement.code, statement.consortium):
        return "not_approved"
    brought = approvals_of(statement, request.sites, request.settings, request.signatures)
    found = [*approvals, *(a for a in brought if a.site != site)]
    return check_approvals(statement, found, site=site, consortium=consortium)


def approval_fields(
    approvals: Sequence[Approval],
) -> tuple[tuple[str, ...], tuple[str, ...], NDArray[np.uint8]]:
    """Turn approvals into plain fields of a message: sites, settings, (n, 64) signatures."""
    signed = b"".join(bytes.fromhex(a.signature) for a in approvals)
    return (
        tuple(a.site for a in approvals),
        tuple(a.statement.settings for a in approvals),
        np.frombuffer(signed, dtype=np.uint8).reshape(-1, SIGNATURE_BYTES),
    )


def approvals_of(
    statement: Statement,
    sites: Sequence[str],
    settings: Sequence[str],
    signatures: NDArray[np.uint8],
) -> list[Approval]:
    """Turn plain fields of a message back into approvals of a statement, each with its settings.

    Whoever signed anything else has then signed something else, which :func:`check_approvals` sees.
    """
    return [
        Approval(replace(statement, settings=own), site, signature.tobytes().hex())
        for site, own, signature in zip(sites, settings, signatures, strict=True)
    ]


def approve_study(
    root: Path,
    site_home: Path,
    *,
    site: str,
    key: SigningKey,
    consortium: Consortium,
    settings: str,
    say: Callable[[str], None],
) -> Approval:
    """Show what a study would do at a site, and sign it in the site's name.

    Parameters
    ----------
    root
        Folder with ``study.toml``.
    site_home
        Gets ``approvals/<site>.json``.
    settings
        Digest of the site's own limits.
    say
        Told line by line what is approved.

    Raises
    ------
    ValueError
        If the protocol cannot be run, is of another consortium, or the consortium does not list
        this site with this key.
    """
    protocol = load_protocol(root / STUDY_FILE)
    statement = statement_of(protocol, consortium, settings=settings)
    if consortium.public(site) != key.public:
        raise ValueError(f"{site}: found another key than the consortium lists for it")
    for line in _described(protocol, statement, consortium):
        say(line)
    approval = approve(statement, site, key)
    write_approval(approval, site_home / FOLDER)
    return approval


def _described(protocol: StudyProtocol, statement: Statement, consortium: Consortium) -> list[str]:
    counts = ", ".join(f"{name} {value}" for name, value in protocol.privacy.model_dump().items())
    lowered = ", ".join(protocol.privacy.lowered())
    return [
        f"study: {statement.study}",
        f"protocol: {statement.protocol}",
        f"code: {statement.code}",
        f"settings of this site: {statement.settings}",
        f"sums: {protocol.federation.sums}",
        f"minimum counts: {counts}",
        *([f"lowered: {lowered}"] if lowered else []),
        f"sites: {', '.join(sorted(consortium.sites))}",
        f"revoked keys: {len(consortium.revoked)}",
        f"quorum: {consortium.quorum} of {len(consortium.sites)}",
    ]


def _signed_text(statement: Statement, site: str) -> bytes:
    return canonical_json({"statement": asdict(statement), "site": site})


def _without_settings(statement: Statement) -> Statement:
    return replace(statement, settings="")


def _is_valid(approval: Approval, consortium: Consortium) -> bool:
    if approval.site not in consortium.sites or not consortium.knows(approval.site):
        return False
    text = _signed_text(approval.statement, approval.site)
    return verify(consortium.public(approval.site), bytes.fromhex(approval.signature), text)


def _read_approval(path: Path) -> Approval:
    data = path.read_bytes()
    try:
        approval = _parsed(json.loads(data))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path.name}: found no approval; ask the site for its file") from None
    if path.stem != approval.site or data != approval.to_bytes() + b"\n":
        raise ValueError(
            f"{path.name}: found an approval in another form or of another site than its name "
            "says; ask the site for its file"
        )
    return approval


def _parsed(values: dict[str, Any]) -> Approval:
    stated = values["statement"]
    if set(values) != _FIELDS or set(stated) != {f.name for f in fields(Statement)}:
        raise ValueError("approval: needed exactly its fields")
    digests = [value for name, value in stated.items() if name != "study"]
    names = (stated["study"], values["site"])
    right = (
        all(_SITE.fullmatch(name) for name in names)
        and all(_DIGEST.fullmatch(value) for value in digests)
        and _SIGNATURE.fullmatch(values["signature"])
    )
    if not right:
        raise ValueError("approval: needed names, digests and a signature")
    return Approval(Statement(**stated), values["site"], values["signature"])
