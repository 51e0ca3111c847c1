"""A person's decision over a promotion: what is signed, whose keys count, what a quorum says.

Nothing here talks to a server. Who decides is known by an Ed25519 key: a name that somebody types
proves nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from flows.identity import public_key
from fusion.federation.consortium import (
    CONSORTIUM_FILE,
    COORDINATOR,
    HEX_DIGEST,
    PARTY_NAME,
    matches,
    read_consortium,
)
from fusion.keys import SIGNATURE_BYTES, canonical_json, digest, verify
from modalities.files import replacing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from flows.policy import PromotionPolicy
    from fusion.keys import SigningKey

Choice = Literal["approve", "reject"]
Fault = Literal["unknown_key", "wrong_signature", "unknown_reason", "already_decided"]

PROMOTIONS: Final = "promotions"
APPROVERS_FILE: Final = "approvers.json"
NO_REASON: Final = "none"
_SIGNATURE: Final = re.compile(rf"[0-9a-f]{{{2 * SIGNATURE_BYTES}}}")
_REASON: Final = re.compile(r"[A-Za-z0-9 ,.;:%()/+-]{0,200}")
# Anything longer may be a patient's number or a date of birth.
_LONG_NUMBER: Final = re.compile(r"\d{4}")


class DecisionRefused(ValueError):
    """A decision, or a list of who may decide, that cannot be used; says why."""


class PromotionRefused(RuntimeError):
    """A version that cannot be promoted as asked; says why."""

    code = "promotion_refused"


@dataclass(frozen=True)
class Request:
    """What is decided over; every field goes into the signature.

    Attributes
    ----------
    model
        Digest of the model's files.
    run
        The study run that made it.
    gates
        Digest of what the gates found.
    flow_run
        The run of the flow ``promote`` that waits.
    """

    study: str
    version: int
    model: str
    run: str
    gates: str
    flow_run: str


@dataclass(frozen=True)
class Signed:
    """A decision as it comes back, signed.

    Attributes
    ----------
    reason
        Code from the policy's list; ``none`` for an approval.
    reason_digest
        SHA-256 of what the person wrote beside it, which stays here; empty without any.
    approver
        Public key, 64 hex digits.
    signature
        128 hex digits over :func:`decision_text`.
    """

    decision: Choice
    reason: str
    reason_digest: str
    approver: str
    signature: str


@dataclass(frozen=True)
class Tally:
    """What the decisions so far come to.

    Attributes
    ----------
    outcome
        None while the quorum is not reached.
    counted
        Those that stand, one per party.
    faults
        Per position among all decisions, why one does not count.
    """

    outcome: Choice | None
    counted: tuple[Signed, ...]
    faults: Mapping[int, Fault]


def decision_text(request: Request, decision: Choice, *, reason: str, reason_digest: str) -> bytes:
    """Bytes that a decision's signature is over."""
    values = asdict(request) | {
        "kind": "promotion",
        "decision": decision,
        "reason": reason,
        "reason_digest": reason_digest,
    }
    return canonical_json(values)


def sign_decision(
    request: Request,
    decision: Choice,
    key: SigningKey,
    *,
    reason: str = NO_REASON,
    text: str = "",
) -> Signed:
    """Decide in the name of a key.

    Parameters
    ----------
    text
        What the person wrote; its digest is signed, the text stays.

    Raises
    ------
    DecisionRefused
        If the text is too long, or may hold a number of a patient.
    """
    written = digest(check_reason_text(text).encode()) if text else ""
    signed = decision_text(request, decision, reason=reason, reason_digest=written)
    return Signed(decision, reason, written, key.public, key.sign(signed).hex())


def check_reason_text(text: str) -> str:
    """Give a reason that may be kept beside a model's version.

    Raises
    ------
    DecisionRefused
        If it is none: at most 200 plain characters, no number of four digits or more.
    """
    if not _REASON.fullmatch(text) or _LONG_NUMBER.search(text):
        raise DecisionRefused(
            "--reason: needed at most 200 letters, digits and , . ; : % ( ) / + - in it, and no "
            "number of four digits or more, because it is kept beside the model"
        )
    return text


def fault_of(
    signed: Signed, request: Request, *, deciders: Mapping[str, str], policy: PromotionPolicy
) -> Fault | None:
    """Why a decision does not count, or None.

    Parameters
    ----------
    deciders
        Name per public key that may decide.
    """
    if signed.approver not in deciders:
        return "unknown_key"
    rejected = signed.decision == "reject"
    if (signed.reason not in policy.reasons) if rejected else (signed.reason != NO_REASON):
        return "unknown_reason"
    if not matches(_SIGNATURE, signed.signature):
        return "wrong_signature"
    text = decision_text(
        request, signed.decision, reason=signed.reason, reason_digest=signed.reason_digest
    )
    known = verify(signed.approver, bytes.fromhex(signed.signature), text)
    return None if known else "wrong_signature"


