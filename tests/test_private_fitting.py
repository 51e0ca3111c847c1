from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fusion import messages as m
from fusion.differential_privacy import UNITS, Budget, PrivacyLedger, clipped_units, epsilon_spent
from fusion.evaluation import concordance_index, pair_counts
from fusion.federation.designs import NotReleased
from fusion.federation.plan import PROTOCOL
from fusion.federation.private_fitting import (
    ONE_SHOT_EPSILON,
    OPENING,
    NoisySteps,
    Opening,
    PrivateFit,
    PrivateTalk,
    Schedule,
    SitePrivacy,
    Stepped,
    cells,
    fit_privately,
    n_steps,
    own_scaling,
    schedule,
)
from fusion.federation.rows import Outcome
from fusion.survival import fit_cox, interval_sums
from tests.strategies import Survival, survival

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.border

EDGES = np.array([250.0, 500.0, 900.0, 1500.0])
ALMOST_NO_NOISE = Budget(epsilon=1e6, clip_norm=60.0)
EFFECTS = np.array([0.8, -0.5, 0.3])


def draw_site(n: int, seed: int, *, level: float = 0.0) -> tuple[np.ndarray, Outcome]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, len(EFFECTS)))
    days = 900 * rng.exponential(size=n) * np.exp(-level - x @ EFFECTS) + 1
    censored = rng.uniform(200, 1500, n)
    return x, Outcome(days <= censored, np.minimum(days, censored))


SITES = [draw_site(n, i, level=0.3 * i) for i, n in enumerate((150, 120, 180))]
WHOLE = np.vstack([x for x, _ in SITES])
EVENT = np.concatenate([y.event for _, y in SITES])
TIME = np.concatenate([y.time for _, y in SITES])
SITE = np.repeat(np.arange(3), [len(y) for _, y in SITES])


def ledger_of(plan: Schedule, path: Path | None = None) -> PrivacyLedger:
    return PrivacyLedger(path, epsilon=plan.budget.epsilon, delta=plan.budget.delta)


def site_end(
    plan: Schedule, at: int = 0, ledger: PrivacyLedger | None = None, run: str = "run"
) -> SitePrivacy:
    return SitePrivacy(
        plan,
        ledger_of(plan) if ledger is None else ledger,
        label=(run, "cohort"),
        outcome=SITES[at][1],
        edges_days=EDGES,
    )


def ask_of(ends: list[SitePrivacy]) -> Any:
    n_events = sum(end.opening() for end in ends)

    def ask(number: int, at: Mapping[str, np.ndarray]) -> dict[str, Stepped]:
        return {
            fit: Stepped(
                sum(
                    end.step(fit, number, beta, inputs=x, outcome=y)
                    for end, (x, y) in zip(ends, SITES, strict=True)
                ),
                float(len(TIME)),
                n_events,
                len(ends),
            )
            for fit, beta in at.items()
        }

    return ask


def fit_all(plan: Schedule, ends: list[SitePrivacy] | None = None) -> PrivateFit:
    fit = PrivateFit(3)
    ends = [site_end(plan, i) for i in range(3)] if ends is None else ends
    fit_privately(ask_of(ends), {PROTOCOL: fit}, plan)
    return fit


@pytest.fixture(scope="module")
def poisson() -> np.ndarray:
    """Coefficients of the piecewise-exponential model by an independent library."""
    events, days = cells(EVENT, TIME, EDGES)
    rows, intervals = np.nonzero(days > 0)
    own = SITE[rows] * len(EDGES) + intervals
    design = np.hstack([WHOLE[rows], np.eye(3 * len(EDGES))[own]])
    offset = np.log(days[rows, intervals])
    model = sm.GLM(events[rows, intervals], design, sm.families.Poisson(), offset=offset)
    return np.asarray(model.fit().params[:3])


