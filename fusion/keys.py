"""Signatures, key agreement, key streams, certificates; the only file that knows cryptography.

A party is known by its Ed25519 public key, written as 64 hex digits.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

if TYPE_CHECKING:
    from datetime import datetime

    from numpy.typing import NDArray

KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64


class KeyFault(ValueError):
    """Bytes that are no key, or a key that nobody can agree with; the text holds neither."""


class SigningKey:
    """An Ed25519 private key.

    Parameters
    ----------
    seed
        32 bytes, as :meth:`to_bytes` gives them.

    Raises
    ------
    KeyFault
        If they are not 32 bytes.
    """

    def __init__(self, seed: bytes) -> None:
        if len(seed) != KEY_BYTES:
            raise KeyFault(f"signing key: found {len(seed)} bytes, needed {KEY_BYTES}")
        self._key = Ed25519PrivateKey.from_private_bytes(seed)

    @classmethod
    def generate(cls) -> SigningKey:
        """Make a new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    @property
    def public(self) -> str:
        """Public half as 64 hex digits."""
        return self._key.public_key().public_bytes_raw().hex()

    def to_bytes(self) -> bytes:
        """32 secret bytes."""
        return self._key.private_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """64 bytes that only this key can make for ``data``."""
        return self._key.sign(data)


def verify(public: str, signature: bytes, data: bytes) -> bool:
    """Whether ``signature`` over ``data`` was made by the key whose public half this is."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, data)
    except (ValueError, InvalidSignature):
        return False
    return True


class Agreement:
    """One party's ephemeral X25519 key: never written anywhere, gone with the object."""

    def __init__(self) -> None:
        self._key = X25519PrivateKey.generate()

    @property
    def public(self) -> bytes:
        """32 bytes for the peers."""
        return self._key.public_key().public_bytes_raw()

    def shared_key(self, peer: bytes, *, info: bytes) -> bytes:
        """32 bytes that only this party and the peer know, bound to ``info`` by HKDF-SHA-256.

        Raises
        ------
        KeyFault
            If the peer's bytes are no key or one of the few that agree with everybody.
        """
        try:
            secret = self._key.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError:
            raise KeyFault("key agreement: found bytes that are no public key") from None
        return expand(secret, info=info)


def expand(secret: bytes, *, info: bytes) -> bytes:
    """32 bytes from a secret, bound to ``info`` (HKDF-SHA-256, RFC 5869)."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def key_stream(key: bytes, n_words: int) -> NDArray[np.uint64]:
    """(n_words,) words of ChaCha20's stream; a key must serve one stream only, its nonce is 0."""
    zeros = bytes(8 * n_words)
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(zeros)
    return np.frombuffer(stream, dtype="<u8")


def certificate_dates(pem: bytes) -> tuple[datetime, datetime]:
    """First and last moment (UTC) at which an X.509 certificate counts.

    Raises
    ------
    KeyFault
        If the bytes are no certificate in PEM form.
    """
    try:
        found = x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise KeyFault("certificate: found bytes that are none, needed one in PEM form") from None
    return found.not_valid_before_utc, found.not_valid_after_utc


def certificate_expiry(pem: bytes) -> datetime:
    """Last moment (UTC) at which an X.509 certificate counts.

    Raises
    ------
    KeyFault
        If the bytes are no certificate in PEM form.
    """
    return certificate_dates(pem)[1]


def canonical_json(value: Any) -> bytes:
    """One way of writing plain values as JSON: sorted keys, no spaces, ASCII, finite numbers.

    Raises
    ------
    ValueError
        If a number is not finite.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def digest(data: bytes) -> str:
    """SHA-256 as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()
