r"""What honest sums can be: bounds that a broken or malicious site's replies break.

Two kinds of bounds, neither of which trusts a site. *Counts* follow from what a site said of itself
before. *Inequalities of the likelihood* hold for every set of rows there is, so that a reply that
breaks one is no sum over rows; they hold for totals too, since they are closed under addition.
Rows that are rows, but wrong, are a matter of :mod:`fusion.federation.alarms`.

For a Cox model with :math:`d` events among :math:`n` patients, at :math:`\beta = 0`:

- the :math:`i`-th event's risk set holds at most :math:`n - i + 1` and at least
  :math:`d - i + 1` patients, hence
  :math:`-\log\{n!/(n-d)!\} \le \ell(0) \le -\log d!`;
- one of :math:`k` values lies within :math:`\sqrt{k - 1}` standard deviations of their mean
  (Samuelson), hence by Cauchy and Schwarz
  :math:`g^\top I^{-} g \le \sum_{i \le d} (n - i)`;
- the first risk set's variance alone bounds how far two patients' log hazards differ along
  :math:`h`: :math:`r(h)^2 \le 2 n\, h^\top I(0) h`.

At every :math:`\beta` the log-likelihood is at most 0 and concave, and along a step
:math:`\Delta` its curvature changes by at most :math:`e^{r(\Delta)}`, because the third cumulant of
a bounded variable is at most its range times its variance [1]_. Values, gradients and information
of two replies then determine each other the more closely the shorter the step, so that a site
cannot change one of them alone: it can lie only about its rows.

The discrete-time model is concave and self-concordant in the same sense, its intercept of the site
profiled out, with twice the largest change of a log odds in place of :math:`r`.

References
----------
.. [1] Bach F. Self-concordant analysis for logistic regression. Electronic Journal of Statistics
   2010;4:384-414.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, Protocol

import numpy as np
from scipy.special import gammaln

from fusion import messages as m
from fusion.federation.plan import CALIBRATION_SLOPE, PROTOCOL, fold_of
from fusion.newton import LikelihoodSums

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from fusion.evaluation import PairCounts
    from fusion.federation.conversation import SiteOutcome
    from fusion.federation.plan import FederationPlan
    from fusion.newton import NewtonFit

    Floats = NDArray[np.float64]

Reason = Literal[
    "counts_disagree",
    "not_finite",
    "log_likelihood_impossible",
    "gradient_too_long",
    "information_indefinite",
    "information_too_large",
    "not_concave",
    "curvature_disagrees",
    "moments_impossible",
    "exposure_impossible",
    "pairs_impossible",
]

# Sums this low stand for those that one patient outweighs; a total holds one such part or more.
_LOWEST: Final = -1e11
# What rounding and fixed point may do, per patient and beside the size of what is compared.
_ROUNDING: Final = 1e-8
# Beyond it e^reach bounds nothing.
_FARTHEST: Final = 50.0
_OTHER_UNIT: Final = 100.0


class BoundsBroken(RuntimeError):
    """Totals that no rows can have, of sites that nobody can tell apart."""


@dataclass(frozen=True)
class Behind:
    """Who stands behind a reply or a total, by what the sites said of themselves.

    Attributes
    ----------
    n_patients, n_events
        At most. Exactly so many patients where ``exact``, and events where ``every_event``: a grid
        ends before the last ones.
    n_sites
        Strata, none of them empty.
    largest
        Patients of the largest site.
    n_pooled
        Training patients of all sites, whose values the inputs of an arm were scaled by.
    """

    n_patients: int
    n_events: int
    n_sites: int
    largest: int
    n_pooled: int
    exact: bool
    every_event: bool


@dataclass(frozen=True)
class _Kind:
    """Which coefficients of a fit are of known size: the first ones and the last ones."""

    n_baseline: int
    n_flags: int
    is_arm: bool


@dataclass
class _Said:
    """What was said before about one set of rows."""

    last: tuple[Floats, LikelihoodSums] | None = None
    spread: Floats | None = None  # (p, p) Cox information at 0
    n_patients: int = 0


class Known(Protocol):
    """What a coordinator knows of a run: its plan, and what each site said of itself."""

    @property
    def plan(self) -> FederationPlan:
        """On the grid that the run agreed on."""

    @property
    def outcomes(self) -> Mapping[str, SiteOutcome]:
        """Per site its counts."""


@dataclass(frozen=True)
class Fault:
    """A bound that a reply breaks, and the fit or the kind of message that breaks it."""

    what: str
    reason: Reason


@dataclass
class Watch:
    """Holds every reply to the bounds, and to what its sites said before.

    Attributes
    ----------
    known
        Read anew at each check.

    Notes
    -----
    All fits of one design are sums of one function of the coefficients, so that what a site says
    while a penalty is chosen binds it in the fit itself; fits that leave a fold out are each one.
    """

    known: Known
    _said: dict[tuple[frozenset[str], str, int | None], _Said] = field(
        default_factory=lambda: defaultdict(_Said)
    )

    @property
    def plan(self) -> FederationPlan:
        """What every party approved, on the grid that the run agreed on."""
        return self.known.plan

    def judge(self, request: m.Message, reply: m.Message, sites: Sequence[str]) -> Fault | None:
        """Check a reply of one site, or the total of several.

        Returns
        -------
        Fault or None
            None for honest replies, whatever the rows, and for messages without sums.
        """
        kind, outcomes = type(reply).__name__, self.known.outcomes
        reason: Reason | None = None
        if isinstance(request, m.AskSums) and isinstance(reply, m.Sums):
            return self._sums_fault(request, reply, sites)
        if isinstance(reply, m.Description):
            reason = description_fault(reply)
        elif isinstance(reply, m.DesignMoments):
            reason = moments_fault(reply, self.behind(sites, PROTOCOL))
        elif isinstance(reply, m.Intervals) and not self.plan.private:
            reason = intervals_fault(reply, self.behind(sites, PROTOCOL), self.plan.edges_days)
        elif isinstance(reply, m.Evaluation):
            reason = evaluation_fault(reply, outcomes[sites[0]])
        return None if reason is None else Fault(kind, reason)

    def _sums_fault(self, request: m.AskSums, reply: m.Sums, sites: Sequence[str]) -> Fault | None:
        for row, fit in enumerate(request.fits):
            p = self.plan.n_coefficients(fit)
            sums = LikelihoodSums(
                float(reply.log_likelihood[row]),
                reply.gradient[row, :p],
                reply.information[row, :p, :p],
                int(reply.n_patients[row]),
                int(reply.n_events[row]),
            )
            reason = self.check(sites, fit, request.coefficients[row, :p], sums)
            if reason is not None:
                return Fault(fit, reason)
        return None

    def check(
        self, sites: Sequence[str], fit: str, coefficients: Floats, sums: LikelihoodSums
    ) -> Reason | None:
        """Say which bound a reply breaks.

        Parameters
        ----------
        sites
            One, or all those whose sums were added.
        fit
            Name of the fit.
        coefficients
            (p,) at which the sums were asked for.
        sums
            What came back.

        Returns
        -------
        str or None
            None for honest sums, whatever the rows. Sums that say that one patient outweighs them
            pass, but not at 0, where all patients weigh alike.
        """
        behind, kind = self.behind(sites, fit), self._kind(fit, len(coefficients))
        said = self._of(sites, fit)
        reason = _counts_fault(sums, behind, said)
        if reason is not None or behind.n_patients == 0:
            return reason
        at_zero = not coefficients.any()
        if sums.log_likelihood <= _LOWEST:
            # At 0 all patients weigh alike, and no fit could begin from it.
            return "log_likelihood_impossible" if at_zero else None
        reason = _alone_fault(sums, behind, kind) or (
            _zero_fault(sums, behind, kind) if at_zero else None
        )
        if reason is None and at_zero and kind.n_baseline == 0:
            said.spread = sums.information
        reason = reason or _against_spread_fault(sums, behind, self._spread(sites, fit))
        if reason is None and said.last is not None:
            reach = self._reach(sites, fit, coefficients - said.last[0])
            reason = consistency_fault(said.last, (coefficients, sums), reach)
        if reason is None:
            said.last, said.n_patients = (coefficients, sums), sums.n_patients
        return reason

    def behind(self, sites: Sequence[str], fit: str) -> Behind:
        """Who may stand behind a fit of these sites."""
        design = fit.partition("/")[0]
        found = [self.known.outcomes[s] for s in sites]
        shared = design in self.plan.sums
        if design == CALIBRATION_SLOPE:
            counts = [(x.n_test, x.n_test_events) for x in found]
        else:
            counts = [
                (x.n_train, x.n_train_events)
                for x in found
                if not shared or design in x.contributes
            ]
        return Behind(
            n_patients=sum(n for n, _ in counts),
            n_events=sum(d for _, d in counts),
            n_sites=len(counts),
            largest=max((n for n, _ in counts), default=0),
            n_pooled=sum(x.n_train for x in self.known.outcomes.values()),
            exact=not shared,
            every_event=not shared and self.plan.fusion_model != "logistic_hazard",
        )

    def _kind(self, fit: str, p: int) -> _Kind:
        design = fit.partition("/")[0]
        if design in self.plan.sums or design == CALIBRATION_SLOPE:
            return _Kind(0, 0, is_arm=False)
        return _Kind(p - self.plan.n_fusion_inputs, len(self.plan.modalities), is_arm=True)

    def _of(self, sites: Sequence[str], fit: str) -> _Said:
        return self._said[frozenset(sites), fit.partition("/")[0], fold_of(fit)]

    def _spread(self, sites: Sequence[str], fit: str) -> Floats | None:
        """(p, p) Cox information at 0 of these sites, or of more: it only grows with sites."""
        key = (fit.partition("/")[0], fold_of(fit))
        of_these = self._of(sites, fit).spread
        if of_these is not None:
            return of_these
        for (others, *other_key), said in self._said.items():
            if tuple(other_key) == key and others >= set(sites) and said.spread is not None:
                return said.spread
        return None

    def _reach(self, sites: Sequence[str], fit: str, step: Floats) -> float:
        """How much a step can change the difference of two patients' log hazards, at most."""
        kind, behind = self._kind(fit, len(step)), self.behind(sites, fit)
        reach = np.inf
        spread = self._spread(sites, fit)
        if spread is not None:
            squared = 2.0 * behind.largest * float(step @ spread @ step)
            reach = float(np.sqrt(max(squared, 0.0)))
        if not kind.is_arm:
            return reach
        k, m_flags = kind.n_baseline, kind.n_flags
        of_inputs = float(np.abs(step[k:-m_flags]).sum())
        of_flags = float(np.abs(step[-m_flags:]).sum())
        if k:
            # An input of unit variance over n patients is nowhere above sqrt(n).
            largest = np.sqrt(behind.n_pooled) * of_inputs + of_flags
            return 2.0 * (float(np.abs(step[:k]).max()) + largest)
        return min(reach, float(np.sqrt(2.0 * behind.n_pooled)) * of_inputs + of_flags)


