"""Fits of fusion models to rows in one place, by scikit-survival's conventions.

For a site's own model, for the pooled reference in a simulation, and for anyone who only wants a
late-fusion model. The federation reaches the same linear coefficients from sums.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal, TypedDict

import numpy as np

from fusion.discrete import at_risk_and_events, fit_logistic_hazard, hazard_sums
from fusion.late.gated import (
    GATE_DECAY,
    gated_log_hazard,
    gated_loss_gradient,
    initial_gated_weights,
)
from fusion.late.inputs import baseline_hazard, checked_columns, fusion_inputs
from fusion.late.models import CoxModel, GatedModel, LogisticHazardModel
from fusion.newton import ConvergenceError
from fusion.survival import check_outcome, cox_sums, fit_cox, interval_sums, moments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias, Unpack

    from numpy.typing import ArrayLike, NDArray

    from fusion.late.models import FusionModel
    from fusion.newton import NewtonFit

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]
    Strengths: TypeAlias = float | Sequence[float]
    _Fit: TypeAlias = Callable[["_Rows", float], Floats]
    _LogLikelihood: TypeAlias = Callable[["_Rows", Floats], float]

RIDGES: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Penalties per patient that are tried where none is given."""

_N_FOLDS: Final = 5
# Sums of the same terms in another order differ by less: equal strengths, the larger is taken.
_SAME: Final = 1e-9


def survival_outcome(event: ArrayLike, time: ArrayLike) -> NDArray[np.void]:
    """(n,) structured array of event and time in days, as scikit-survival takes it."""
    events, times = check_outcome(event, time)
    y = np.empty(len(events), dtype=[("event", np.bool_), ("time", np.float64)])
    y["event"], y["time"] = events, times
    return y


@dataclass(frozen=True)
class _Rows:
    """Patients with some modality: (n, 2 m) inputs, outcome, and strata or None."""

    inputs: Floats
    event: Bools
    time: Floats
    strata: NDArray[np.intp] | None
    mean: Floats
    scale: Floats

    def at(self, rows: Bools) -> _Rows:
        strata = None if self.strata is None else self.strata[rows]
        return replace(
            self,
            inputs=self.inputs[rows],
            event=self.event[rows],
            time=self.time[rows],
            strata=strata,
        )


@dataclass(kw_only=True)
class CoxFusion:
    """Ridge Cox model of the modalities' log hazards, stratified where strata are given.

    Parameters
    ----------
    modalities
        (m,) names of the columns.
    edges_days
        (k,) right ends of the baseline hazard's intervals.
    ridge
        Penalty per patient on the mean log-likelihood; of several, one is chosen by the
        cross-validated partial likelihood of the rows given to :meth:`fit`.
    seed
        Of the folds, where they are drawn at random.

    Attributes
    ----------
    model_
        The fitted model.
    ridge_
        The penalty it was fitted with.

    Examples
    --------
    >>> from fusion.late import CoxFusion, survival_outcome
    >>> y = survival_outcome([True, True, False, True], [30.0, 90.0, 400.0, 200.0])
    >>> fusion = CoxFusion(modalities=["clinical"], edges_days=[100.0, 400.0], ridge=0.1)
    >>> fusion.fit([[1.2], [0.4], [-0.9], [0.1]], y).predict([[0.5]]).shape
    (1,)
    """

    modalities: Sequence[str]
    edges_days: ArrayLike
    ridge: Strengths = RIDGES
    seed: int = 0
    model_: CoxModel = field(init=False, repr=False)
    ridge_: float = field(init=False, repr=False)

    def fit(
        self, columns: ArrayLike, y: NDArray[np.void], *, strata: ArrayLike | None = None
    ) -> CoxFusion:
        """Fit the model to out-of-fold modality log hazards.

        Parameters
        ----------
        columns
            (n, m) log hazards, NaN where absent. A patient with none stands in no fit.
        y
            (n,) structured array: event (bool), then time in days.
        strata
            (n,) labels; risk sets never span two of them. With three or more, whole strata are left
            out to choose the ridge, so that it suits a stratum that was not seen.

        Raises
        ------
        ValueError
            If shapes or dtypes are not these.
        fusion.newton.ConvergenceError
            If there is no event, or no finite maximum.
        """
        rows = _rows(columns, y, strata, len(self.modalities))
        folds = _folds(rows, self.seed)
        self.ridge_ = _chosen(rows, self.ridge, _cox_coefficients, _cox_log_likelihood, folds)
        self.model_ = _cox_model(rows, self.modalities, self.edges_days, self.ridge_)
        return self

    def predict(self, columns: ArrayLike) -> Floats:
        """(n,) log hazards; higher is worse, NaN for a patient with no modality."""
        return self.model_.predict(columns)

    def predict_survival_function(self, columns: ArrayLike, times_days: ArrayLike) -> Floats:
        """(n, t) probability of surviving beyond each time, in days."""
        return self.model_.predict_survival_function(columns, times_days)


