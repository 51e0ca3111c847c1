from __future__ import annotations

import hashlib
import hmac
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.keys import (
    Agreement,
    KeyFault,
    SigningKey,
    canonical_json,
    digest,
    expand,
    key_stream,
    verify,
)

KEY = SigningKey(bytes(range(32)))
# Points of RFC 7748's curve, and of its twist, whose product with any key is the same.
LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    *((2**255 - 19 + i).to_bytes(32, "little") for i in (-1, 0, 1)),
]


def test_signatures_are_those_of_rfc_8032():
    key = SigningKey(
        bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    )
    assert key.public == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert key.sign(b"").hex() == (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )


def test_a_key_comes_back_from_its_bytes_and_no_two_are_alike():
    made = SigningKey.generate()
    assert SigningKey(made.to_bytes()).public == made.public
    assert SigningKey.generate().public != made.public


@pytest.mark.parametrize("n_bytes", [0, 31, 33, 64])
def test_a_seed_of_another_length_is_no_key(n_bytes: int):
    with pytest.raises(KeyFault, match=f"found {n_bytes} bytes, needed 32"):
        SigningKey(bytes(n_bytes))


@pytest.mark.border
@given(data=st.binary(max_size=64), at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_one_changed_bit_breaks_a_signature(data: bytes, at: int, bit: int):
    signature = KEY.sign(data)
    assert verify(KEY.public, signature, data)

    def flipped(raw: bytes) -> bytes:
        i = at % len(raw)
        return raw[:i] + bytes([raw[i] ^ 1 << bit]) + raw[i + 1 :]

    assert not verify(KEY.public, flipped(signature), data)
    assert not verify(flipped(bytes.fromhex(KEY.public)).hex(), signature, data)
    assert not verify(KEY.public, signature, data + b"\0")
    if data:
        assert not verify(KEY.public, signature, flipped(data))


@pytest.mark.border
@pytest.mark.parametrize("public", ["", "zz" * 32, "00" * 31, "00" * 33, "é" * 64])
def test_what_is_no_key_verifies_nothing(public: str):
    assert not verify(public, KEY.sign(b"data"), b"data")
    assert not verify(KEY.public, b"", b"data")
    assert not verify(SigningKey.generate().public, KEY.sign(b"data"), b"data")


def test_two_parties_agree_on_what_nobody_else_knows():
    one, other, third = Agreement(), Agreement(), Agreement()
    key = one.shared_key(other.public, info=b"pair")
    assert key == other.shared_key(one.public, info=b"pair")
    assert len(key) == 32
    assert key not in {
        third.shared_key(one.public, info=b"pair"),
        third.shared_key(other.public, info=b"pair"),
        one.shared_key(other.public, info=b"another"),
    }


@pytest.mark.border
@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda p: p.hex()[:8])
def test_a_key_that_agrees_with_everybody_is_refused(point: bytes):
    with pytest.raises(KeyFault, match="no public key") as refused:
        Agreement().shared_key(point, info=b"")
    assert point.hex() not in str(refused.value)


@pytest.mark.parametrize("n_bytes", [0, 31, 33])
def test_bytes_of_another_length_are_no_public_key(n_bytes: int):
    with pytest.raises(KeyFault, match="no public key"):
        Agreement().shared_key(bytes([9] * n_bytes), info=b"")


def test_expansion_is_that_of_rfc_5869():
    assert expand(bytes([0x0B] * 22), info=b"").hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
    )


@given(secret=st.binary(min_size=1, max_size=64), info=st.binary(max_size=200))
def test_expansion_is_hmac_over_the_info(secret: bytes, info: bytes):
    extracted = hmac.digest(bytes(32), secret, "sha256")
    assert expand(secret, info=info) == hmac.digest(extracted, info + b"\x01", "sha256")


def test_a_key_stream_is_that_of_rfc_8439():
    expected = bytes.fromhex(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    words = key_stream(bytes(32), 8)
    assert words.dtype == np.uint64
    assert words.astype("<u8").tobytes() == expected


@given(key=st.binary(min_size=32, max_size=32), n=st.integers(0, 100), more=st.integers(0, 100))
def test_a_longer_stream_starts_like_a_shorter_one(key: bytes, n: int, more: int):
    np.testing.assert_array_equal(key_stream(key, n), key_stream(key, n + more)[:n])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, width=32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
).filter(lambda value: "Infinity" not in json.dumps(value))


@given(value=VALUES)
def test_canonical_json_reads_back_and_writes_the_same_again(value: object):
    written = canonical_json(value)
    assert json.loads(written) == value
    assert canonical_json(json.loads(written)) == written
    assert written.isascii()


@pytest.mark.border
@given(items=st.dictionaries(st.text(), st.integers(), max_size=5), random=st.randoms())
def test_the_order_of_entries_does_not_matter(items: dict[str, int], random):
    shuffled = list(items.items())
    random.shuffle(shuffled)
    assert canonical_json(dict(shuffled)) == canonical_json(items)


@pytest.mark.border
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_not_written(number: float):
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": [number]})


def test_digest_is_sha_256():
    assert digest(b"") == hashlib.sha256().hexdigest()
    assert digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
