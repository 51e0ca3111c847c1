"""What a site tells over all runs on one cohort is rationed, whoever asks and in whatever order."""

from __future__ import annotations

import resource
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fusion import messages as m
from fusion.federation import AveragingPlan, InProcess, SiteStudy, run_federation
from fusion.federation.answered import AnswerLedger, Book
from fusion.federation.masking import MAX_ROSTERS
from fusion.federation.site import MAX_SUMS_PER_FIT, RERUNS
from tests.consortium import (
    EASY,
    GRID,
    N_CLINICAL,
    N_RADIOLOGY,
    PLAN,
    LinearNetwork,
    Overheard,
    identities_of,
    raise_,
    site_rows,
    small,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fusion.federation import FederationPlan

pytestmark = pytest.mark.border
BOOK = "b" * 64
NAMES = tuple(f"site-0{i}" for i in range(1, 5))


def run_of(number: int) -> str:
    return f"{number:064x}"


@contextmanager
def ledger_at(path: Path) -> Iterator[AnswerLedger]:
    ledger = AnswerLedger(path)
    try:
        yield ledger
    finally:
        ledger.close()


def spent(path: Path) -> dict[str, set[str]]:
    with ledger_at(path) as ledger:
        return ledger.open(BOOK).spent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site" / "answered.jsonl"


@contextmanager
def room_for(n_bytes: int) -> Iterator[None]:
    """Let no file grow beyond this size: like a full disk, writes are cut short and then fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class ByHand:
    """A coordinator by hand, in one run after the other with a site that keeps a record."""

    def __init__(self, book: Book, run: int = 1, *, plan: FederationPlan = PLAN) -> None:
        self.run = run_of(run)
        self.errors: list[Exception] = []
        self.study = SiteStudy(
            replace(plan, run=self.run), site_rows(300, 1), book=book, on_error=self.errors.append
        )

    def __call__(self, request: Any) -> m.Message:
        return m.decode(self.study.answer(m.encode(replace(request, run=self.run))))

    def scaled(self, by: float = 1.0) -> ByHand:
        told = m.SetScaling(
            self.run, 1, ("clinical",), np.full((1, N_CLINICAL), 50.0), np.full((1, N_CLINICAL), by)
        )
        assert self(told) == m.Done()
        return self

    def sums(self, value: float) -> m.Message:
        at = np.full((1, N_CLINICAL), value)
        return self(m.AskSums(self.run, 2, ("clinical",), at))


def refused(code: str) -> m.Refused:
    return m.Refused(code)


def test_another_run_does_not_buy_a_second_budget_of_sums(path: Path) -> None:
    values = (0.001 * i for i in range(10_000))
    n_sums = 0
    for run in range(2 * RERUNS):
        with ledger_at(path) as ledger:
            ask = ByHand(ledger.open(BOOK), run).scaled()
            for _ in range(MAX_SUMS_PER_FIT + 1):
                reply = ask.sums(next(values))
                n_sums += isinstance(reply, m.Sums)
            assert reply == refused("rounds_spent")
    assert n_sums == RERUNS * MAX_SUMS_PER_FIT
    with ledger_at(path) as ledger:
        assert isinstance(ByHand(ledger.open(BOOK), 99).scaled().sums(0.0), m.Sums)


def test_another_run_does_not_buy_another_grid_for_ever(path: Path) -> None:
    grids = [GRID[list(kept)] for kept in ((4,), (3, 4), (2, 4), (1, 4), (2, 3, 4))]
    codes = []
    for run, grid in enumerate([*grids, grids[0]]):
        with ledger_at(path) as ledger:
            ask = ByHand(ledger.open(BOOK), run, plan=EASY)
            reply = ask(m.SetGrid(run_of(run), 1, grid))
            codes.append(reply.code if isinstance(reply, m.Refused) else "")
    assert codes == [*[""] * RERUNS, "rounds_spent", "rounds_spent", ""]


def test_another_scaling_does_not_buy_a_second_budget_of_sums() -> None:
    book = AnswerLedger().open(BOOK)
    told = set()
    for run in range(RERUNS + 3):
        ask = ByHand(book, run)
        ones = np.ones((1, N_CLINICAL))
        reply = ask(m.SetScaling(ask.run, 1, ("clinical",), 50.0 * ones, (1.0 + run) * ones))
        if reply == m.Done():
            sums = ask.sums(0.1)
            assert isinstance(sums, m.Sums)
            told.add(sums.gradient.tobytes())
    assert len(told) <= RERUNS


def test_another_network_does_not_buy_a_second_budget_of_sums() -> None:
    rows = site_rows(300, 1)
    table = rows.tables.pop("radiology")
    inputs = np.concatenate([table.train, table.test]) - 1.0
    rows.networks["radiology"] = LinearNetwork(inputs, rows.train)  # type: ignore[index]
    network = AveragingPlan(np.zeros(N_RADIOLOGY), rounds=3, local_steps=2)
    plan = replace(
        PLAN,
        sums={"clinical": PLAN.sums["clinical"]},
        encoder_ridge={"clinical": (0.05,)},
        networks={"radiology": network},
    )
    book, told = AnswerLedger().open(BOOK), set()
    shape = (1, len(PLAN.modalities))
    for run in range(RERUNS + 3):
        name = run_of(run)
        study = SiteStudy(replace(plan, run=name), rows, book=book)
        weights = np.full((1, N_RADIOLOGY), 0.1 * (1 + run))
        requests = (
            m.SetNetworks(name, 1, ("radiology",), weights),
            m.SetScaling(name, 2, ("protocol",), np.zeros(shape), np.ones(shape)),
            m.AskSums(name, 3, ("protocol",), np.full((1, plan.n_fusion_inputs), 0.1)),
        )
        *_, reply = (m.decode(study.answer(m.encode(x))) for x in requests)
        if isinstance(reply, m.Sums):
            told.add(reply.gradient.tobytes())
    # Without any network the sums are others once more.
    assert 0 < len(told) <= RERUNS + 1


def test_an_identical_rerun_is_free_and_equal(tmp_path: Path) -> None:
    rows = small(200, 180)
    heard, sizes = [], []
    for run in range(RERUNS + 2):
        plan = replace(EASY, run=run_of(run))
        ledgers = {site: AnswerLedger(tmp_path / site / "answered.jsonl") for site in rows}
        studies = {
            site: SiteStudy(plan, found, book=ledgers[site].open(BOOK), on_error=raise_)
            for site, found in rows.items()
        }
        talk = Overheard(InProcess(studies))
        run_federation(plan, talk)
        heard.append([m.encode(r) for _, replies in talk.heard for r in replies.values()])
        for ledger in ledgers.values():
            ledger.close()
        sizes.append([path.stat().st_size for path in sorted(tmp_path.rglob("*.jsonl"))])
    assert all(x == heard[0] for x in heard)
    assert all(x == sizes[0] for x in sizes)
    assert min(sizes[0]) > 0


def test_on_a_full_disk_nothing_is_answered_and_nothing_charged(path: Path) -> None:
    with ledger_at(path) as ledger:
        ask = ByHand(ledger.open(BOOK)).scaled()
        assert isinstance(ask.sums(0.0), m.Sums)
        size = path.stat().st_size
        with room_for(size + 20):
            assert ask.sums(0.1) == refused("site_error")
            assert isinstance(ask.sums(0.0), m.Sums)  # told before
        assert [type(x) for x in ask.errors] == [OSError]
        assert path.stat().st_size == size
        assert isinstance(ask.sums(0.1), m.Sums)
    assert len(spent(path)["AskSums: clinical"]) == 2


class Masked:
    """One site of four, and a coordinator by hand who picks the roster of a secure sum."""

    def __init__(self, ledger: AnswerLedger, roster: tuple[str, ...], *, run: int) -> None:
        rows = small(260, 240, 250, 240)
        plan = replace(EASY, run=run_of(run), secure_sum=True)
        self.run = plan.run
        identities = identities_of(rows)
        books = {site: AnswerLedger().open(BOOK) for site in rows} | {"site-01": ledger.open(BOOK)}
        self.studies = {
            s: SiteStudy(plan, rows[s], identity=identities[s], book=books[s]) for s in roster
        }
        keys: list[Any] = [self(m.AskKey(self.run, 1, roster), s) for s in roster]
        told = m.SetKeys(
            self.run, 1, roster,
            np.array([k.public for k in keys]), np.array([k.signature for k in keys]),
        )  # fmt: skip
        ones = np.ones((1, N_CLINICAL))
        for site in roster:
            assert self(told, site) == m.Done()
            assert self(m.SetScaling(self.run, 1, ("clinical",), 50 * ones, ones), site) == m.Done()

    def __call__(self, request: m.Message, site: str = "site-01") -> m.Message:
        return m.decode(self.studies[site].answer(m.encode(request)))

    def sums(self, value: float, number: int = 2) -> m.Message:
        at = np.full((1, N_CLINICAL), value)
        return self(m.AskSums(self.run, number, ("clinical",), at))


def test_coefficients_told_to_one_roster_are_not_told_to_another_even_after_a_restart(
    path: Path,
) -> None:
    with ledger_at(path) as ledger:
        assert isinstance(Masked(ledger, NAMES, run=1).sums(0.1), m.Masked)
        fewer = Masked(ledger, NAMES[:3], run=2)
        assert fewer.sums(0.1) == refused("roster_changed")
        assert isinstance(fewer.sums(0.2), m.Masked)
    with ledger_at(path) as ledger:
        assert Masked(ledger, NAMES[:3], run=3).sums(0.1) == refused("roster_changed")
        whole = Masked(ledger, NAMES, run=4)
        assert isinstance(whole.sums(0.1), m.Masked)
        assert whole.sums(0.2, 3) == refused("roster_changed")


def test_moments_are_told_to_a_few_rosters_and_no_more_even_after_restarts(path: Path) -> None:
    rosters = [NAMES, *(tuple(x for x in NAMES if x != gone) for gone in NAMES[1:])]
    told = []
    for run, roster in enumerate([*rosters, NAMES]):
        with ledger_at(path) as ledger:
            ask = Masked(ledger, roster, run=run)
            told.append(ask(m.AskMoments(ask.run, 2, ("clinical",))))
    refusals = [x.code if isinstance(x, m.Refused) else "" for x in told]
    assert refusals == [*[""] * MAX_ROSTERS, "roster_changed", ""]


def test_the_record_names_no_patient_and_no_value(path: Path) -> None:
    with ledger_at(path) as ledger:
        ByHand(ledger.open(BOOK)).scaled().sums(0.123456789)
    assert "0.123456789" not in path.read_text()