def _counts_fault(sums: LikelihoodSums, behind: Behind, said: _Said) -> Reason | None:
    n, d = sums.n_patients, sums.n_events
    if behind.n_patients == 0:
        silent = n == d == 0 and sums.log_likelihood == 0.0 and not sums.gradient.any()
        return None if silent and not sums.information.any() else "counts_disagree"
    agrees = 0 < d <= n <= behind.n_patients and d <= behind.n_events
    if behind.exact:
        agrees &= n == behind.n_patients
    if behind.every_event:
        agrees &= d == behind.n_events
    if said.n_patients:
        agrees &= n == said.n_patients
    return None if agrees else "counts_disagree"


def _alone_fault(sums: LikelihoodSums, behind: Behind, kind: _Kind) -> Reason | None:
    """Check what holds of one reply at any coefficients."""
    gradient, information = sums.gradient, sums.information
    if not all(np.isfinite(x).all() for x in (sums.log_likelihood, gradient, information)):
        return "not_finite"
    if sums.log_likelihood > _ROUNDING:
        return "log_likelihood_impossible"
    if not _is_semidefinite(information):
        return "information_indefinite"
    # A flag is 0 or 1, and so is a patient's part in an interval.
    n, d, k = sums.n_patients, sums.n_events, kind.n_baseline
    steepest = np.concatenate([np.full(k, n), np.full(kind.n_flags, n * k if k else d)])
    known = np.r_[np.arange(k), np.arange(len(gradient) - kind.n_flags, len(gradient))]
    if (np.abs(gradient[known]) > steepest * (1 + _ROUNDING) + _ROUNDING).any():
        return "gradient_too_long"
    if (np.diag(information)[known] > steepest / 4 * (1 + _ROUNDING) + _ROUNDING).any():
        return "information_too_large"
    return None