@dataclass(kw_only=True)
class LogisticHazardFusion:
    """Ridge logistic model of the event in each interval, given survival until it.

    Parameters
    ----------
    modalities, ridge, seed
        As in :class:`CoxFusion`; the ridge leaves the intervals' log odds alone.
    edges_days
        Right ends of the intervals, few and wide. Those without an event or a survivor are merged,
        and the grid ends where follow-up does, so that the model may have fewer.

    Attributes
    ----------
    model_, ridge_
        As in :class:`CoxFusion`.
    """

    modalities: Sequence[str]
    edges_days: ArrayLike
    ridge: Strengths = RIDGES
    seed: int = 0
    model_: LogisticHazardModel = field(init=False, repr=False)
    ridge_: float = field(init=False, repr=False)

    def fit(
        self, columns: ArrayLike, y: NDArray[np.void], *, strata: ArrayLike | None = None
    ) -> LogisticHazardFusion:
        """Fit the model to out-of-fold modality log hazards; see :meth:`CoxFusion.fit`.

        Each stratum has log odds of its own beside those of the intervals, shrunken toward 0, which
        predictions do not use.
        """
        asked = np.asarray(self.edges_days, dtype=np.float64)
        rows = _rows(columns, y, strata, len(self.modalities))
        folds = _folds(rows, self.seed)
        in_folds = _merged(asked, [rows.at(folds != fold) for fold in np.unique(folds)])

        def coefficients(some: _Rows, ridge: float) -> Floats:
            return _logistic_fit(some, in_folds, ridge).candidate

        def log_likelihood(some: _Rows, at: Floats) -> float:
            return hazard_sums(
                some.inputs, some.event, some.time, at, edges_days=in_folds, strata=some.strata
            ).log_likelihood

        self.ridge_ = _chosen(rows, self.ridge, coefficients, log_likelihood, folds)
        edges = _merged(asked, [rows])
        fit, k = _logistic_fit(rows, edges, self.ridge_), len(edges)
        self.model_ = LogisticHazardModel(
            modalities=tuple(self.modalities),
            mean=rows.mean,
            scale=rows.scale,
            coefficients=fit.candidate[k:],
            covariance=fit.covariance[k:, k:],
            edges_days=edges,
            alpha=fit.candidate[:k],
        )
        return self

    def predict(self, columns: ArrayLike) -> Floats:
        """(n,) log odds ratios; higher is worse, NaN for a patient with no modality."""
        return self.model_.predict(columns)

    def predict_survival_function(self, columns: ArrayLike, times_days: ArrayLike) -> Floats:
        """(n, t) probability of surviving beyond each time, in days."""
        return self.model_.predict_survival_function(columns, times_days)


