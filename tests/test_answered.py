"""What a site has answered is kept: neither another run's name nor a kill buys one more answer."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion import messages as m
from fusion.federation import SiteStudy
from fusion.federation.answered import AnswerLedger, LedgerDamaged
from fusion.federation.site import MAX_SUMS_PER_FIT, RERUNS
from tests.consortium import EASY, GRID, Asker, site_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[1]
KEY, OTHER = "a" * 64, "b" * 64
pytestmark = pytest.mark.border


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site" / "answered.jsonl"


def reopened(path: Path) -> AnswerLedger:
    return AnswerLedger(path, wait_s=0.0)


@pytest.fixture(params=["memory", "disk"])
def ledger(request: pytest.FixtureRequest, path: Path) -> Iterator[AnswerLedger]:
    found = AnswerLedger(None if request.param == "memory" else path)
    yield found
    found.close()


def test_the_same_request_is_free_and_another_is_counted(ledger: AnswerLedger) -> None:
    book = ledger.open(KEY)
    assert book.spend([("sums", "1", 2)])
    assert book.spend([("sums", "1", 2)])
    assert book.spend([("sums", "2", 2)])
    assert not book.spend([("sums", "3", 2)])
    assert book.spend([("sums", "1", 2), ("sums", "2", 2)])
    assert book.spend([("moments", "3", 1)])


def test_what_may_be_asked_once_stays_at_its_first_form(ledger: AnswerLedger) -> None:
    book = ledger.open(KEY)
    assert book.spend([("evaluation", "first", 1)])
    assert not book.spend([("evaluation", "second", 1)])
    assert book.spend([("evaluation", "first", 1)])


def test_of_requests_together_none_is_counted_where_one_is_over(ledger: AnswerLedger) -> None:
    book = ledger.open(KEY)
    assert book.spend([("a", "1", 1)])
    assert not book.spend([("b", "1", 1), ("a", "2", 1)])
    assert book.spend([("b", "2", 1)])
    assert not book.spend([("c", "1", 2), ("c", "2", 2), ("c", "3", 2)])
    assert book.spend([("c", "3", 1)])


def test_another_cohort_has_a_book_of_its_own(ledger: AnswerLedger) -> None:
    assert ledger.open(KEY).spend([("a", "1", 1)])
    assert ledger.open(OTHER).spend([("a", "2", 1)])
    assert not ledger.open(KEY).spend([("a", "2", 1)])
    assert ledger.open(KEY) is ledger.open(KEY)


def test_a_restart_gives_no_second_budget(path: Path) -> None:
    for name in ("1", "2", "3"):
        with_ = AnswerLedger(path)
        assert with_.open(KEY).spend([("sums", name, 2)]) == (name != "3")
        with_.close()
    again = AnswerLedger(path).open(KEY)
    assert again.spent == {"sums": {"1", "2"}}
    assert again.spend([("sums", "2", 2)])


@settings(max_examples=30, deadline=None)
@given(
    asked=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.integers(0, 3))),
    restarts=st.sets(st.integers(0, 20)),
)
def test_restarts_change_no_decision(
    tmp_path_factory: pytest.TempPathFactory,
    asked: list[tuple[str, str, int]],
    restarts: set[int],
) -> None:
    path = tmp_path_factory.mktemp("site") / "answered.jsonl"
    never, kept = AnswerLedger(), AnswerLedger(path)
    for number, one in enumerate(asked):
        if number in restarts:
            kept.close()
            kept = AnswerLedger(path)
        assert kept.open(KEY).spend([one]) == never.open(KEY).spend([one])
    kept.close()


def test_an_answer_is_on_the_disk_before_it_leaves(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    ledger = AnswerLedger(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes()))
        assert ledger.open(KEY).spend([("sums", "1", 2), ("sums", "2", 2)])
    (content,) = synced
    assert content == path.read_bytes()
    assert [json.loads(x)["request"] for x in content.splitlines()] == ["1", "2"]
    assert path.stat().st_mode & 0o777 == 0o600


_KILLED = """
import os, signal, sys
from pathlib import Path
from fusion.federation.answered import AnswerLedger
book = AnswerLedger(Path(sys.argv[1])).open("a" * 64)
for number in range(10_000):
    assert book.spend([("sums", str(number), 10_000)])
    print(number, flush=True)