def _is_semidefinite(information: Floats) -> bool:
    slack = _ROUNDING * (1.0 + float(np.abs(np.diag(information)).sum()))
    if np.abs(information - information.T).max(initial=0.0) > slack:
        return False
    lowest = np.linalg.eigvalsh((information + information.T) / 2)[0] if len(information) else 0.0
    return bool(lowest >= -slack)


def log_likelihood_at_zero(n_patients: int, n_events: int, n_sites: int = 1) -> tuple[float, float]:
    r"""Bounds of a stratified Cox log-likelihood at coefficients of 0.

    Pooling strata only enlarges risk sets, so that the lower bound is that of one stratum. The
    upper one, :math:`-\sum_s \log d_s!`, is largest where events are spread evenly.
    """
    lowest = gammaln(n_patients - n_events + 1) - gammaln(n_patients + 1)
    return float(lowest), float(-n_sites * gammaln(n_events / n_sites + 1))


def _zero_fault(sums: LikelihoodSums, behind: Behind, kind: _Kind) -> Reason | None:
    """Check what holds of a reply at coefficients of 0."""
    n, d, k = sums.n_patients, sums.n_events, kind.n_baseline
    if k:
        # Fair odds in every interval are the worst that the best intercept can do.
        low, high = -n * k * np.log(2.0), 0.0
        most = 4.0 * n * k
    else:
        low, high = log_likelihood_at_zero(n, d, behind.n_sites)
        most = d * (n - 1) - d * (d - 1) / 2
    slack = _ROUNDING * (1.0 - low)
    if not low - slack <= sums.log_likelihood <= high + slack:
        return "log_likelihood_impossible"
    values, vectors = np.linalg.eigh(sums.information)
    floor = _ROUNDING * (1.0 + float(values.sum()))
    decrement = float(np.sum((vectors.T @ sums.gradient) ** 2 / np.maximum(values, floor)))
    return "gradient_too_long" if decrement > most * (1 + _ROUNDING) + _ROUNDING else None