@dataclass(kw_only=True)
class GatedFusion:
    """Cox model in which a small network weighs the modalities; starts as :class:`CoxFusion`.

    Parameters
    ----------
    modalities, edges_days, ridge, seed
        As in :class:`CoxFusion`; the seed is also that of the network's first layer.
    hidden
        Hidden units.
    decay
        Penalty per patient on the weights of the gates; of several, one is chosen as the ridge is.
        The larger it is, the nearer the model stays to the linear one.

    Attributes
    ----------
    model_, ridge_
        As in :class:`CoxFusion`.
    decay_
        The penalty that the gates were trained with.
    """

    modalities: Sequence[str]
    edges_days: ArrayLike
    ridge: Strengths = RIDGES
    hidden: int = 4
    decay: Strengths = GATE_DECAY
    seed: int = 0
    model_: GatedModel = field(init=False, repr=False)
    ridge_: float = field(init=False, repr=False)
    decay_: float = field(init=False, repr=False)

    def fit(
        self, columns: ArrayLike, y: NDArray[np.void], *, strata: ArrayLike | None = None
    ) -> GatedFusion:
        """Fit the model to out-of-fold modality log hazards; see :meth:`CoxFusion.fit`."""
        rows = _rows(columns, y, strata, len(self.modalities))
        folds = _folds(rows, self.seed)
        self.ridge_ = _chosen(rows, self.ridge, _cox_coefficients, _cox_log_likelihood, folds)
        self.decay_ = _chosen(rows, self.decay, self._weights, self._log_likelihood, folds)
        linear = _cox_model(rows, self.modalities, self.edges_days, self.ridge_)
        weights = self._weights(rows, self.decay_)
        log_hazard = gated_log_hazard(weights, rows.inputs, self.hidden)
        self.model_ = GatedModel(
            modalities=linear.modalities,
            mean=rows.mean,
            scale=rows.scale,
            coefficients=linear.coefficients,
            covariance=linear.covariance,
            edges_days=linear.edges_days,
            hazard_per_day=_baseline(rows, log_hazard, linear.edges_days),
            weights=weights,
            hidden=self.hidden,
        )
        return self

    def _weights(self, rows: _Rows, decay: float) -> Floats:
        start = initial_gated_weights(
            _cox_coefficients(rows, self.ridge_), hidden=self.hidden, seed=self.seed
        )
        return _trained(rows, start, hidden=self.hidden, ridge=self.ridge_, decay=decay)

    def _log_likelihood(self, rows: _Rows, weights: Floats) -> float:
        return _partial(rows, gated_log_hazard(weights, rows.inputs, self.hidden))

    def predict(self, columns: ArrayLike) -> Floats:
        """(n,) log hazards; higher is worse, NaN for a patient with no modality."""
        return self.model_.predict(columns)

    def predict_survival_function(self, columns: ArrayLike, times_days: ArrayLike) -> Floats:
        """(n, t) probability of surviving beyond each time, in days."""
        return self.model_.predict_survival_function(columns, times_days)


ESTIMATORS: Final[dict[str, type[CoxFusion | LogisticHazardFusion | GatedFusion]]] = {
    CoxModel.kind: CoxFusion,
    LogisticHazardModel.kind: LogisticHazardFusion,
    GatedModel.kind: GatedFusion,
}
"""Estimator of each kind of model."""


class FusionOptions(TypedDict):
    """What every estimator is told; see :class:`CoxFusion`."""

    modalities: Sequence[str]
    edges_days: ArrayLike
    ridge: Strengths


def fit_late_fusion(
    columns: ArrayLike,
    event: ArrayLike,
    time: ArrayLike,
    *,
    model: Literal["cox", "logistic_hazard", "gated"] = "cox",
    strata: ArrayLike | None = None,
    **options: Unpack[FusionOptions],
) -> FusionModel:
    """Fit a fusion model of any kind to rows in one place; see :class:`CoxFusion`.

    Parameters
    ----------
    columns
        (n, m) modality log hazards, out-of-fold, NaN where absent.
    event, time, strata
        As in :func:`fusion.survival.cox_sums`.
    model
        Kind of the model.
    **options
        Of its estimator: ``modalities``, ``edges_days`` and ``ridge``.
    """
    fusion = ESTIMATORS[model](**options)
    return fusion.fit(columns, survival_outcome(event, time), strata=strata).model_