@given(survival(), st.lists(st.integers(1, 80), min_size=1, max_size=5, unique=True))
def test_cells_add_up_to_events_and_exposure_per_interval(rows: Survival, edges: list[int]) -> None:
    right = np.sort(edges).astype(float)
    events, days = cells(rows.event, rows.time, right)
    expected = interval_sums(np.zeros(len(rows.time)), rows.event, rows.time, right)
    np.testing.assert_allclose(events.sum(axis=0), expected[0])
    np.testing.assert_allclose(days.sum(axis=0), expected[1])


def steps_of(x: np.ndarray, outcome: Outcome) -> NoisySteps:
    opening = Opening(40.0, -6.5, np.full(len(EDGES), 20.0))
    return NoisySteps(x, outcome.event, outcome.time, edges_days=EDGES, opening=opening)


def test_gradients_are_those_of_the_log_likelihood() -> None:
    x, outcome = SITES[0]
    events, days = cells(outcome.event, outcome.time, EDGES)
    steps, beta = steps_of(x, outcome), np.array([0.3, -0.1, 0.2])

    def log_likelihood(theta: np.ndarray) -> float:
        log_rate = theta[3:] + (x @ theta[:3])[:, None]
        return float(np.sum(events * log_rate - days * np.exp(log_rate)))

    at, h = np.concatenate([beta, steps.path[-1]]), 1e-5
    numerical = [
        (log_likelihood(at + h * e) - log_likelihood(at - h * e)) / (2 * h) for e in np.eye(len(at))
    ]
    np.testing.assert_allclose(steps.gradients(beta).sum(axis=0), numerical, rtol=1e-6, atol=1e-5)


@pytest.mark.border
@given(
    survival(),
    st.floats(0.1, 10),
    st.lists(st.floats(-300, 300), min_size=3, max_size=3),
    st.data(),
)
@settings(max_examples=50)
def test_one_patient_moves_a_step_by_at_most_the_clip_norm_at_any_coefficients(
    rows: Survival, clip: float, beta: list[float], data: st.DataObject
) -> None:
    steps = steps_of(rows.inputs, Outcome(rows.event, rows.time * 20))
    gradients = steps.gradients(np.array(beta))
    left_out = data.draw(st.integers(0, len(gradients) - 1))
    whole = clipped_units(gradients, clip).sum(axis=0).tolist()
    without = clipped_units(np.delete(gradients, left_out, axis=0), clip).sum(axis=0).tolist()
    assert sum((a - b) ** 2 for a, b in zip(whole, without, strict=True)) <= UNITS**2


@pytest.mark.border
def test_the_sites_own_intervals_follow_from_noisy_sums_alone() -> None:
    noisy = np.random.default_rng(0).normal(0, 20, 3 + len(EDGES))
    mine, others = steps_of(*SITES[0]), steps_of(*SITES[1])
    np.testing.assert_array_equal(mine.take(noisy), others.take(noisy))
    np.testing.assert_array_equal(mine.path, others.path)
    assert (mine.path[-1] != -6.5).all()


@pytest.mark.border
def test_no_attacker_tells_an_extreme_patient_better_than_the_noise_allows() -> None:
    x, outcome = SITES[0]
    x = np.vstack([x, [[1e4, -1e4, 1e4]]])
    outcome = Outcome(np.append(outcome.event, True), np.append(outcome.time, 1.0))
    clip, multiplier, n = 2.0, 1.4, 600
    with_patient = steps_of(x, outcome).gradients(np.zeros(3))
    direction = with_patient[-1] / np.linalg.norm(with_patient[-1])
    seen = []
    for rows in (with_patient, with_patient[:-1]):
        units = clipped_units(rows, clip).sum(axis=0) * (clip / UNITS)
        noise = np.array([_noise(len(direction), multiplier * clip) for _ in range(n)])
        seen.append((units + noise) @ direction)
    auc = float(np.mean(seen[0][:, None] > seen[1][None, :]))
    assert abs(auc - norm.cdf(1 / multiplier / np.sqrt(2))) < 0.08