def _against_spread_fault(
    sums: LikelihoodSums, behind: Behind, spread: Floats | None
) -> Reason | None:
    """Hold a Cox model's derivatives to the range of each input, which I(0) bounds."""
    if spread is None:
        return None
    width = np.sqrt(np.maximum(2.0 * behind.largest * np.diag(spread), 0.0)) + _ROUNDING
    slack = 1.0 + _ROUNDING
    if (np.abs(sums.gradient) > sums.n_events * width * slack + _ROUNDING).any():
        return "gradient_too_long"
    if (np.diag(sums.information) > sums.n_events * width**2 / 4 * slack + _ROUNDING).any():
        return "information_too_large"
    return None


def consistency_fault(
    before: tuple[Floats, LikelihoodSums], after: tuple[Floats, LikelihoodSums], reach: float
) -> Reason | None:
    r"""Whether two replies cannot be of one concave, self-concordant log-likelihood.

    Parameters
    ----------
    before, after
        Coefficients and the sums there.
    reach
        How much the step can change the difference of two log hazards; infinite where unknown,
        which leaves concavity.

    Notes
    -----
    With :math:`c(t) = \Delta^\top I(\beta_0 + t\Delta)\Delta` and reach :math:`r`,
    :math:`c(0)e^{-rt} \le c(t) \le c(0)e^{rt}`, and likewise from the other end. Then

    - :math:`(g_0 - g_1)^\top\Delta = \int_0^1 c(t)\,dt`,
    - :math:`g_0^\top\Delta - (\ell_1 - \ell_0) = \int_0^1 (1 - t)c(t)\,dt
      \in c(0)[\psi(-r), \psi(r)]` with :math:`\psi(r) = (e^r - r - 1)/r^2`, and likewise at the
      other end.
    """
    (here, first), (there, second) = before, after
    step = there - here
    start, end = (float(step @ x.information @ step) for x in (first, second))
    slopes = float(first.gradient @ step), float(second.gradient @ step)
    rise = second.log_likelihood - first.log_likelihood
    size = 1.0 + abs(first.log_likelihood) + abs(second.log_likelihood)
    slack = _ROUNDING * (size + max(start, end))
    turns = slopes[0] - slopes[1]
    gaps = (slopes[0] - rise, rise - slopes[1])
    if min(turns, *gaps) < -slack:
        return "not_concave"
    if reach > _FARTHEST:
        return None
    low, high = _turn_between(max(start, 0.0), max(end, 0.0), reach)
    most = np.exp(reach)
    agrees = start <= most * end + slack and end <= most * start + slack
    agrees &= low - slack <= turns <= high + slack
    for curvature, gap in zip((start, end), gaps, strict=True):
        agrees &= _psi(-reach) * curvature - slack <= gap <= _psi(reach) * curvature + slack
    return None if agrees else "curvature_disagrees"