def _rows(
    columns: ArrayLike, y: NDArray[np.void], strata: ArrayLike | None, n_modalities: int
) -> _Rows:
    values = checked_columns(columns, n_modalities)
    event, time = _outcome(y)
    if len(event) != len(values):
        raise ValueError(f"y: found {len(event)} patients, needed {len(values)} as in columns")
    labels = None
    if strata is not None:
        if np.shape(strata) != event.shape:
            raise ValueError(f"strata: found shape {np.shape(strata)}, needed {event.shape}")
        labels = np.unique(np.asarray(strata), return_inverse=True)[1]
    seen = moments(values)
    inputs = fusion_inputs(values, seen.mean, seen.scale)
    known = np.asarray(~np.isnan(values).all(axis=1))
    if not event[known].any():
        raise ConvergenceError(
            "late fusion: found no event in a patient with some modality, needed at least one"
        )
    return _Rows(inputs, event, time, labels, seen.mean, seen.scale).at(known)


def _outcome(y: NDArray[np.void]) -> tuple[Bools, Floats]:
    names: tuple[str, ...] = getattr(getattr(y, "dtype", None), "names", None) or ()
    if len(names) != 2 or y[names[0]].dtype != np.bool_ or y[names[1]].dtype.kind not in "fiu":
        raise ValueError(
            f"y: found {getattr(y, 'dtype', type(y).__name__)}, needed a structured array of event "
            "(bool), then time in days; make it with survival_outcome(event, time)"
        )
    return check_outcome(y[names[0]], y[names[1]])


def _cox_coefficients(rows: _Rows, ridge: float) -> Floats:
    return fit_cox(rows.inputs, rows.event, rows.time, strata=rows.strata, ridge=ridge).candidate


def _cox_log_likelihood(rows: _Rows, coefficients: Floats) -> float:
    return _partial(rows, rows.inputs @ coefficients)


def _partial(rows: _Rows, log_hazard: Floats) -> float:
    sums = cox_sums(log_hazard[:, None], rows.event, rows.time, np.ones(1), strata=rows.strata)
    return sums.log_likelihood


def _baseline(rows: _Rows, log_hazard: Floats, edges_days: Floats) -> Floats:
    return baseline_hazard(*interval_sums(log_hazard, rows.event, rows.time, edges_days))


def _cox_model(
    rows: _Rows, modalities: Sequence[str], edges_days: ArrayLike, ridge: float
) -> CoxModel:
    fit = fit_cox(rows.inputs, rows.event, rows.time, strata=rows.strata, ridge=ridge)
    edges = np.asarray(edges_days, dtype=np.float64)
    return CoxModel(
        modalities=tuple(modalities),
        mean=rows.mean,
        scale=rows.scale,
        coefficients=fit.candidate,
        covariance=fit.covariance,
        edges_days=edges,
        hazard_per_day=_baseline(rows, rows.inputs @ fit.candidate, edges),
    )


def _logistic_fit(rows: _Rows, edges_days: Floats, ridge: float) -> NewtonFit:
    if np.any(_one_sided(rows, edges_days)):
        raise ConvergenceError(
            "logistic hazard: found no interval with both events and survivors, needed one"
        )
    return fit_logistic_hazard(
        rows.inputs, rows.event, rows.time,
        edges_days=edges_days, strata=rows.strata, ridge=ridge,
    )  # fmt: skip


def _one_sided(rows: _Rows, edges_days: Floats) -> tuple[Bools, Bools]:
    """(k,) intervals without an event, and those that nobody is known to have survived."""
    at_risk, events = at_risk_and_events(rows.event, rows.time, edges_days)
    return events == 0, events == at_risk


def _merged(edges_days: Floats, parts: Sequence[_Rows]) -> Floats:
    """Edges of intervals that have events and survivors in every part, as far as there are any.

    The grid ends before a last interval that nobody was followed through. Another one that lacks
    events or survivors is merged with the next, and the last with the one before.
    """
    edges = edges_days
    while len(edges) > 1:
        sides = [_one_sided(part, edges) for part in parts]
        nobody_dies, nobody_survives = np.logical_or.reduce(sides)
        lacking, last = np.flatnonzero(nobody_dies | nobody_survives), len(edges) - 1
        if lacking.size == 0:
            break
        at = last if nobody_survives[last] else min(int(lacking[0]), last - 1)
        edges = np.delete(edges, at)
    return edges


