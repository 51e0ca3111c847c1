from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pydantic import ValidationError
from scipy import stats
from scipy.optimize import brentq

from fusion.differential_privacy import (
    UNITS,
    Budget,
    BudgetSpent,
    LedgerDamaged,
    PrivacyLedger,
    clipped_units,
    epsilon_spent,
    gaussian_noise,
    noise_multiplier,
    noisy_sum,
)
from fusion.keys import digest

pytestmark = pytest.mark.border

ROOT = Path(__file__).resolve().parents[1]
ROWS = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(-1e300, 1e300),
)
CLIPS = st.floats(1e-3, 1e3)
REQUESTS = [digest(f"request {i}".encode()) for i in range(100)]


def gaussian_delta(epsilon: float, multiplier: float) -> float:
    """Balle and Wang 2018, theorem 8, for sensitivity 1."""
    away, shift = 1 / (2 * multiplier), epsilon * multiplier
    cdf = stats.norm.cdf
    return float(cdf(away - shift) - np.exp(epsilon) * cdf(-away - shift))


class TestBudget:
    def test_off_by_default_and_frozen(self) -> None:
        budget = Budget()
        assert not budget.is_on
        with pytest.raises(ValidationError):
            budget.epsilon = 1.0  # type: ignore[misc]

    @pytest.mark.parametrize(
        "values",
        [
            {"epsilon": -1}, {"epsilon": np.nan}, {"epsilon": np.inf}, {"delta": 0},
            {"delta": 0.5}, {"clip_norm": 0}, {"sigma": 1},
        ],
    )  # fmt: skip
    def test_refuses_what_is_no_budget(self, values: dict[str, float]) -> None:
        with pytest.raises(ValidationError):
            Budget(**values)


class TestAccounting:
    @pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0, 3.0, 10.0])
    @pytest.mark.parametrize("delta", [1e-7, 1e-5, 1e-3])
    def test_one_release_has_exactly_the_delta_of_its_epsilon(
        self, epsilon: float, delta: float
    ) -> None:
        multiplier = noise_multiplier(epsilon, delta)
        assert gaussian_delta(epsilon, multiplier) == pytest.approx(delta, rel=1e-6)
        near = (0.8 * multiplier, 1.2 * multiplier)
        exact = brentq(lambda s: gaussian_delta(epsilon, s) / delta - 1, *near, xtol=1e-12)
        assert exact <= multiplier <= exact * (1 + 1e-6)

    @given(st.integers(1, 500), st.floats(0.1, 20))
    @settings(deadline=None, max_examples=30)
    def test_k_releases_are_one_of_a_kth_of_the_variance(self, k: int, epsilon: float) -> None:
        one, each = noise_multiplier(epsilon, 1e-5), noise_multiplier(epsilon, 1e-5, k)
        assert each == pytest.approx(one * np.sqrt(k))
        assert epsilon_spent([(each, k)], 1e-5) == pytest.approx(epsilon, rel=1e-6)
        assert epsilon_spent([(each, 1)] * k, 1e-5) <= epsilon

    @given(st.lists(st.tuples(st.floats(0.3, 100), st.integers(1, 20)), min_size=1, max_size=8))
    @settings(deadline=None, max_examples=30)
    def test_more_releases_never_tell_less(self, releases: list[tuple[float, int]]) -> None:
        spent = [epsilon_spent(releases[:i], 1e-5) for i in range(len(releases) + 1)]
        assert spent[0] == 0.0
        assert spent == sorted(spent)

    def test_agrees_with_a_numerical_composition_of_unequal_releases(self) -> None:
        from dp_accounting import ComposedDpEvent, GaussianDpEvent, pld

        releases = [(4.0, 1), (9.0, 3), (20.0, 5)]
        events = [GaussianDpEvent(s) for s, n in releases for _ in range(n)]
        numerical = pld.PLDAccountant().compose(ComposedDpEvent(events)).get_epsilon(1e-5)
        assert epsilon_spent(releases, 1e-5) == pytest.approx(numerical, abs=2e-3)

    @pytest.mark.parametrize(
        "asked",
        [(0.0, 1e-5, 1), (1.0, 0.0, 1), (1.0, 1e-5, 0), (np.inf, 1e-5, 1), (np.nan, 0.1, 1)],
    )
    def test_refuses_what_has_no_noise(self, asked: tuple[float, float, int]) -> None:
        with pytest.raises(ValueError, match="needed epsilon above 0"):
            noise_multiplier(*asked)


