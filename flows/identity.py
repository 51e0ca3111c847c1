"""A party's signing key: made where the party is, and never anywhere else."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from fusion.audit import LOG_FILE, AuditLog, is_signed_by, read_entries
from fusion.keys import KEY_BYTES, KeyFault, SigningKey
from modalities.files import replacing

if TYPE_CHECKING:
    from pathlib import Path

KEY_FILE: Final = "identity.key"
PUBLIC_FILE: Final = "identity.pub"
NEXT_FILE: Final = "identity-next.key"
_FORMER: Final = "identity-*.pub"


def identity(home: Path) -> SigningKey:
    """Read the party's key below ``home``; the first time, make it.

    Raises
    ------
    fusion.keys.KeyFault
        If the file holds no key, or others may read it.
    """
    path = home / KEY_FILE
    if not path.exists():
        _make(path)
    if path.stat().st_mode & 0o077:
        raise KeyFault(f"{KEY_FILE}: found a key that others may read, needed mode 600")
    found = path.read_bytes()
    if len(found) != KEY_BYTES:
        raise KeyFault(f"{KEY_FILE}: found {len(found)} bytes, needed {KEY_BYTES}; restore it")
    key = SigningKey(found)
    public = home / PUBLIC_FILE
    if not public.is_file() or public.read_text().strip() != key.public:
        with replacing(public) as temporary:
            temporary.write_text(key.public + "\n")
    return key


def _make(path: Path) -> None:
    """Write a new key for its owner only; of two that race, the first one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{KEY_FILE}.{secrets.token_hex(8)}.part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(SigningKey.generate().to_bytes())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        temporary.unlink(missing_ok=True)


def public_key(home: Path) -> str | None:
    """Public half of the party's key as 64 hex digits, or None where there is none yet."""
    try:
        return (home / PUBLIC_FILE).read_text().strip()
    except OSError:
        return None


@dataclass(frozen=True)
class Rotation:
    """A party's key before and after it was changed, as 64 hex digits each."""

    old: str
    new: str


def rotate(home: Path, *, party: str) -> Rotation:
    """Replace the party's key by a new one; its log goes on, signed by both at the change.

    The old private key is gone afterwards. Its public half stays as ``identity-YYYYMMDD.pub``, so
    that what it signed can still be read. After a kill in between, the same call goes on.

    Raises
    ------
    fusion.keys.KeyFault
        If there is no usable key to replace.
    fusion.audit.AuditError
        If the party's log is not as it was written.
    """
    if not (home / KEY_FILE).exists():
        raise KeyFault(f"{KEY_FILE}: found none to replace; make one with `consilium site key`")
    old = identity(home)
    waiting = home / NEXT_FILE
    if not waiting.exists():
        _make(waiting)
    new = SigningKey(waiting.read_bytes())
    _keep_public(home, old.public)
    _hand_over(home / LOG_FILE, party, old, new)
    waiting.replace(home / KEY_FILE)
    identity(home)  # which writes the new public half
    return Rotation(old.public, new.public)


def former_keys(home: Path) -> tuple[str, ...]:
    """Public halves of the keys that the party had before, oldest first."""
    return tuple(path.read_text().strip() for path in sorted(home.glob(_FORMER)))


def _keep_public(home: Path, public: str) -> None:
    if public in former_keys(home):
        return
    stem = f"identity-{datetime.now(UTC):%Y%m%d}"
    taken = len(list(home.glob(f"{stem}*.pub")))
    with replacing(home / (f"{stem}-{taken}.pub" if taken else f"{stem}.pub")) as temporary:
        temporary.write_text(public + "\n")


def _hand_over(path: Path, party: str, old: SigningKey, new: SigningKey) -> None:
    if not path.exists() or (read_entries(path) and is_signed_by(path, new.public)):
        return
    log = AuditLog(path, party=party, key=old)
    try:
        log.hand_over(new)
    finally:
        log.close()