def _trained(rows: _Rows, start: Floats, *, hidden: int, ridge: float, decay: float) -> Floats:
    """Flat weights at a minimum of the stratified loss near the start."""
    from scipy.optimize import minimize  # slow to import, and needed for this fit only

    strata = np.zeros(len(rows.event), dtype=np.intp) if rows.strata is None else rows.strata
    parts = [rows.at(strata == s) for s in np.unique(strata)]
    n_events = int(rows.event.sum())

    def loss_gradient(weights: Floats) -> tuple[float, Floats]:
        total, gradient = 0.0, np.zeros(len(weights))
        for part in parts:
            share = part.event.sum() / n_events
            found = gated_loss_gradient(
                weights, part.inputs, part.event, part.time,
                hidden=hidden, ridge=ridge, decay=decay,
            )  # fmt: skip
            total, gradient = total + share * found[0], gradient + share * found[1]
        return total, gradient

    found = minimize(loss_gradient, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    if not (np.isfinite(found.fun) and np.isfinite(found.x).all()):
        raise ConvergenceError("gated fusion: the loss is not finite; raise the ridge or the decay")
    return np.asarray(found.x)


def _chosen(
    rows: _Rows,
    strengths: Strengths,
    fit: _Fit,
    log_likelihood: _LogLikelihood,
    folds: NDArray[np.intp],
) -> float:
    r"""Penalty of the greatest cross-validated partial likelihood; of equal ones the larger.

    That is :math:`\sum_k \ell(\hat\beta_{-k}) - \ell_{-k}(\hat\beta_{-k})` [1]_: what fold
    :math:`k` adds to the likelihood at coefficients that never saw it. When folds are whole strata
    it is the fold's own partial likelihood. A strength at which some fit has no finite maximum
    counts as worst; if all are, the largest is taken.

    References
    ----------
    .. [1] Verweij PJM, van Houwelingen HC. Cross-validation in survival analysis. Statistics in
       Medicine 1993;12:2305-2314.
    """
    tried = np.unique(np.asarray(strengths, dtype=np.float64))
    if tried.size == 0 or not np.isfinite(tried).all() or tried[0] < 0:
        raise ValueError(f"penalty: found {strengths}, needed finite values of at least 0")
    if tried.size == 1:
        return float(tried[0])
    scores = np.array([_held_out(rows, x, fit, log_likelihood, folds) for x in tried])
    best = scores.max()
    worst_equal = best - _SAME * abs(best) if np.isfinite(best) else best
    return float(tried[scores >= worst_equal].max())


def _held_out(
    rows: _Rows,
    strength: float,
    fit: _Fit,
    log_likelihood: _LogLikelihood,
    folds: NDArray[np.intp],
) -> float:
    total = 0.0
    for fold in np.unique(folds):
        kept = rows.at(folds != fold)
        try:
            found = fit(kept, strength)
        except ConvergenceError:
            return -np.inf
        total += log_likelihood(rows, found) - log_likelihood(kept, found)
    return total


def _folds(rows: _Rows, seed: int) -> NDArray[np.intp]:
    """(n,) fold of each patient: whole strata where there are three, else dealt within events."""
    folds = np.empty(len(rows.event), dtype=np.intp)
    sizes = np.zeros(0) if rows.strata is None else np.bincount(rows.strata)
    if rows.strata is not None and (sizes > 0).sum() >= 3:
        of_stratum = np.empty(len(sizes), dtype=np.intp)
        of_stratum[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes)) % _N_FOLDS
        return of_stratum[rows.strata]
    shuffle = np.random.default_rng(seed).random(len(folds))
    folds[np.lexsort((shuffle, ~rows.event))] = np.arange(len(folds)) % _N_FOLDS
    return folds
