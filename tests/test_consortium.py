from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.federation.consortium import (
    CONSORTIUM_FILE,
    COORDINATOR,
    Consortium,
    read_consortium,
)
from fusion.keys import canonical_json, digest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.border

CONSORTIUM = Consortium(
    study="lung-os",
    coordinator="c" * 64,
    sites={"site-02": "b" * 64, "site-01": "a" * 64},
    quorum=2,
    revoked=("b" * 64, "d" * 64),
)


def written(folder: Path, data: bytes) -> Path:
    path = folder / CONSORTIUM_FILE
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_what_is_written_is_read(tmp_path: Path, end: bytes) -> None:
    found = read_consortium(written(tmp_path, CONSORTIUM.to_bytes() + end))
    assert found == CONSORTIUM
    assert found.digest() == digest(CONSORTIUM.to_bytes())
    assert json.loads(found.to_bytes()) == {
        "study": "lung-os", "coordinator": "c" * 64, "quorum": 2,
        "sites": {"site-01": "a" * 64, "site-02": "b" * 64}, "revoked": ["b" * 64, "d" * 64],
    }  # fmt: skip


def test_a_party_is_known_by_a_key_that_is_in_force() -> None:
    assert CONSORTIUM.public(COORDINATOR) == "c" * 64
    assert CONSORTIUM.public("site-01") == "a" * 64
    assert [CONSORTIUM.knows(x) for x in (COORDINATOR, "site-01", "site-02", "site-03")] == [
        True, True, False, False,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="site-02: found a revoked key"):
        CONSORTIUM.public("site-02")
    with pytest.raises(ValueError, match="does not list"):
        CONSORTIUM.public("site-03")
    assert not replace(CONSORTIUM, revoked=("c" * 64,)).knows(COORDINATOR)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"study": "Lung OS"}, "study: needed"),
        ({"study": 3}, "study: needed"),
        ({"sites": {"site-01": "a" * 64}}, "sites: found 1, needed 2"),
        ({"sites": {COORDINATOR: "a" * 64, "site-02": "b" * 64}}, "sites: needed names"),
        ({"sites": {"../a": "a" * 64, "site-02": "b" * 64}}, "sites: needed names"),
        ({"sites": {"site-01": "a" * 63, "site-02": "b" * 64}}, "needed 64 hex digits"),
        ({"sites": {"site-01": "A" * 64, "site-02": "b" * 64}}, "needed 64 hex digits"),
        ({"sites": {"site-01": "a" * 64, "site-02": "a" * 64}}, "found one twice"),
        ({"coordinator": "a" * 64}, "found one twice"),
        ({"coordinator": None}, "needed 64 hex digits"),
        ({"revoked": ["d" * 64, "d" * 64]}, "found one twice"),
        ({"revoked": ["d"]}, "needed 64 hex digits"),
        ({"revoked": "d" * 64}, "list of revoked keys"),
        ({"sites": [1, 2]}, "object of sites"),
        ({"quorum": 0}, "quorum: needed"),
        ({"quorum": 3}, "quorum: needed"),
        ({"quorum": True}, "quorum: needed"),
        ({"quorum": 1.0}, "quorum: needed"),
        ({"more": 1}, "exactly the keys"),
    ],
)
def test_an_impossible_consortium_is_refused(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    values = json.loads(CONSORTIUM.to_bytes()) | changes
    with pytest.raises(ValueError, match=text) as found:
        read_consortium(written(tmp_path, canonical_json(values)))
    assert str(found.value).startswith(f"{CONSORTIUM_FILE}: ")


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"[" * 100_000, b"\xff"])
def test_a_file_that_is_no_consortium_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"consortium\.json: needed"):
        read_consortium(written(tmp_path, data))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"consortium\.json: found no such file"):
        read_consortium(tmp_path / CONSORTIUM_FILE)
    with pytest.raises(ValueError, match="needed a readable file"):
        read_consortium(tmp_path)


@pytest.mark.border
@given(at=st.integers(0, len(CONSORTIUM.to_bytes())), mask=st.integers(1, 255))
@settings(max_examples=100, deadline=None)
def test_one_changed_byte_is_another_consortium_or_none(
    tmp_path_factory: pytest.TempPathFactory, at: int, mask: int
) -> None:
    data = bytearray(CONSORTIUM.to_bytes() + b"\n")
    data[at] ^= mask
    try:
        found = read_consortium(written(tmp_path_factory.getbasetemp(), bytes(data)))
    except ValueError:
        return
    assert found.digest() != CONSORTIUM.digest()