def _noise(n: int, scale: float) -> np.ndarray:
    from fusion.differential_privacy import gaussian_noise

    return gaussian_noise(n, scale=scale * UNITS) / UNITS


class TestSchedule:
    @given(st.floats(0.1, 30), st.integers(1, 6))
    @settings(max_examples=25, deadline=None)
    def test_all_releases_together_spend_the_budget_and_no_more(
        self, epsilon: float, n_fits: int
    ) -> None:
        plan = schedule(Budget(epsilon=epsilon), [f"fit_{i}" for i in range(n_fits)])
        releases = [(plan.opening, 1), (plan.step, plan.steps * n_fits), (plan.baseline, 1)]
        spent = epsilon_spent(releases, plan.budget.delta)
        assert 0.999999 * epsilon <= spent <= epsilon

    def test_steps_grow_with_the_budget(self) -> None:
        found = [n_steps(x) for x in (0.1, ONE_SHOT_EPSILON, 1.1, 3.0, 8.0, 1e3)]
        assert found == [1, 1, 4, 6, 16, 20]

    def test_refuses_no_fit_and_no_budget(self) -> None:
        with pytest.raises(ValueError, match="needed at least the fusion model"):
            schedule(Budget(epsilon=1.0), [])
        with pytest.raises(ValueError, match="needed epsilon above 0"):
            schedule(Budget(), [PROTOCOL])


class TestFit:
    def test_with_a_huge_budget_it_is_the_piecewise_exponential_fit(
        self, poisson: np.ndarray
    ) -> None:
        plan = schedule(ALMOST_NO_NOISE, [PROTOCOL], steps=60)
        found = fit_all(plan).coefficients
        np.testing.assert_allclose(found, poisson, atol=2e-3)

    def test_and_ranks_patients_as_the_cox_model_does(self) -> None:
        found = fit_all(schedule(ALMOST_NO_NOISE, [PROTOCOL])).coefficients
        cox = fit_cox(WHOLE, EVENT, TIME, strata=SITE).candidate
        x, y = draw_site(1500, 99)
        private, plain = (
            concordance_index(pair_counts(x @ beta, y.event, y.time)).value for beta in (found, cox)
        )
        assert abs(private - plain) < 0.002

    def test_at_epsilon_three_it_still_points_the_same_way(self) -> None:
        cosines = []
        for _ in range(3):
            found = fit_all(schedule(Budget(epsilon=3.0), [PROTOCOL])).coefficients
            cosines.append(found @ EFFECTS / np.linalg.norm(found) / np.linalg.norm(EFFECTS))
        # The lowest of 120 fits was 0.987.
        assert np.median(cosines) > 0.9

    def test_one_shot_is_one_newton_step_from_no_effect(self) -> None:
        plan = schedule(ALMOST_NO_NOISE, [PROTOCOL], steps=1)
        ends = [site_end(plan, i) for i in range(3)]
        ask, fit = ask_of(ends), PrivateFit(3, ridge=0.1)
        fit_privately(ask, {PROTOCOL: fit}, plan)
        again = ask(1, {PROTOCOL: np.zeros(3)})[PROTOCOL]
        expected = again.gradient / (again.n_events + 0.1 * again.n_patients)
        assert np.sqrt(np.diag(fit.covariance)).min() > np.abs(expected).min()
        np.testing.assert_allclose(fit.coefficients, expected)

    def test_noise_widens_the_covariance_by_its_own_variance(self) -> None:
        def covariance(noise: float) -> np.ndarray:
            # The same gradients each time: drawn ones would move the estimate, too.
            fit = PrivateFit(3, ridge=0.1)
            for _ in range(4):
                gradient = 300 * (EFFECTS - fit.coefficients)
                fit.advance(Stepped(gradient, 500.0, 300.0, n_sites=4), noise=noise)
            fit.finish()
            return fit.covariance

        # Of four sites, averaged over two steps, through the inverse of curvature and penalty.
        expected = 4 * 25.0**2 / 2 / (300 + 0.1 * 500) ** 2 * np.eye(3)
        wide = covariance(25.0) - covariance(1e-9)
        np.testing.assert_allclose(wide, expected, rtol=1e-9, atol=1e-15)

    def test_covariance_is_one_whatever_the_noise_drawn(self) -> None:
        for epsilon in (1.5, 3.0, 1e4):
            found = fit_all(schedule(Budget(epsilon=epsilon), [PROTOCOL], steps=4)).covariance
            np.testing.assert_allclose(found, found.T)
            assert (np.linalg.eigvalsh(found) > 0).all()

    def test_standard_errors_cover_the_truth_where_inputs_are_independent(self) -> None:
        z = []
        for seed in range(60):
            rng = np.random.default_rng(seed)
            beta = np.array([0.4, -0.3])
            at = np.zeros(2)
            fit = PrivateFit(2)
            root = 300**0.5 * np.eye(2)
            observed = root @ root @ beta + root @ rng.normal(size=2)
            for _ in range(6):
                at = fit.coefficients
                gradient = observed - root @ root @ at + rng.normal(0, 25, 2)
                fit.advance(Stepped(gradient, 500.0, 300.0, 1), noise=25.0)
            fit.finish()
            z += list((fit.coefficients - beta) / np.sqrt(np.diag(fit.covariance)))
        assert 0.7 < np.std(z) < 1.3

    def test_curvature_is_learnt_where_inputs_go_together(self) -> None:
        # With the first curvature alone each step overshoots eightfold.
        information = 300 * (0.1 * np.eye(10) + 0.9)
        beta = np.linspace(-0.2, 0.3, 10)
        fit = PrivateFit(10)
        for _ in range(200):
            gradient = information @ (beta - fit.coefficients)
            fit.advance(Stepped(gradient, 500.0, 300.0, 1), noise=1e-9)
        fit.finish()
        np.testing.assert_allclose(fit.coefficients, beta, atol=1e-3)