def _psi(r: float) -> float:
    return 0.5 + r / 6.0 if abs(r) < 1e-4 else float((np.expm1(r) - r) / r**2)


def _turn_between(start: float, end: float, reach: float) -> tuple[float, float]:
    """Bounds of the mean curvature over a step, from the curvature at both its ends."""
    if reach < 1e-6 or min(start, end) <= 0.0:
        grown = np.exp(reach)
        return min(start, end) / grown, max(start, end) * grown
    shift = float(np.clip(np.log(end / start) / (2.0 * reach), -0.5, 0.5))
    t, u = 0.5 + shift, 0.5 - shift
    high = (start * np.expm1(reach * t) + end * np.expm1(reach * u)) / reach
    low = -(start * np.expm1(-reach * u) + end * np.expm1(-reach * t)) / reach
    return float(low), float(high)


def is_stationary(fit: NewtonFit, sums: LikelihoodSums, *, tolerance: float = 1e-4) -> bool:
    """Whether a fit ended where its penalised slope is zero, not where a site let it go no further.

    A site that says at every step that one patient outweighs its sums makes the steps vanish.

    Parameters
    ----------
    fit
        Converged.
    sums
        Of all patients at its coefficients.
    tolerance
        Largest slope, in standard errors of its coefficient.
    """
    n = sums.n_patients
    ridge, l1 = (np.broadcast_to(x, fit.n_inputs) for x in (fit.ridge, fit.l1))
    away = fit.candidate - (0.0 if fit.centre is None else fit.centre)
    slope = sums.gradient - n * ridge * away
    at_kink = away == 0.0
    pull = np.where(
        at_kink, np.maximum(np.abs(slope) - n * l1, 0.0), slope - n * l1 * np.sign(away)
    )
    scale = np.sqrt(np.maximum(np.diag(sums.information) + n * ridge, 1e-12))
    return bool((np.abs(pull) <= tolerance * scale + _ROUNDING * n).all())


def broken_total(fault: Fault) -> BoundsBroken:
    """One sentence for a run that ends because a total is none."""
    return BoundsBroken(
        f"{fault.what}: found a total of the sites' sums that no patients can have "
        f"({fault.reason.replace('_', ' ')}); a site sends wrong sums, and a secure sum does not "
        "say which: look at every site's own log, or repeat the study without secure sum"
    )


def description_fault(reply: m.Description) -> Reason | None:
    """Say whether the counts that a site gives of itself contradict each other."""
    pairs = ((reply.n_train, reply.n_train_events), (reply.n_test, reply.n_test_events))
    agrees = all(0 <= d <= n for n, d in pairs) and (reply.n_train > 0) == reply.trains
    return None if agrees else "counts_disagree"