class TestClipping:
    @given(ROWS, CLIPS)
    def test_no_row_is_longer_than_the_bound_exactly(self, rows: np.ndarray, clip: float) -> None:
        for row in clipped_units(rows, clip).tolist():
            assert sum(x * x for x in row) <= UNITS**2

    @given(ROWS, CLIPS, st.data())
    def test_one_patient_moves_the_sum_by_at_most_the_clip_norm_exactly(
        self, rows: np.ndarray, clip: float, data: st.DataObject
    ) -> None:
        left_out = data.draw(st.integers(0, len(rows) - 1))
        whole = clipped_units(rows, clip).sum(axis=0).tolist()
        without = clipped_units(np.delete(rows, left_out, axis=0), clip).sum(axis=0).tolist()
        assert sum((a - b) ** 2 for a, b in zip(whole, without, strict=True)) <= UNITS**2

    @given(arrays(np.float64, (4, 3), elements=st.floats(-0.5, 0.5)))
    def test_what_is_short_stays_as_it_is(self, rows: np.ndarray) -> None:
        assert np.abs(clipped_units(rows, 1.0) / UNITS - rows).max() < 1 / UNITS

    def test_what_is_long_keeps_its_direction(self) -> None:
        units = clipped_units([[30.0, 40.0]], 2.0) * (2.0 / UNITS)
        np.testing.assert_allclose(units, [[1.2, 1.6]], atol=1e-8)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_refuses_what_is_not_finite(self, value: float) -> None:
        with pytest.raises(ValueError, match="not finite"):
            clipped_units([[value, 1.0]], 1.0)


class TestNoise:
    # With 40,000 draws the chance of any of these to fail by itself is below 1e-8.
    N = 40_000

    @pytest.mark.parametrize("scale", [3.7 * UNITS, 1000.25])
    def test_is_normal(self, scale: float) -> None:
        drawn = gaussian_noise(self.N, scale=scale) / scale
        assert abs(drawn.mean()) < 6 / np.sqrt(self.N)
        assert abs(drawn.var() - 1) < 6 * np.sqrt(2 / self.N)
        assert stats.kstest(drawn, "norm").statistic < 0.0155

    def test_is_the_nearest_whole_number_where_these_are_far_apart(self) -> None:
        drawn = gaussian_noise(self.N, scale=0.7)
        for value in range(-3, 4):
            expected = np.diff(stats.norm.cdf(np.array([value - 0.5, value + 0.5]) / 0.7))[0]
            error = np.sqrt(expected * (1 - expected) / self.N)
            assert abs((drawn == value).mean() - expected) < 6 * error + 1e-4

    def test_comes_from_no_seed(self) -> None:
        found = []
        for _ in range(2):
            np.random.seed(1)
            found.append(gaussian_noise(4, scale=2.0**40))
        assert not (found[0] == found[1]).any()

    def test_a_noisy_sum_is_a_sum_in_whole_units_with_noise_on_each_coordinate(self) -> None:
        rows, clip = np.full((100, 3), 0.25), 1.0
        drawn = np.array(
            [noisy_sum(rows, clip_norm=clip, noise_multiplier=0.5) for _ in range(2000)]
        )
        assert (drawn * UNITS % 1 == 0).all()
        np.testing.assert_allclose(drawn.mean(axis=0), 25.0, atol=6 * 0.5 / np.sqrt(2000))
        np.testing.assert_allclose(drawn.std(axis=0), 0.5, rtol=0.1)
        assert np.abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 6 / np.sqrt(2000)

    @pytest.mark.border
    def test_its_last_bits_do_not_tell_which_of_two_sums_it_hides(self) -> None:
        # Sums of 0 and of a third of a unit are the same whole number before noise is added.
        here, there = clipped_units([[0.0]], 1.0), clipped_units([[0.3 / UNITS]], 1.0)
        assert here.tolist() == there.tolist() == [[0]]

    @pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
    def test_refuses_no_noise(self, scale: float) -> None:
        with pytest.raises(ValueError, match="noise: found scale"):
            gaussian_noise(1, scale=scale)