@pytest.mark.border
class TestSiteEnd:
    @pytest.fixture
    def plan(self) -> Schedule:
        return schedule(Budget(epsilon=3.0), [PROTOCOL, "rna"])

    def step(self, end: SitePrivacy, number: int, beta: float = 0.0, fit: str = PROTOCOL) -> Any:
        x, y = SITES[0]
        return end.step(fit, number, np.full(3, beta), inputs=x, outcome=y)

    def refused(self, *arguments: Any) -> str:
        with pytest.raises(NotReleased) as refusal:
            self.step(*arguments)
        return refusal.value.code

    def test_a_whole_study_spends_its_budget_and_the_next_is_refused(self, plan: Schedule) -> None:
        ledger = ledger_of(plan)
        end = site_end(plan, ledger=ledger)
        for number in range(1, plan.steps + 1):
            for fit in plan.fits:
                self.step(end, number, 0.01 * number, fit)
        end.intervals(np.full(3, 0.1), SITES[0][0])
        assert ledger.spent() == pytest.approx(3.0, rel=1e-6)
        with pytest.raises(NotReleased, match="budget_spent"):
            site_end(plan, ledger=ledger, run="another").opening()

    def test_the_same_step_again_is_free_and_the_same(self, plan: Schedule) -> None:
        ledger = ledger_of(plan)
        end = site_end(plan, ledger=ledger)
        first = self.step(end, 1)
        second, spent = self.step(end, 2, 0.1), ledger.spent()
        np.testing.assert_array_equal(self.step(end, 1), first)
        np.testing.assert_array_equal(self.step(end, 2, 0.1), second)
        assert ledger.spent() == spent

    def test_a_step_at_other_coefficients_is_refused_and_costs_nothing(
        self, plan: Schedule
    ) -> None:
        ledger = ledger_of(plan)
        end = site_end(plan, ledger=ledger)
        self.step(end, 1)
        spent = ledger.spent()
        assert self.refused(end, 1, 0.5) == "already_answered"
        assert ledger.spent() == spent

    @pytest.mark.parametrize(
        ("number", "fit", "code"),
        [
            (0, PROTOCOL, "rounds_spent"),
            (7, PROTOCOL, "rounds_spent"),
            (1, "ct", "rounds_spent"),
            (3, PROTOCOL, "malformed_request"),
        ],
    )
    def test_what_the_schedule_has_not_is_refused(
        self, plan: Schedule, number: int, fit: str, code: str
    ) -> None:
        ledger = ledger_of(plan)
        assert self.refused(site_end(plan, ledger=ledger), number, 0.0, fit) == code
        assert ledger.spent() < 1.0

    def test_a_baseline_before_the_last_step_is_refused(self, plan: Schedule) -> None:
        with pytest.raises(NotReleased, match="malformed_request"):
            site_end(plan).intervals(np.ones(3), SITES[0][0])

    def test_a_restarted_site_goes_on_where_it_was(self, plan: Schedule, tmp_path: Path) -> None:
        path = tmp_path / "privacy.jsonl"
        end = site_end(plan, ledger=ledger_of(plan, path))
        for number in (1, 2, 3):
            self.step(end, number, 0.1 * number)
        restarted = site_end(plan, ledger=ledger_of(plan, path))
        self.step(end, 4, 0.4)
        found = self.step(restarted, 4, 0.4)
        np.testing.assert_array_equal(found, self.step(end, 4, 0.4))
        np.testing.assert_array_equal(restarted._fits[PROTOCOL].path, end._fits[PROTOCOL].path)

    def test_a_run_that_starts_over_ends_with_the_same_bits_and_costs_nothing(
        self, tmp_path: Path
    ) -> None:
        plan = schedule(Budget(epsilon=2.0), [PROTOCOL])
        ledgers = [ledger_of(plan, tmp_path / f"{i}.jsonl") for i in range(3)]
        fits, spent = [], []
        for _ in range(2):
            fit = fit_all(plan, [site_end(plan, i, ledgers[i]) for i in range(3)])
            fits.append(fit.coefficients)
            spent.append([ledger.spent() for ledger in ledgers])
        np.testing.assert_array_equal(*fits)
        assert spent[0] == spent[1]

    def test_another_run_gets_other_noise_and_pays_for_it(self, plan: Schedule) -> None:
        ledger = PrivacyLedger(None, epsilon=100.0, delta=1e-5)
        one = self.step(site_end(plan, ledger=ledger), 1)
        spent = ledger.spent()
        other = self.step(site_end(plan, ledger=ledger, run="another"), 1)
        assert not (one == other).any()
        assert ledger.spent() > spent