def moments_fault(reply: m.DesignMoments, behind: Behind) -> Reason | None:
    """Say whether moments of inputs cannot be of these patients."""
    n, m2 = reply.n, reply.m2
    whole = bool((np.abs(n - np.rint(n)) <= _ROUNDING).all())
    lonely = bool((m2[n <= 1] <= _ROUNDING * (1 + reply.mean[n <= 1] ** 2)).all())
    agrees = whole and lonely and bool((n >= 0).all() and (n <= behind.n_patients).all())
    return None if agrees and bool((m2 >= 0).all()) else "moments_impossible"


def other_units(replies: Mapping[str, m.DesignMoments]) -> dict[str, Reason]:
    """Find sites with an input spread a hundred times as wide as at the other sites' median.

    Not a bound: rows of any spread are rows. But one such site sets the consortium's scale, on
    which nobody else's patients differ any more. It takes three sites to say who.
    """
    if len(replies) < 3:
        return {}
    found: dict[str, Reason] = {}
    spreads = {s: np.sqrt(r.m2 / np.maximum(r.n - 1, 1)) for s, r in replies.items()}
    for site, spread in spreads.items():
        others = np.median([x for s, x in spreads.items() if s != site], axis=0)
        if ((spread > _OTHER_UNIT * others) & (others > 0)).any():
            found[site] = "moments_impossible"
    return found


def intervals_fault(
    reply: m.Intervals, behind: Behind, edges_days: Sequence[float]
) -> Reason | None:
    """Say whether events and exposure cannot be of these patients.

    Nobody is more at risk in a later interval, and no log hazard is further above the mean than
    the root of the squared deviations.
    """
    days = np.diff(np.array(edges_days), prepend=0.0)
    n, mean, m2 = reply.risk.T
    whole = bool((np.abs(reply.events - np.rint(reply.events)) <= _ROUNDING).all())
    if not whole or (reply.events.sum(axis=1) > behind.n_events).any():
        return "counts_disagree"
    if (n != behind.n_patients).any():
        return "counts_disagree"
    highest = mean + np.sqrt(m2)
    with np.errstate(over="ignore"):
        most = n * np.exp(highest) * (1 + 1e-6)
    per_day = reply.exposure / days
    rises = (np.diff(per_day, axis=1) > 1e-6 * (1 + per_day[:, :-1])).any()
    return "exposure_impossible" if rises or (per_day > most[:, None]).any() else None


def evaluation_fault(reply: m.Evaluation, outcome: SiteOutcome) -> Reason | None:
    """Say whether pair counts cannot be of the test patients that a site said it has.

    Pairs within n patients are what they are; how many pairs involve a patient adds up to twice
    the pairs, and Cauchy and Schwarz bound sums of squares and products.
    """
    from fusion.evaluation import PairCounts

    if (reply.n_test, reply.n_test_events) != (outcome.n_test, outcome.n_test_events):
        return "counts_disagree"
    for vector in reply.pairs:
        found = PairCounts.from_vector(vector)
        if vector.any() and not _are_pairs(found, reply.n_test, reply.n_test_events):
            return "pairs_impossible"
    return None


def _are_pairs(x: PairCounts, n: int, d: int) -> bool:
    slack = 1e-6 * (1.0 + x.comparable)
    kinds = (x.concordant, x.discordant, x.tied)
    if min(kinds) < -slack or abs(sum(kinds) - x.comparable) > slack:
        return False
    if (x.n_patients, x.n_events) != (n, d) or x.comparable > d * (n - 1) - d * (d - 1) / 2 + slack:
        return False
    squares = 1e-6 * (1.0 + x.sum_pp)
    agrees = 4.0 * x.comparable**2 / n <= x.sum_pp + squares <= 2.0 * x.comparable * n + 2 * squares
    agrees &= -squares <= x.sum_cp <= x.sum_pp + squares and x.sum_cc <= x.sum_cp + squares
    return agrees and x.sum_cp**2 <= (x.sum_cc + squares) * (x.sum_pp + squares)
