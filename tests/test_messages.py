"""Messages: what was written is read, and nothing else is."""

from __future__ import annotations

import json
import struct
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusion import messages as m
from tests.strategies import KINDS, messages

pytestmark = pytest.mark.border

RUN = "0" * 64
TO_SITE = {
    m.Introduce, m.Describe, m.AskKey, m.SetKeys, m.AskPrivateSteps,
    m.AskMoments, m.SetScaling, m.AskProducts, m.SetComponents, m.AskSums,
    m.SetEncoders, m.AskUpdates, m.SetNetworks, m.AskEdges, m.SetGrid, m.AskIntervals,
    m.AskEvaluation,
}  # fmt: skip
SUMS = m.AskSums(RUN, 3, ("clinical", "clinical/0"), np.array([[1.0, 2.0], [3.0, 4.0]]))
REPLY = m.Sums(
    log_likelihood=np.array([-3.0]),
    gradient=np.zeros((1, 2)),
    information=np.zeros((1, 2, 2)),
    n_patients=np.array([60]),
    n_events=np.array([30]),
)


def _assert_same(left: m.Message, right: m.Message) -> None:
    assert type(left) is type(right)
    for part in fields(left):
        one, other = getattr(left, part.name), getattr(right, part.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype
            assert one.tobytes() == other.tobytes()
            assert one.shape == other.shape
        else:
            assert one == other
            assert type(one) is type(other)


def _reads_or_refuses(payload: bytes) -> m.Message | None:
    try:
        found = m.decode(payload)
    except m.MessageError:
        return None
    m.encode(found)  # what was read obeys the schema
    return found


def _bytes(header: Any, body: bytes = b"", *, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<5sI", b"CNSL1", len(text) if size is None else size) + text + body


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_message_comes_back_as_it_was(kind: type) -> None:
    @settings(max_examples=25, deadline=None)
    @given(message=messages(kind))
    def check(message: m.Message) -> None:
        _assert_same(m.decode(m.encode(message)), message)

    check()


@pytest.mark.parametrize("message", [SUMS, REPLY, m.Done(), m.Refused("small_cell")])
def test_every_truncation_and_any_tail_is_refused(message: m.Message) -> None:
    payload = m.encode(message)
    for length in range(len(payload)):
        with pytest.raises(m.MessageError):
            m.decode(payload[:length])
    with pytest.raises(m.MessageError, match="bytes too many"):
        m.decode(payload + b"\0")


@settings(max_examples=400, deadline=None)
@given(
    message=messages(), flips=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=4)
)
def test_flipped_bytes_are_read_by_the_schema_or_refused(
    message: m.Message, flips: list[tuple[int, int]]
) -> None:
    payload = bytearray(m.encode(message))
    for at, value in flips:
        payload[at % len(payload)] = value
    _reads_or_refuses(bytes(payload))


@settings(max_examples=200, deadline=None)
@given(payload=st.binary(max_size=200))
def test_noise_is_refused(payload: bytes) -> None:
    assert _reads_or_refuses(payload) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from([*(k.__name__ for k in KINDS), "Other"]),
    values=JSON,
    sizes=JSON,
    named=st.booleans(),
)
def test_any_header_is_refused_and_nothing_else_happens(
    kind: str, values: Any, sizes: Any, *, named: bool
) -> None:
    if named and kind in m._HINTS:
        shapes = m._array_shapes(kind)
        values = {name: values for name in m._HINTS[kind] if name not in shapes}
        sizes = dict.fromkeys(shapes, sizes)
    _reads_or_refuses(_bytes({"kind": kind, "values": values, "arrays": sizes}))