def tally(
    request: Request,
    decisions: Sequence[Signed],
    *,
    deciders: Mapping[str, str],
    policy: PromotionPolicy,
) -> Tally:
    """Count decisions: one valid rejection ends it, approvals of different parties make a quorum.

    A party that changes its key has two of them for a while, and still one voice.
    """
    counted: dict[str, Signed] = {}
    faults: dict[int, Fault] = {}
    for at, signed in enumerate(decisions):
        fault = fault_of(signed, request, deciders=deciders, policy=policy)
        party = deciders.get(signed.approver, "")
        if fault is None and party in counted:
            fault = "already_decided"
        if fault is not None:
            faults[at] = fault
            continue
        counted[party] = signed
        if signed.decision == "reject":
            return Tally("reject", tuple(counted.values()), faults)
        if len(counted) >= policy.quorum:
            return Tally("approve", tuple(counted.values()), faults)
    return Tally(None, tuple(counted.values()), faults)


def deciders_of(root: Path) -> dict[str, str]:
    """Name of each party whose key may decide, by public key.

    They are the sites and the coordinator of the consortium, without revoked keys; the coordinator
    of this folder; and the oversight board of ``coordinator/approvers.json``, names to keys.

    Raises
    ------
    DecisionRefused
        If a file cannot be read.
    """
    home, found, revoked = root / COORDINATOR, {}, set[str]()
    own = public_key(home)
    if own:
        found[own] = COORDINATOR
    path = root / "kits" / COORDINATOR / CONSORTIUM_FILE
    if path.is_file():
        try:
            consortium = read_consortium(path)
        except ValueError as error:
            raise DecisionRefused(str(error)) from None
        found |= {key: site for site, key in consortium.sites.items()}
        found[consortium.coordinator] = COORDINATOR
        revoked = set(consortium.revoked)
    found |= {key: name for name, key in _board(home / APPROVERS_FILE).items()}
    return {key: name for key, name in found.items() if key not in revoked}


def _board(path: Path) -> dict[str, str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict) or not all(
        matches(PARTY_NAME, name) and matches(HEX_DIGEST, key) for name, key in values.items()
    ):
        raise DecisionRefused(
            f"{COORDINATOR}/{APPROVERS_FILE}: needed an object of short lower-case names and "
            "public keys of 64 hex digits"
        )
    return values


def write_request(root: Path, request: Request, table: str) -> Path:
    """Keep what is decided over where the coordinator's people read it; give the file."""
    path = _path(root, request.flow_run, ".json")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"request": asdict(request), "table": table}, indent=1))
    return path


def read_request(root: Path, flow_run: str) -> tuple[Request, str]:
    """Read what is decided over, and the table of its gates.

    Raises
    ------
    DecisionRefused
        If nothing is known of this run.
    """
    try:
        values = json.loads(_path(root, flow_run, ".json").read_text(encoding="utf-8"))
        return Request(**values["request"]), str(values["table"])
    except (OSError, ValueError, TypeError, KeyError):
        raise DecisionRefused(
            f"promotion: found no request of run {flow_run[:8]} in {COORDINATOR}/{PROMOTIONS}, "
            "needed the one that it wrote before it began to wait; start it again with "
            "`consilium promote`"
        ) from None


def keep_reason(root: Path, flow_run: str, text: str) -> None:
    """Keep what a person wrote beside a decision; it reaches no server."""
    with replacing(_path(root, flow_run, f".{digest(text.encode())[:16]}.txt")) as temporary:
        temporary.write_text(text, encoding="utf-8")


def kept_reason(root: Path, flow_run: str, reason_digest: str) -> str:
    """Read what a person wrote, if it is what was signed; else nothing."""
    if not reason_digest:
        return ""
    try:
        path = _path(root, flow_run, f".{reason_digest[:16]}.txt")
        text = path.read_text(encoding="utf-8")
        return check_reason_text(text) if digest(text.encode()) == reason_digest else ""
    except (OSError, ValueError):
        return ""


def _path(root: Path, flow_run: str, suffix: str) -> Path:
    return root / COORDINATOR / PROMOTIONS / f"{flow_run}{suffix}"


def form_values(signed: Signed) -> dict[str, Any]:
    """Give a decision as the waiting flow's form takes it."""
    return asdict(signed)