"""


def test_kill_9_loses_no_answer_that_left(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 40:
            pass
        os.kill(process.pid, signal.SIGKILL)
        told = 41 + len([x for x in process.stdout.read().splitlines() if x])
    book = reopened(path).open(KEY)
    assert {str(n) for n in range(told)} <= book.spent["sums"]
    assert len(book.spent["sums"]) <= told + 1


def three(path: Path) -> list[bytes]:
    ledger = AnswerLedger(path)
    for name in ("1", "2", "3"):
        assert ledger.open(KEY).spend([("sums", name, 9)])
    ledger.close()
    return path.read_bytes().splitlines(keepends=True)


def test_a_torn_last_line_was_never_answered(path: Path) -> None:
    lines = three(path)
    whole = b"".join(lines)
    for cut in range(1, len(lines[2]) + 1):
        path.write_bytes(whole[:-cut])
        ledger = AnswerLedger(path)
        assert ledger.open(KEY).spent["sums"] == {"1", "2"}
        assert ledger.open(KEY).spend([("sums", "4", 9)])
        ledger.close()
        again = AnswerLedger(path)
        assert again.open(KEY).spent["sums"] == {"1", "2", "4"}
        again.close()


DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a request changed": lambda x: [x[0], x[1].replace(b'"request":"2"', b'"request":"1"'), x[2]],
    "another book": lambda x: [x[0].replace(b"aaaa", b"aaab", 1), *x[1:]],
    "a line dropped": lambda x: [x[0], x[2]],
    "the first line dropped": lambda x: x[1:],
    "a line twice": lambda x: [x[0], x[1], x[1], x[2]],
    "two lines swapped": lambda x: [x[1], x[0], x[2]],
    "an empty line": lambda x: [x[0], b"\n", *x[1:]],
    "zeros": lambda x: [x[0], b"\0" * 100 + b"\n", *x[1:]],
    "not an entry": lambda x: [*x, b"[]\n"],
    "text": lambda x: [*x, b"\xff\xfe\n"],
    "a line torn in the middle": lambda x: [x[0], x[1][:-10] + b"\n", x[2]],
    "the last line changed": lambda x: [*x[:2], x[2].replace(b'"3"', b'"7"')],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_ledger_answers_nothing_and_is_left_as_it_is(
    path: Path, damage: Callable[[list[bytes]], list[bytes]]
) -> None:
    path.write_bytes(b"".join(damage(three(path))))
    content = path.read_bytes()
    for _ in range(2):  # nor the second time
        with pytest.raises(LedgerDamaged, match=r"found line [1-4] other than it was written"):
            reopened(path)
    assert path.read_bytes() == content


@settings(max_examples=40, deadline=None)
@given(at=st.integers(0, 10_000), byte=st.integers(1, 255))
def test_no_changed_byte_gives_an_answer_back(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    path = tmp_path_factory.mktemp("site") / "answered.jsonl"
    content = bytearray(b"".join(three(path)))
    content[at % (len(content) - 1)] ^= byte  # the last newline alone is as if torn
    path.write_bytes(content)
    with pytest.raises(LedgerDamaged):
        reopened(path)


def test_two_processes_do_not_count_side_by_side(path: Path) -> None:
    first = AnswerLedger(path)
    with pytest.raises(LedgerDamaged, match="found another process"):
        reopened(path)
    timer = threading.Timer(0.2, first.close)
    timer.start()
    AnswerLedger(path).close()  # one that is ending is waited for
    timer.join()


def test_a_closed_ledger_counts_nothing(path: Path) -> None:
    ledger = AnswerLedger(path)
    book = ledger.open(KEY)
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerDamaged, match="found it closed"):
        book.spend([("sums", "1", 2)])
    assert book.spent["sums"] == set()


def test_a_full_disk_gives_no_answer_and_spoils_nothing(path: Path) -> None:
    three(path)
    ledger, size = AnswerLedger(path), path.stat().st_size
    book = ledger.open(KEY)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, hard))
        for _ in range(2):
            with pytest.raises(OSError, match="File too large"):
                book.spend([("sums", "4", 9)])
            assert path.stat().st_size == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert book.spend([("sums", "5", 9)])
    ledger.close()
    assert AnswerLedger(path).open(KEY).spent["sums"] == {"1", "2", "3", "5"}


def test_many_at_once_spend_no_more_than_there_is(ledger: AnswerLedger) -> None:
    book, given_ = ledger.open(KEY), []
    start = threading.Barrier(8)

    def _ask(number: int) -> None:
        start.wait()
        given_.append(book.spend([("sums", str(number), 3)]))

    threads = [threading.Thread(target=_ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(given_) == 3


class Restarted(Asker):
    """A coordinator by hand, of one more run with a site that was started anew."""

    def __init__(self, path: Path, run: int) -> None:
        self.plan = replace(EASY, run=f"{run:064x}")
        self._ledger = AnswerLedger(path)
        self.study = SiteStudy(self.plan, site_rows(300, 1), book=self._ledger.open(KEY))

    def sums(self, value: float) -> m.Message:
        width = self.plan.n_inputs("clinical")
        return self(m.AskSums(self.plan.run, 5, ("clinical",), np.full((1, width), value)))

    def close(self) -> None:
        self._ledger.close()


def test_a_site_gives_no_more_sums_to_runs_of_other_names(path: Path) -> None:
    """A coordinator may end a run and begin another, each time at coefficients of its own."""
    n_given = 0
    for run in range(2 * RERUNS):
        ask = Restarted(path, run).scaled()
        for number in range(MAX_SUMS_PER_FIT):
            reply = ask.sums(run + number / 1000)
            n_given += isinstance(reply, m.Sums)
        ask.close()
    assert n_given == RERUNS * MAX_SUMS_PER_FIT
    last = Restarted(path, 99).scaled()
    assert last.sums(99.0) == m.Refused("rounds_spent")
    # The very first request tells nothing new, and is answered.
    assert isinstance(last.sums(0.0), m.Sums)
    last.close()


def test_a_site_evaluates_no_more_models_in_runs_of_other_names(path: Path) -> None:
    codes = []
    for run in range(RERUNS + 2):
        ask = Restarted(path, run).scaled().gridded(GRID[-1])
        cuts = np.tile([-0.5, 0.5 + run / 100], (len(ask.plan.arms), 1))
        reply = ask(ask.evaluation(run=ask.plan.run, groups=cuts))
        codes.append(reply.code if isinstance(reply, m.Refused) else "")
        ask.close()
    assert codes == [""] * RERUNS + ["rounds_spent"] * 2
