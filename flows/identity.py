"""A party's signing key: made where the party is, and never anywhere else."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Final

from fusion.keys import KEY_BYTES, KeyFault, SigningKey
from modalities.files import replacing

if TYPE_CHECKING:
    from pathlib import Path

KEY_FILE: Final = "identity.key"
PUBLIC_FILE: Final = "identity.pub"


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