HOSTILE = {
    "sizes far beyond memory": _bytes(
        {"kind": "Edges", "values": {}, "arrays": {"releasable": [2**40]}}
    ),
    "sizes whose product wraps around": _bytes(
        {"kind": "DesignMoments", "values": {},
         "arrays": {"n": [2**25, 2**25], "mean": [2**25, 2**25], "m2": [2**25, 2**25]}}
    ),
    "negative size": _bytes({"kind": "Edges", "values": {}, "arrays": {"releasable": [-1]}}),
    "size is text": _bytes({"kind": "Edges", "values": {}, "arrays": {"releasable": "9"}}),
    "hundred dimensions": _bytes(
        {"kind": "Edges", "values": {}, "arrays": {"releasable": [1] * 100}}, b"\0"
    ),
    "a value where an array is needed": _bytes(
        {"kind": "Edges", "values": {"releasable": True}, "arrays": {}}
    ),
    "an array where a value is needed": _bytes(
        {"kind": "Refused", "values": {}, "arrays": {"code": [0]}}
    ),
    "a field twice": _bytes(
        {"kind": "Edges", "values": {"releasable": 1}, "arrays": {"releasable": [0]}}
    ),
    "another field": _bytes({"kind": "Done", "values": {"note": "x"}, "arrays": {}}),
    "a field too few": _bytes({"kind": "Refused", "values": {}, "arrays": {}}),
    "another part of the header": _bytes(
        {"kind": "Done", "values": {}, "arrays": {}, "more": {}}
    ),
    "no object": _bytes([1, 2]),
    "kind is a list": _bytes({"kind": [], "values": {}, "arrays": {}}),
    "header longer than the message": _bytes(b"{}", size=2**32 - 1),
    "deep nesting": _bytes(b"[" * 200_000),
    "neither true nor false": _bytes(
        {"kind": "Edges", "values": {}, "arrays": {"releasable": [1]}}, b"\2"
    ),
    "text in no encoding": _bytes(b"\xff\xfe\xfa"),
    "digits without end": _bytes(b'{"kind": ' + b"9" * 100_000 + b"}"),
}  # fmt: skip


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused_at_once(payload: bytes) -> None:
    started = time.perf_counter()
    with pytest.raises(m.MessageError):
        m.decode(payload)
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"log_likelihood": np.array([np.nan])}, "not finite"),
        ({"gradient": np.array([[np.inf, 0.0]])}, "not finite"),
        ({"gradient": np.zeros((1, 2), np.float32)}, "dtype"),
        ({"gradient": [[0.0, 0.0]]}, "dtype"),
        ({"gradient": np.zeros((2, 2))}, "found 2 fits, needed 1"),
        ({"gradient": np.zeros(2)}, "dimensions"),
        ({"information": np.zeros((1, 2, 3))}, "found 3 inputs, needed 2"),
        ({"n_patients": np.array([60.0])}, "dtype"),
        ({"n_patients": np.array(["Doe"])}, "dtype"),
    ],
)
def test_arrays_must_be_as_declared(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(m.MessageError, match=reason):
        m.encode(replace(REPLY, **change))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (m.Refused("small_cell"), {"code": "patient Doe is odd"}),
        (m.Refused("small_cell"), {"code": ""}),
        (m.Refused("small_cell"), {"code": 3}),
        (SUMS, {"fits": ("clinical", "Jane Doe")}),
        (SUMS, {"fits": ("clinical", "clinical\n")}),
        (SUMS, {"fits": ("clinical",)}),
        (SUMS, {"fits": ()}),
        (SUMS, {"fits": ("x" * 101, "y")}),
        (SUMS, {"fits": ["clinical", "y"]}),
        (SUMS, {"run": "0" * 63}),
        (SUMS, {"run": "g" * 64}),
        (SUMS, {"round": -1}),
        (SUMS, {"round": True}),
        (SUMS, {"round": 2**53}),
        (SUMS, {"round": 1.0}),
    ],
)
def test_values_must_be_as_declared(message: m.Message, change: dict[str, Any]) -> None:
    with pytest.raises(m.MessageError):
        m.encode(replace(message, **change))


def test_what_is_too_large_is_refused_on_both_ends() -> None:
    edges = m.AskEdges(RUN, 1, np.zeros(m.MAX_BYTES // 8 + 1))
    with pytest.raises(m.MessageError, match="at most"):
        m.encode(edges)
    with pytest.raises(m.MessageError, match="at most"):
        m.decode(bytes(m.MAX_BYTES + 1))


def test_a_site_has_no_field_for_text_but_digest_and_code() -> None:
    texts = {
        (kind.__name__, name)
        for kind in KINDS
        if kind not in TO_SITE
        for name, hint in get_type_hints(kind, include_extras=True).items()
        if hint not in (int, bool, float) and not hasattr(hint, "__metadata__")
    }
    assert texts == {("Description", "cohort"), ("Introduced", "cohort"), ("Refused", "code")}


@example("Refused")
@given(st.text(max_size=120))
def test_no_free_text_becomes_a_code(text: str) -> None:
    if text not in m._CODES:
        with pytest.raises(m.MessageError):
            m.encode(m.Refused(text))


def test_all_that_is_asked_names_its_run() -> None:
    # An introduction comes first: the cohorts that it brings out name the run.
    asked = {kind for kind in KINDS if "run" in m._HINTS[kind.__name__]}
    assert asked == TO_SITE - {m.Introduce}


def test_nothing_that_runs_what_it_reads() -> None:
    source = Path(m.__file__).read_text()
    for word in ("import pickle", "allow_pickle", "np.load", "eval(", "exec(", "marshal", "yaml"):
        assert word not in source
    assert not any(np.dtype(s.dtype).hasobject for k in KINDS for s in
                   m._array_shapes(k.__name__).values())  # fmt: skip