def open_ledger(path: Path | None, epsilon: float = 1.0) -> PrivacyLedger:
    return PrivacyLedger(path, epsilon=epsilon, delta=1e-5)


@pytest.mark.border
class TestLedger:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "privacy.jsonl"

    def fill(self, ledger: PrivacyLedger, n: int, *, first: int = 0, of: int = 10) -> None:
        for i in range(first, first + n):
            ledger.release(
                REQUESTS[i], lambda: os.urandom(40), noise_multiplier=noise_multiplier(1, 1e-5, of)
            )

    @pytest.mark.parametrize("in_memory", [True, False])
    def test_the_budget_lasts_for_what_it_was_planned_for_and_no_further(
        self, path: Path, in_memory: bool
    ) -> None:
        ledger = open_ledger(None if in_memory else path)
        self.fill(ledger, 10)
        assert ledger.spent() == pytest.approx(1.0, rel=1e-6)
        assert ledger.spent() <= 1.0
        made: list[int] = []
        with pytest.raises(BudgetSpent, match="needed at most 1") as refused:
            ledger.release(REQUESTS[10], lambda: bytes(made.append(1) or 1), noise_multiplier=1e3)
        assert refused.value.code == "budget_spent"
        assert made == []
        assert ledger.kept(REQUESTS[10]) is None

    def test_the_same_request_is_free_and_gets_the_same_bytes(self, path: Path) -> None:
        ledger = open_ledger(path)
        first = ledger.release(REQUESTS[0], lambda: os.urandom(8), noise_multiplier=4.0)
        spent = ledger.spent()
        for again in (ledger, open_ledger(path)):
            assert again.release(REQUESTS[0], lambda: os.urandom(8), noise_multiplier=4.0) == first
            assert again.spent() == spent

    def test_restarts_other_protocols_and_other_processes_add_up(self, path: Path) -> None:
        first, second = open_ledger(path), open_ledger(path)
        self.fill(first, 4)
        self.fill(second, 4, first=4)
        self.fill(open_ledger(path), 2, first=8)
        for ledger in (first, second, open_ledger(path)):
            with pytest.raises(BudgetSpent):
                self.fill(ledger, 1, first=10)

    def test_threads_cannot_spend_the_same_budget_twice(self, path: Path) -> None:
        refused: list[int] = []

        def spend(i: int) -> None:
            try:
                self.fill(open_ledger(path), 1, first=i)
            except BudgetSpent:
                refused.append(i)

        threads = [threading.Thread(target=spend, args=(i,)) for i in range(15)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 5
        assert open_ledger(path).spent() <= 1.0

    def test_a_release_that_could_not_be_made_costs_nothing(self, path: Path) -> None:
        ledger = open_ledger(path)
        with pytest.raises(ZeroDivisionError):
            ledger.release(REQUESTS[0], lambda: bytes(1 // 0), noise_multiplier=4.0)
        assert ledger.spent() == 0.0

    def test_a_full_disk_releases_nothing_and_leaves_the_ledger_whole(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ledger = open_ledger(path)
        self.fill(ledger, 2)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda file, data, at: os.write(file, b"") or 0)
            with pytest.raises(OSError, match="disk is full"):
                self.fill(ledger, 1, first=2)
        assert ledger.kept(REQUESTS[2]) is None
        self.fill(open_ledger(path), 8, first=2)

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
    def test_a_line_torn_by_a_kill_never_left_and_is_written_again(
        self, path: Path, share: float
    ) -> None:
        self.fill(open_ledger(path), 3)
        head = path.with_name(path.name + ".head")
        before, lines = head.read_bytes(), path.read_bytes()
        self.fill(open_ledger(path), 1, first=3)
        torn = path.read_bytes()[len(lines) : -1]
        path.write_bytes(lines + torn[: int(share * len(torn))])
        head.write_bytes(before)
        ledger = open_ledger(path)
        assert ledger.kept(REQUESTS[3]) is None
        self.fill(ledger, 7, first=3)
        assert open_ledger(path).spent() == pytest.approx(1.0, rel=1e-6)

    def test_a_whole_line_without_its_head_counts(self, path: Path) -> None:
        self.fill(open_ledger(path), 1)
        head = path.with_name(path.name + ".head")
        head.unlink()
        kept = open_ledger(path).kept(REQUESTS[0])
        assert kept is not None
        self.fill(open_ledger(path), 9, first=1)
        with pytest.raises(BudgetSpent):
            self.fill(open_ledger(path), 1, first=10)

    @pytest.mark.parametrize("harm", ["edited", "dropped", "cut", "emptied", "removed", "no_head"])
    def test_a_damaged_ledger_refuses_and_never_starts_afresh(self, path: Path, harm: str) -> None:
        ledger = open_ledger(path)
        self.fill(ledger, 4)
        lines = path.read_bytes().splitlines(keepends=True)
        if harm == "edited":
            path.write_bytes(
                lines[0].replace(b'"n_releases":1', b'"n_releases":0') + b"".join(lines[1:])
            )
        elif harm == "dropped":
            path.write_bytes(b"".join(lines[1:]))
        elif harm == "cut":
            path.write_bytes(b"".join(lines[:3]))
        elif harm == "emptied":
            path.write_bytes(b"")
        elif harm == "removed":
            path.unlink()
        else:
            path.with_name(path.name + ".head").unlink()
        with pytest.raises(LedgerDamaged, match="nothing is released"):
            self.fill(ledger, 1, first=4)
        with pytest.raises(LedgerDamaged, match="nothing is released"):
            open_ledger(path)

    def test_only_its_owner_can_read_it(self, path: Path) -> None:
        self.fill(open_ledger(path), 1)
        assert path.stat().st_mode & 0o077 == 0

    def test_kills_at_any_moment_charge_nothing_twice_and_lose_nothing_that_left(
        self, path: Path
    ) -> None:
        # Whatever was printed has left; the process is killed while it goes on writing.
        code = """
import os, sys
from pathlib import Path
from fusion.differential_privacy import PrivacyLedger
ledger = PrivacyLedger(Path(sys.argv[1]), epsilon=1e3, delta=1e-5)
for i in range(int(sys.argv[2]), 100):
    request = f"{i:064x}"
    kept = ledger.release(request, lambda: os.urandom(3000), noise_multiplier=50.0)
    print(request, kept.hex(), flush=True)
"""
        left: dict[str, str] = {}
        for round_, lines_before_kill in enumerate((3, 5)):
            with subprocess.Popen(
                [sys.executable, "-c", code, str(path), str(max(len(left) - 2, 0))],
                cwd=ROOT, stdout=subprocess.PIPE, text=True,
            ) as process:  # fmt: skip
                assert process.stdout is not None
                for _ in range(lines_before_kill + 2 * (round_ > 0)):
                    request, kept = process.stdout.readline().split()
                    assert left.setdefault(request, kept) == kept
                os.kill(process.pid, signal.SIGKILL)
        ledger = open_ledger(path, epsilon=1e3)
        for request, kept in left.items():
            found = ledger.kept(request)
            assert found is not None
            assert found.hex() == kept
        n_lines = path.read_bytes().count(b"\n")
        requests = {
            line.split(b'"request":"')[1][:64] for line in path.read_bytes().split(b"\n")[:-1]
        }
        assert len(requests) == n_lines
        assert ledger.spent() == pytest.approx(epsilon_spent([(50.0, n_lines)], 1e-5))

    @pytest.mark.parametrize("multiplier", [0.0, -1.0, np.nan, np.inf])
    def test_refuses_a_release_without_noise(self, multiplier: float) -> None:
        with pytest.raises(ValueError, match="noise above 0"):
            open_ledger(None).release(REQUESTS[0], bytes, noise_multiplier=multiplier)

    def test_refuses_a_request_that_is_no_digest(self) -> None:
        with pytest.raises(ValueError, match="64 hex digits"):
            open_ledger(None).release("a patient", bytes, noise_multiplier=1.0)


def test_the_library_of_accounting_is_loaded_only_when_needed() -> None:
    code = "import sys, fusion.differential_privacy; print('dp_accounting' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"


def test_one_file_imports_the_library_of_accounting() -> None:
    importers = [
        path.name
        for path in ROOT.glob("f*/**/*.py")
        if "dp_accounting" in path.read_text(encoding="utf-8")
    ]
    assert importers == ["differential_privacy.py"]
