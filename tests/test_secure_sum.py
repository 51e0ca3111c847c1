from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from fractions import Fraction
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import chisquare

from fusion import secure_sum
from fusion.keys import Agreement, SigningKey
from fusion.secure_sum import GUARDS, LIMIT, MaskContext, Masker, MaskRefused, unmask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    Words = np.ndarray

pytestmark = pytest.mark.border

SITES = ("a", "b", "c", "d", "e")
KEYS = {site: SigningKey(bytes([i] * 32)) for i, site in enumerate(SITES)}
TRUSTED = {site: key.public for site, key in KEYS.items()}
BLOCK = secure_sum._BLOCK


def context_of(sites: Iterable[str] = SITES[:3], attempt: int = 1) -> MaskContext:
    return MaskContext("study", "5f2c", "run-1", attempt, tuple(sites))


def masker_of(site: str, context: MaskContext | None = None, **options) -> Masker:
    given = {"site": site, "key": KEYS[site], "trusted": TRUSTED} | options
    return Masker(context or context_of(), **given)


def certificates_of(maskers: Mapping[str, Masker]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    found = {site: masker.certificate for site, masker in maskers.items()}
    return {s: x[0] for s, x in found.items()}, {s: x[1] for s, x in found.items()}


def unagreed(context: MaskContext | None = None) -> dict[str, Masker]:
    context = context or context_of()
    return {site: masker_of(site, context) for site in context.roster}


def agreed(context: MaskContext | None = None) -> dict[str, Masker]:
    """Sites that agreed on keys, in one attempt."""
    maskers = unagreed(context)
    for masker in maskers.values():
        masker.agree(*certificates_of(maskers))
    return maskers


def masked(values: Mapping[str, np.ndarray], *, round: int = 1) -> dict[str, Words]:
    return {s: x.mask(values[s], round=round) for s, x in agreed(context_of(values)).items()}


def refused(code: str, work: Callable[..., object], *args, **options) -> None:
    with pytest.raises(MaskRefused) as found:
        work(*args, **options)
    assert found.value.code == code
    assert str(found.value).startswith("secure sum: found ")


@pytest.fixture
def fixed_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ephemeral keys in every run of a test, so that it never fails by chance."""
    made = iter(range(10_000))

    class Fixed(Agreement):
        def __init__(self) -> None:
            seed = next(made).to_bytes(32, "big")
            self._key = X25519PrivateKey.from_private_bytes(seed)

    monkeypatch.setattr(secure_sum, "Agreement", Fixed)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    """How often each key was drawn words from."""
    drawn: Counter[bytes] = Counter()
    draw = secure_sum.key_stream

    def counted(key: bytes, n_words: int) -> Words:
        drawn[key] += 1
        return draw(key, n_words)

    monkeypatch.setattr(secure_sum, "key_stream", counted)
    return drawn


def of_any_scale() -> st.SearchStrategy[float]:
    return st.builds(
        lambda digits, exponent: digits * 10.0**exponent,
        st.floats(-1, 1, allow_subnormal=False),
        st.integers(-9, 12),
    )


@st.composite
def site_values(draw: st.DrawFn) -> dict[str, np.ndarray]:
    sites = SITES[: draw(st.integers(3, len(SITES)))]
    n = draw(st.integers(0, 12))
    row = st.lists(of_any_scale(), min_size=n, max_size=n)
    return {site: np.array(draw(row), dtype=np.float64) for site in sites}


EDGES = [
    0.0, -0.0, 1e-30, -1e-30, 2.0**-64, -(2.0**-64), 2.0**-65, 1e-9, -1e-9, 0.5, -0.5, 1.0, -1.0,
    1 - 2.0**-53, -(1 - 2.0**-53), 1 + 2.0**-52, -1 - 2.0**-52, 2.0**53 + 2, 1e12 + 0.125, -1e12,
    LIMIT / 8, -LIMIT / 8,
]  # fmt: skip


def rolled(values: list[float]) -> dict[str, np.ndarray]:
    """Sites that hold the values at other places, so that each meets several others."""
    return {site: np.roll(values, 3 * i) for i, site in enumerate(SITES)}


@given(values=site_values())
@example(values=rolled(EDGES))
@example(values=dict.fromkeys(SITES[:3], np.array([-1e-9, 1e12, 0.1])))
@example(values={"a": np.array([1e12]), "b": np.array([-1e12]), "c": np.array([1e-9])})
def test_the_total_is_the_sum_of_the_values(values: dict[str, np.ndarray]):
    total = unmask(masked(values), roster=list(values))
    rows = np.stack(list(values.values()), axis=1)
    exact = np.array([math.fsum(row) for row in rows])
    gap = np.abs(total - exact)
    assert total.shape == exact.shape
    assert total.dtype == np.float64
    assert (gap <= 1e-8 * np.maximum(np.abs(rows).max(axis=1), 1e-9)).all()
    assert (gap <= 1e-15 + 2**-52 * np.abs(exact)).all()


@given(values=site_values())
@example(values=rolled(EDGES))
def test_the_total_is_that_of_whole_numbers_of_any_length(values: dict[str, np.ndarray]):
    total = unmask(masked(values), roster=list(values))
    for found, *row in zip(total, *values.values(), strict=True):
        exact = Fraction(sum(math.trunc(Fraction(float(x)) * 2**64) for x in row), 2**64)
        assert found == pytest.approx(float(exact), rel=2**-52, abs=0)


@given(values=site_values(), order=st.permutations(SITES))
def test_the_order_of_sites_changes_no_bit(values: dict[str, np.ndarray], order: list[str]):
    total = unmask(masked(values), roster=list(values))
    swapped = {s: values[o] for s, o in zip(values, [x for x in order if x in values], strict=True)}
    shuffled = dict(sorted(masked(swapped).items(), key=lambda item: order.index(item[0])))
    np.testing.assert_array_equal(unmask(shuffled, roster=list(values)), total)


@pytest.mark.parametrize("n", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
def test_vectors_of_any_length_add_up(n: int):
    rng = np.random.default_rng(n)
    values = {site: rng.normal(size=n) for site in SITES[:3]}
    total = unmask(masked(values), roster=SITES[:3])
    np.testing.assert_allclose(total, sum(values.values()), rtol=0, atol=1e-15)


def test_values_up_to_the_limit_add_up():
    largest = np.nextafter(LIMIT / 4, 0)
    values = dict.fromkeys(SITES[:4], np.array([largest, -largest]))
    np.testing.assert_array_equal(
        unmask(masked(values), roster=SITES[:4]), 4 * np.array([largest, -largest])
    )


def test_masking_leaves_the_values_as_they_were():
    values = {site: np.array(EDGES) for site in SITES[:3]}
    words = masked(values)
    before = {site: x.copy() for site, x in words.items()}
    unmask(words, roster=SITES[:3])
    for site, found in words.items():
        np.testing.assert_array_equal(values[site], EDGES)
        np.testing.assert_array_equal(found, before[site])


def looks_uniform(words: Words) -> bool:
    """Whether each byte of high and low words takes all its values equally often."""
    columns = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    counts = [np.bincount(column, minlength=256) for column in columns.T]
    together = chisquare(np.sum(counts, axis=0)).pvalue
    return min(together, *(chisquare(x).pvalue for x in counts)) > 1e-4


def added(words: Iterable[Words]) -> Words:
    """Sum modulo 2^128 as the coordinator could form it."""
    high, low = np.zeros((2, len(next(iter(words)))), dtype=np.uint64)
    for x in words:
        secure_sum._add(high, low, x[:, 0], x[:, 1])
    return np.stack([high, low], axis=1)


N = 1 << 14
INPUTS = {"zeros": np.zeros(N), "a constant": np.full(N, 123.456), "small": np.full(N, -1e-9)}


@pytest.mark.border
@pytest.mark.parametrize("values", INPUTS.values(), ids=INPUTS)
@pytest.mark.usefixtures("fixed_keys")
def test_what_any_sites_but_all_send_looks_uniform(values: np.ndarray):
    words = masked(dict.fromkeys(SITES[:4], values))
    for size in (1, 2, 3):
        for some in combinations(words, size):
            assert looks_uniform(added([words[site] for site in some])), some
    assert not looks_uniform(added(words.values()))


@pytest.mark.border
@pytest.mark.usefixtures("fixed_keys")
def test_what_three_sites_send_looks_uniform_by_one_and_by_two():
    words = masked(dict.fromkeys(SITES[:3], np.zeros(N)))
    for size in (1, 2):
        for some in combinations(words, size):
            assert looks_uniform(added([words[site] for site in some])), some


@pytest.mark.border
@pytest.mark.usefixtures("fixed_keys")
def test_one_vector_says_nothing_of_sign_or_size():
    sent = masked({s: np.array([1e12, -1e12, 1e-9, 0.0] * 256) for s in SITES[:3]})
    for words in sent.values():
        bits = np.unpackbits(words.view(np.uint8), axis=1)
        assert np.abs(bits.mean(axis=0) - 0.5).max() < 4.5 * 0.5 / math.sqrt(len(bits))


@pytest.mark.border
def test_the_same_values_in_two_rounds_share_no_word():
    maskers = agreed()
    values = np.full(2 * BLOCK + 5, 7.25)
    sent = [x.mask(values, round=r, label="sums") for x in maskers.values() for r in (1, 2)]
    words = np.concatenate([x.ravel() for x in sent])
    assert np.unique(words).size == words.size


@pytest.mark.border
@pytest.mark.usefixtures("fixed_keys")
def test_the_difference_of_two_rounds_or_attempts_looks_uniform():
    first, second = agreed(context_of(SITES[:4])), agreed(context_of(SITES[:3], attempt=2))
    for site in SITES[:3]:
        one, two = (first[site].mask(np.zeros(N), round=r) for r in (1, 2))
        other = second[site].mask(np.zeros(N), round=1)
        for later in (two, other):
            high, low = one.T.copy()
            secure_sum._subtract(high, low, later[:, 0], later[:, 1])
            assert looks_uniform(np.stack([high, low], axis=1))


@pytest.mark.border
def test_no_key_serves_two_streams_and_each_has_256_bits(streams: Counter[bytes]):
    values = np.zeros(BLOCK + 1)
    for attempt in (1, 2):
        for masker in agreed(context_of(attempt=attempt)).values():
            masker.mask(values, round=1, label="x")
            masker.mask(values, round=2, label="x")
            masker.mask(values, round=3, label="y")
    pairs, attempts, rounds, blocks = 3, 2, 3, 2
    assert len(streams) == pairs * attempts * rounds * blocks
    assert set(streams.values()) == {2}  # at both ends of a pair, once each
    assert {len(key) for key in streams} == {32}


@pytest.mark.border
def test_the_same_attempt_asked_for_twice_draws_from_other_keys(streams: Counter[bytes]):
    for _ in range(2):  # as after a restart
        for masker in agreed().values():
            masker.mask(np.zeros(1), round=1)
    assert set(streams.values()) == {2}


@pytest.mark.border
@pytest.mark.parametrize(
    "changed",
    [
        {"study": "other"}, {"protocol": "other"}, {"run": "other"}, {"attempt": 2},
        {"roster": SITES[:4]},
    ],
    ids=lambda x: next(iter(x)),
)  # fmt: skip
def test_the_same_ephemeral_keys_give_other_masks_elsewhere(
    changed: dict[str, object], monkeypatch: pytest.MonkeyPatch, streams: Counter[bytes]
):
    seeds = iter([*range(3), *range(4)])

    class Again(Agreement):
        def __init__(self) -> None:
            self._key = X25519PrivateKey.from_private_bytes(bytes([7 + next(seeds)] * 32))

    monkeypatch.setattr(secure_sum, "Agreement", Again)
    for context in (context_of(), replace(context_of(), **changed)):
        for masker in agreed(context).values():
            masker.mask(np.zeros(1), round=1)
    assert set(streams.values()) == {2}


@pytest.mark.border
@pytest.mark.parametrize("sites", [(), ("a",), ("a", "b"), ("a", "a", "b"), ("a", "a", "a")])
def test_a_roster_under_three_is_refused(sites: tuple[str, ...]):
    refused("roster_too_small", masker_of, "a", context_of(sites))


@pytest.mark.border
def test_a_site_keeps_its_own_threshold_whatever_it_is_asked():
    refused("roster_too_small", masker_of, "a", context_of(SITES[:4]), minimum_roster=5)
    masker_of("a", context_of(SITES), minimum_roster=5)
    # It can be raised, not lowered.
    for least in (2, 0, -1):
        refused("roster_too_small", masker_of, "a", context_of(SITES[:2]), minimum_roster=least)
    # What comes with a request holds no threshold.
    assert {x.name for x in fields(MaskContext)} == {
        "study", "protocol", "run", "attempt", "roster",
    }  # fmt: skip


@pytest.mark.border
def test_a_roster_that_leaves_the_site_out_or_names_one_twice_is_refused():
    refused("roster_changed", masker_of, "a", context_of(SITES[1:]))
    refused("roster_changed", masker_of, "a", context_of(("a", "b", "c", "c")))


@pytest.mark.border
@pytest.mark.parametrize("sites", [SITES[:3], SITES[:2], (*SITES[:3], "e"), SITES, ()])
def test_keys_of_a_changed_roster_are_refused(sites: tuple[str, ...]):
    maskers = unagreed(context_of(SITES[:4]))
    others = {s: maskers.get(s) or masker_of(s, context_of(SITES)) for s in sites}
    refused("roster_changed", maskers["a"].agree, *certificates_of(others))
    publics, signatures = certificates_of(maskers)
    refused("roster_changed", maskers["a"].agree, publics, {s: signatures[s] for s in SITES[:3]})
    refused("bad_key", maskers["a"].mask, np.zeros(1), round=1)


def test_a_roster_in_another_order_is_the_same():
    orders = [("a", "b", "c"), ("c", "a", "b"), ("b", "c", "a")]
    maskers = {s: masker_of(s, context_of(o)) for s, o in zip("abc", orders, strict=True)}
    for masker in maskers.values():
        masker.agree(*certificates_of(maskers))
    sent = {s: x.mask(np.ones(2), round=1) for s, x in maskers.items()}
    np.testing.assert_array_equal(unmask(sent, roster=("b", "a", "c")), [3.0, 3.0])
    assert context_of(orders[0]) == context_of(orders[1])


@pytest.mark.border
def test_a_site_without_a_trusted_key_of_its_own_is_refused():
    unknown = {s: k for s, k in TRUSTED.items() if s != "c"}
    refused("bad_key", masker_of, "a", trusted=unknown)
    # One party under two names would leave a roster of two.
    refused("bad_key", masker_of, "a", trusted=TRUSTED | {"c": TRUSTED["b"]})
    refused("bad_key", masker_of, "a", key=KEYS["b"])


@pytest.mark.border
@pytest.mark.parametrize(
    "swapped",
    [
        lambda: masker_of("b", key=KEYS["d"], trusted=TRUSTED | {"b": TRUSTED["d"], "d": ""}),
        lambda: masker_of("c"),
        # Somebody else's file knows the same key under another name.
        lambda: masker_of("c", key=KEYS["b"], trusted=TRUSTED | {"c": TRUSTED["b"], "b": ""}),
        lambda: masker_of("b", replace(context_of(), study="other")),
        lambda: masker_of("b", replace(context_of(), protocol="other")),
        lambda: masker_of("b", replace(context_of(), run="run-2")),
        lambda: masker_of("b", context_of(attempt=2)),
        lambda: masker_of("b", context_of(SITES[:4])),
    ],
    ids=["signer", "site", "name", "study", "protocol", "run", "attempt", "roster"],
)
def test_a_key_that_was_signed_for_something_else_is_refused(swapped: Callable[[], Masker]):
    maskers = unagreed()
    publics, signatures = certificates_of(maskers)
    public, signature = swapped().certificate
    refused("bad_key", maskers["a"].agree, publics | {"b": public}, signatures | {"b": signature})
    refused("bad_key", maskers["a"].mask, np.zeros(1), round=1)


@pytest.mark.border
def test_a_key_swapped_in_transit_is_refused():
    maskers = unagreed()
    publics, signatures = certificates_of(maskers)
    mine = Agreement().public
    for forged in (
        (publics | {"b": mine}, signatures),
        (publics | {"b": publics["c"], "c": publics["b"]}, signatures),
        (publics | {"b": publics["b"][:-1]}, signatures),
        (publics | {"b": b""}, signatures | {"b": b""}),
        (publics, signatures | {"b": signatures["c"]}),
        (publics, signatures | {"b": bytes(64)}),
        (publics, signatures | {"b": signatures["b"][:-1]}),
    ):
        refused("bad_key", maskers["a"].agree, *forged)
    maskers["a"].agree(publics, signatures)  # nothing was spent


@pytest.mark.border
def test_an_earlier_key_of_the_site_itself_is_refused():
    before, now = unagreed(), unagreed()
    publics, signatures = certificates_of(now | {"a": before["a"]})
    refused("bad_key", now["a"].agree, publics, signatures)


@pytest.mark.border
@pytest.mark.parametrize("point", [bytes(32), (1).to_bytes(32, "little"), b"short"])
def test_a_signed_key_that_agrees_with_everybody_is_refused(
    point: bytes, monkeypatch: pytest.MonkeyPatch
):
    maskers = unagreed()
    with monkeypatch.context() as patched:
        patched.setattr(Agreement, "public", property(lambda _: point))
        maskers["b"] = masker_of("b")
    refused("bad_key", maskers["a"].agree, *certificates_of(maskers))
    refused("bad_key", maskers["a"].mask, np.zeros(1), round=1)


@pytest.mark.border
def test_keys_are_agreed_on_once():
    maskers = agreed()
    refused("mask_spent", maskers["a"].agree, *certificates_of(maskers))
    refused("mask_spent", maskers["a"].agree, *certificates_of(unagreed()))


@pytest.mark.border
def test_before_keys_are_agreed_on_nothing_is_masked():
    refused("bad_key", masker_of("a").mask, np.zeros(1), round=1)


@pytest.mark.border
@pytest.mark.parametrize("leave", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_masker_stays_where_it_was_made(leave: Callable[[Masker], object]):
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        leave(agreed()["a"])


@pytest.mark.border
def test_what_a_masker_shows_of_itself_holds_no_key():
    fresh, ready = masker_of("a"), agreed()["a"]
    assert repr(fresh) == str(ready) == "Masker('run-1', attempt=1, 'a')"


@pytest.mark.border
def test_the_ephemeral_key_is_gone_once_sites_agreed():
    held = vars(agreed()["a"]).values()
    assert not any(isinstance(x, Agreement | SigningKey) for x in held)


@pytest.mark.border
def test_a_round_is_masked_once_and_no_earlier_one_after_it():
    masker = agreed()["a"]
    masker.mask(np.zeros(2), round=4)
    for spent in (4, 3, 0, -1):
        refused("mask_spent", masker.mask, np.zeros(2), round=spent)
        refused("mask_spent", masker.mask, np.zeros(2), round=spent, label="another")
    masker.mask(np.zeros(2), round=5)


@pytest.mark.border
def test_one_of_many_at_once_gets_a_round():
    masker = agreed()["a"]

    def attempt(value: int) -> bool:
        try:
            masker.mask(np.full(100, value), round=1)
        except MaskRefused:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(64))) == 1


@pytest.mark.border
def test_nobody_can_be_asked_for_what_unmasks_a_site_that_is_said_to_have_dropped_out():
    maskers = agreed(context_of(SITES[:4]))
    values = {site: np.full(3, 10.0**i) for i, site in enumerate(maskers)}
    sent = {site: x.mask(values[site], round=1) for site, x in maskers.items()}
    alive = SITES[:3]  # so the coordinator says, and holds what d sent
    publics, signatures = certificates_of({s: maskers[s] for s in alive})
    for site in alive:
        refused("mask_spent", maskers[site].agree, publics, signatures)
        refused("mask_spent", maskers[site].mask, values[site], round=1)
    # Nothing that a site does takes a roster, gives a key or takes a mask off again.
    assert {name for name in dir(Masker) if not name.startswith("_")} == {
        "agree", "certificate", "mask",
    }  # fmt: skip
    assert list(inspect.signature(Masker.mask).parameters) == ["self", "values", "round", "label"]
    # A later round of the same attempt still holds the masks of all four.
    later = {site: maskers[site].mask(values[site], round=2) for site in alive}
    refused("roster_changed", unmask, later, roster=SITES[:4])
    refused("bad_key", unmask, later, roster=alive)
    refused("bad_key", unmask, {**later, "d": sent["d"]}, roster=SITES[:4])


@pytest.mark.border
@pytest.mark.usefixtures("fixed_keys")
@pytest.mark.parametrize("n", [0, 1, 2, 2**14])
def test_masks_that_do_not_cancel_are_found_however_few_the_values(n: int):
    for attempt in range(1, 9):
        maskers = agreed(context_of(SITES[:3], attempt=attempt))
        sent = {site: x.mask(np.zeros(n), round=1) for site, x in maskers.items()}
        assert {x.shape for x in sent.values()} == {(n + GUARDS, 2)}
        late = sent | {"a": maskers["a"].mask(np.zeros(n), round=2)}
        refused("bad_key", unmask, late, roster=SITES[:3])
        np.testing.assert_array_equal(unmask(sent, roster=SITES[:3]), np.zeros(n))


@pytest.mark.border
def test_after_a_dropout_the_others_start_again_with_new_keys():
    first = agreed(context_of(SITES[:4]))
    abandoned = {site: first[site].mask(np.ones(64), round=1) for site in SITES[:3]}
    second = agreed(context_of(SITES[:3], attempt=2))
    sent = {site: x.mask(np.ones(64), round=1) for site, x in second.items()}
    np.testing.assert_array_equal(unmask(sent, roster=SITES[:3]), np.full(64, 3.0))
    refused("bad_key", unmask, sent | {"a": abandoned["a"]}, roster=SITES[:3])
    assert not {x.certificate[0] for x in first.values()} & {
        x.certificate[0] for x in second.values()
    }


@pytest.mark.border
@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, LIMIT / 3, -LIMIT / 3, LIMIT, 1.8e308, -1.8e308],
)
def test_values_that_cannot_be_added_up_are_refused_before_anything_is_spent(
    value: float, streams: Counter[bytes]
):
    masker = agreed()["a"]
    for at in range(3):
        values = np.zeros(3)
        values[at] = value
        refused("overflow", masker.mask, values, round=1)
    assert not streams
    masker.mask(np.zeros(3), round=1)


def test_values_of_another_shape_are_refused_before_anything_is_spent():
    masker = agreed()["a"]
    for shape in ((), (2, 2)):
        with pytest.raises(ValueError, match=r"needed \(n,\)"):
            masker.mask(np.zeros(shape), round=1)
    masker.mask(np.zeros(3), round=1)


@pytest.mark.border
def test_no_refusal_repeats_a_value():
    with pytest.raises(MaskRefused) as found:
        agreed()["a"].mask(np.array([3.25e18]), round=1)
    assert "3.25" not in str(found.value)


@pytest.fixture(scope="module")
def sent() -> dict[str, Words]:
    return masked(dict.fromkeys(SITES[:4], np.ones(64)))


@pytest.mark.border
def test_a_total_needs_every_site_once(sent: dict[str, Words]):
    fewer = {s: x for s, x in sent.items() if s != "d"}
    refused("roster_changed", unmask, fewer, roster=SITES[:4])
    refused("roster_changed", unmask, sent, roster=SITES[:3])
    refused("roster_changed", unmask, sent, roster=(*SITES[:4], "d"))
    refused("roster_changed", unmask, sent | {"e": sent["d"]}, roster=SITES[:4])
    refused("bad_key", unmask, fewer, roster=SITES[:3])
    refused("bad_key", unmask, sent | {"d": sent["c"]}, roster=SITES[:4])


@pytest.mark.border
@pytest.mark.parametrize("other", [{"round": 2}, {"round": 1, "label": "other"}])
def test_words_of_another_round_or_kind_do_not_add_up(other: dict[str, object]):
    maskers = agreed()
    words = {s: maskers[s].mask(np.ones(64), round=1) for s in "ab"}
    words["c"] = maskers["c"].mask(np.ones(64), **other)
    refused("bad_key", unmask, words, roster=SITES[:3])


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda words: words[:-1],
        lambda words: words[:, :1],
        lambda words: words.ravel(),
        lambda words: words.view(np.int64),
        lambda words: words.astype(np.float64),
    ],
    ids=["short", "one word", "flat", "signed", "floats"],
)
def test_words_of_another_shape_are_refused(
    spoilt: Callable[[Words], np.ndarray], sent: dict[str, Words]
):
    with pytest.raises(ValueError, match=r"needed \(n, 2\)"):
        unmask(sent | {"b": spoilt(sent["b"])}, roster=SITES[:4])
    with pytest.raises(ValueError, match=r"needed \(n, 2\)"):
        unmask({s: spoilt(x) for s, x in sent.items()} | {"a": sent["a"]}, roster=SITES[:4])


def test_a_total_over_nobody_is_refused():
    with pytest.raises(ValueError, match="needed"):
        unmask({}, roster=())