def test_with_a_huge_budget_the_baseline_is_that_of_the_rows() -> None:
    plan = schedule(Budget(epsilon=1e6, clip_norm=15.0), [PROTOCOL])
    ends = [site_end(plan, i) for i in range(3)]
    beta = fit_all(plan, ends).coefficients
    for end, (x, y) in zip(ends, SITES, strict=True):
        events, exposure, risk = end.intervals(beta, x)
        expected = interval_sums(x @ beta, y.event, y.time, EDGES)
        np.testing.assert_allclose(events / exposure, expected[0] / expected[1], rtol=0.15)
        np.testing.assert_allclose(risk[:2], [len(x), (x @ beta).mean()], atol=0.02)
        assert risk[2] == pytest.approx(((x @ beta) ** 2).sum(), rel=0.05)


def test_what_leaves_of_a_baseline_is_never_negative() -> None:
    plan = schedule(Budget(epsilon=0.05), [PROTOCOL])
    end = site_end(plan)
    end.step(PROTOCOL, 1, np.zeros(3), inputs=SITES[0][0], outcome=SITES[0][1])
    events, exposure, risk = end.intervals(np.ones(3), SITES[0][0])
    assert (events >= 0).all()
    assert (exposure >= 0).all()
    assert risk[2] > 0


def test_an_opening_is_held_within_what_the_number_of_patients_allows() -> None:
    for noisy in (np.full(8, -500.0), np.full(8, 500.0)):
        opening = Opening.read(noisy, 100, 1500.0)
        assert 5.0 <= opening.n_events <= 100.0
        assert (opening.precision > 0).all()
        assert np.isfinite(opening.log_rate)
    part = opening.for_part(0.5)
    assert part.n_events == 50.0
    assert part.log_rate == opening.log_rate


