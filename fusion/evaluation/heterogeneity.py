"""Whether sites agree on the coefficients, from the sums that the fit has anyway."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import chdtrc

from fusion.evaluation.one_step import OneStep, one_step
from fusion.evaluation.sums import Flags, Floats, Z, checked_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from fusion.newton import LikelihoodSums

# Information per event, relative to the consortium's: rounding leaves less of a constant input.
_NOT_INFORMED = 1e-6


@dataclass(frozen=True)
class HomogeneityTest:
    """Chi-squared test that all sites share one coefficient vector; NaN with nothing to compare."""

    statistic: float
    degrees_of_freedom: int
    p_value: float


@dataclass(frozen=True, eq=False)
class Heterogeneity:
    """How much the coefficients differ between sites; NaN below two sites that inform one.

    Attributes
    ----------
    statistic, degrees_of_freedom, p_value
        (p,) Cochran's Q of each coefficient, sites that inform it less one, and its p-value.
    i_squared, i_squared_low, i_squared_high
        (p,) share of the variation that is more than chance, 0 to 1, with its test-based 95 %
        interval; two sites that agree give no interval.
    tau_squared
        (p,) variance of the coefficient between sites, after DerSimonian and Laird.
    estimates, standard_errors
        (n_sites, p) each site's own coefficients; NaN where a site does not inform one.
    test
        Test of all coefficients together.
    """

    statistic: Floats
    degrees_of_freedom: Floats
    p_value: Floats
    i_squared: Floats
    i_squared_low: Floats
    i_squared_high: Floats
    tau_squared: Floats
    estimates: Floats
    standard_errors: Floats
    test: HomogeneityTest

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, None in place of NaN."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def heterogeneity(
    coefficients: ArrayLike,
    sums: Sequence[LikelihoodSums],
    *,
    columns: Sequence[Sequence[int]] | None = None,
    first: int = 0,
) -> Heterogeneity:
    r"""Compare sites by one Newton step of each from the consortium's coefficients.

    Needs no more than each site's last gradient :math:`U_s` and information :math:`I_s`: the site's
    own estimate is :math:`\beta + I_s^{-1} U_s`. What the sites' steps share is taken out, so that
    the gradient that a ridge leaves at the optimum does not count as a difference.

    Parameters
    ----------
    coefficients
        (first + p,) of the consortium, where the sums were taken.
    sums
        One per site.
    columns
        Of the p coefficients, those that each site informs; None for those of which it has
        information. A site without a modality, or with an input that does not vary, says nothing
        about its coefficient.
    first
        Number of leading coefficients, such as a baseline's, that are each site's own matter: every
        site is given its own, and they are not compared.

    Raises
    ------
    ValueError
        If there is no site, or shapes differ, or a sum is not finite.

    References
    ----------
    Higgins and Thompson, Statistics in Medicine 21 (2002) 1539-1558; DerSimonian and Laird,
    Controlled Clinical Trials 7 (1986) 177-188.
    """
    beta = np.asarray(coefficients, dtype=np.float64)
    beta = checked_values(beta, "coefficients", (beta.size,))
    scores, informations = _profiled(*_checked_sums(sums, beta.size), first)
    informed = _informed(informations, np.array([s.n_events for s in sums]), columns)
    steps = [one_step(*of_site) for of_site in zip(scores, informations, informed, strict=True)]
    estimates = beta[first:] + np.array([step.step for step in steps])
    variances = np.array([step.variance for step in steps])
    compared = [_compare(*both) for both in zip(estimates.T, variances.T, strict=True)]
    q, freedom, p_value, value, low, high, tau_squared = np.array(compared).reshape(-1, 7).T
    return Heterogeneity(
        statistic=q,
        degrees_of_freedom=freedom,
        p_value=p_value,
        i_squared=value,
        i_squared_low=low,
        i_squared_high=high,
        tau_squared=tau_squared,
        estimates=estimates,
        standard_errors=np.sqrt(variances),
        test=_test(sum(s.gain for s in steps), steps, _together(scores, informations, informed)),
    )


def likelihood_ratio(
    own: Sequence[LikelihoodSums], common: Sequence[LikelihoodSums]
) -> HomogeneityTest:
    """Test that the sites' own optima differ, by the log-likelihood they gain over a common one.

    A ridge keeps a fit below its optimum; what is missing is added to second order from the
    gradient that it leaves.

    Parameters
    ----------
    own
        Of each site, at its own coefficients.
    common
        Of the same sites in the same order, at the consortium's coefficients.

    Raises
    ------
    ValueError
        If there is no site, or the two lists are not of the same patients, or a sum is not finite.
    """
    if [(s.n_patients, s.n_events) for s in own] != [(s.n_patients, s.n_events) for s in common]:
        raise ValueError("own: found other patients than in common, needed the same sites in order")
    scores, informations = _checked_sums(common, common[0].gradient.size if common else 0)
    informed = _informed(informations, np.array([s.n_events for s in common]), None)
    apart = [_own_step(part) for part in own]
    gain = 2.0 * sum(s.log_likelihood - c.log_likelihood for s, c in zip(own, common, strict=True))
    gain += sum(step.gain for step in apart)
    return _test(gain, apart, _together(scores, informations, informed))


def _together(scores: Floats, informations: Floats, informed: Flags) -> OneStep:
    """Step of all sites in common."""
    both = informed[:, :, None] & informed[:, None, :]
    return one_step(
        (scores * informed).sum(axis=0),
        (informations * both).sum(axis=0),
        np.asarray(informed.any(axis=0)),
    )


def _profiled(scores: Floats, informations: Floats, first: int) -> tuple[Floats, Floats]:
    """Score and information of the later coefficients, each site at its best for the first ones."""
    if first == 0:
        return scores, informations
    own, across = informations[:, :first, :first], informations[:, first:, :first]
    # An interval without events leaves a site's own information singular.
    slopes = across @ np.linalg.pinv(own, hermitian=True)
    return (
        scores[:, first:] - (slopes @ scores[:, :first, None])[:, :, 0],
        informations[:, first:, first:] - slopes @ across.swapaxes(1, 2),
    )


def _own_step(sums: LikelihoodSums) -> OneStep:
    scores, informations = _checked_sums([sums], sums.gradient.size)
    informed = _informed(informations, np.array([sums.n_events]), None)
    return one_step(scores[0], informations[0], informed[0])


def _test(gain: float, apart: Sequence[OneStep], together: OneStep) -> HomogeneityTest:
    freedom = sum(step.rank for step in apart) - together.rank
    if freedom < 1:
        return HomogeneityTest(np.nan, 0, np.nan)
    statistic = max(gain - together.gain, 0.0)
    return HomogeneityTest(float(statistic), freedom, float(chdtrc(freedom, statistic)))


def _checked_sums(sums: Sequence[LikelihoodSums], p: int) -> tuple[Floats, Floats]:
    """Gradients (n_sites, p) and informations (n_sites, p, p)."""
    if not sums:
        raise ValueError("sums: found none, needed those of at least one site")
    scores = [checked_values(s.gradient, "gradient", (p,)) for s in sums]
    informations = [checked_values(s.information, "information", (p, p)) for s in sums]
    return np.array(scores), np.array(informations)


def _informed(
    informations: Floats, n_events: Floats, columns: Sequence[Sequence[int]] | None
) -> Flags:
    """(n_sites, p) which coefficients each site informs."""
    own = np.diagonal(informations, axis1=1, axis2=2)
    level = own.sum(axis=0) / max(n_events.sum(), 1)
    informed = own > np.maximum(_NOT_INFORMED * level * n_events[:, None], 0.0)
    if columns is None:
        return np.asarray(informed)
    if len(columns) != len(informations):
        raise ValueError(f"columns: found {len(columns)}, needed {len(informations)}, one per site")
    named = np.zeros_like(informed)
    for site, of_site in enumerate(columns):
        named[site, list(of_site)] = True
    return np.asarray(informed & named)


def _compare(estimates: Floats, variances: Floats) -> tuple[float, ...]:
    """Q, its degrees of freedom and p-value, I squared with interval, and tau squared."""
    known = np.isfinite(variances)
    n_sites = int(known.sum())
    if n_sites < 2:
        return (np.nan, 0.0, np.nan, np.nan, np.nan, np.nan, np.nan)
    weights = 1.0 / variances[known]
    total = weights.sum()
    deviations = estimates[known] - weights @ estimates[known] / total
    q, freedom = float(weights @ deviations**2), n_sites - 1
    tau_squared = max(0.0, (q - freedom) / (total - weights @ weights / total))
    p_value = float(chdtrc(freedom, q))
    return (q, float(freedom), p_value, *_inconsistency(q, n_sites), float(tau_squared))


def _inconsistency(q: float, n_sites: int) -> tuple[float, float, float]:
    """I squared and its interval, by way of H = sqrt(Q / df), an H below 1 counting as 1."""
    log_h = 0.5 * np.log(max(q / (n_sites - 1), 1.0))
    half = Z * _log_h_error(q, n_sites)
    bounds = np.maximum([log_h, log_h - half, log_h + half], 0.0)
    value, low, high = (1.0 - np.exp(-2.0 * bounds)).tolist()
    return value, low, high


def _log_h_error(q: float, n_sites: int) -> float:
    if q > n_sites:
        excess = np.log(q) - np.log(n_sites - 1)
        return float(0.5 * excess / (np.sqrt(2.0 * q) - np.sqrt(2.0 * n_sites - 3.0)))
    if n_sites == 2:
        return np.nan
    n = n_sites - 2.0
    return float(np.sqrt((1.0 - 1.0 / (3.0 * n**2)) / (2.0 * n)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if np.isnan(value) else value