def test_own_scaling_leaves_absent_values_out() -> None:
    mean, scale = own_scaling([[1.0, 5.0], [3.0, np.nan], [5.0, 5.0]])
    np.testing.assert_allclose(mean, [3.0, 5.0])
    np.testing.assert_allclose(scale, [2.0, 1.0])


class TestTalk:
    """The coordinator's end, over a conversation that adds up or keeps sites apart."""

    def talk(self, ends: list[SitePrivacy], *, secure: bool) -> Any:
        plan = SimpleNamespace(run="a" * 64, n_coefficients=lambda fit: 3)
        names = tuple(f"site-{i}" for i in range(3))
        outcomes = {
            s: SimpleNamespace(n_train=len(y), contributes=("rna",) if s != "site-2" else ())
            for s, (_, y) in zip(names, SITES, strict=True)
        }

        def collect_all(request: m.AskPrivateSteps, expected: type, *, stage: str) -> Any:
            assert expected is m.PrivateSteps
            assert m.decode(m.encode(request)).step == request.step  # type: ignore[union-attr]
            replies = {
                s: m.PrivateSteps(self.answer(end, request, at))
                for at, (s, end) in enumerate(zip(names, ends, strict=True))
            }
            total = sum(r.gradient for r in replies.values())
            return {"consortium": m.PrivateSteps(total)} if secure else replies

        return SimpleNamespace(
            plan=plan, roster=names, outcomes=outcomes, number=1, collect_all=collect_all,
            round_done=lambda: None,
        )  # fmt: skip

    def answer(self, end: SitePrivacy, request: m.AskPrivateSteps, at: int) -> np.ndarray:
        gradient = np.zeros_like(request.coefficients)
        if request.step == OPENING:
            gradient[0, 0] = end.opening()
            return gradient
        x, y = SITES[at]
        for row, fit in enumerate(request.fits):
            if fit == PROTOCOL or at < 2:
                beta = request.coefficients[row]
                gradient[row] = end.step(fit, request.step, beta, inputs=x, outcome=y)
        return gradient

    @pytest.mark.parametrize("secure", [False, True])
    def test_all_fits_advance_together(self, secure: bool, poisson: np.ndarray) -> None:
        plan = schedule(ALMOST_NO_NOISE, [PROTOCOL, "rna"], steps=30)
        asked = PrivateTalk(self.talk([site_end(plan, i) for i in range(3)], secure=secure))
        asked.open()
        assert asked.n_events == pytest.approx(EVENT.sum(), abs=20)
        fits = {PROTOCOL: PrivateFit(3), "rna": PrivateFit(3)}
        fit_privately(asked, fits, plan)
        np.testing.assert_allclose(fits[PROTOCOL].coefficients, poisson, atol=0.02)
        assert fits["rna"].n_patients == len(SITES[0][1]) + len(SITES[1][1])
        assert np.linalg.norm(fits["rna"].coefficients - poisson) < 0.3


def test_the_benchmark_prints_what_each_budget_loses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    path = folder / "differential_privacy.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_noise", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.main(["--seeds", "1", "--patients", "300"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {f"{x:g}" for x in module.EPSILONS} <= set(found["loss_by_epsilon"])
    multipliers = list(found["noise_multiplier_of_one_release"].values())
    assert multipliers == sorted(multipliers)
    assert 0.5 < found["without_noise"]["median"] < 1.0
