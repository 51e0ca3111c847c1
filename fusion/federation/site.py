"""The site's side of a study: it holds the rows, answers with sums, and refuses what it should."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fusion import messages as m
from fusion.evaluation import censoring_curve
from fusion.federation.checks import is_within
from fusion.federation.plan import LOCAL_ENCODERS, PROTOCOL, FederationPlan
from fusion.federation.rows import Outcome, Split
from fusion.federation.site_evaluation import evaluate_arms
from fusion.late import FusionModel, fit_late_fusion, fusion_inputs, linear_inputs
from fusion.newton import MAX_ROUNDS, ConvergenceError, LikelihoodSums
from fusion.privacy import outweighed, releasable_edges
from fusion.survival import cox_sums, interval_sums, moments

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fusion.federation.rows import SiteRows
    from fusion.privacy import Refusal

    Floats = NDArray[np.float64]

# Sums at ever other coefficients tell ever more of the rows. A fit gets those that Newton's method
# needs, and some for starting over when a site leaves.
MAX_SUMS_PER_FIT: Final = MAX_ROUNDS + 10
# Stands for sums that one patient outweighs: no step ends there, the coordinator halves it.
_LOWEST: Final = -1e100
# Far above any model's, far below where its exponential overflows.
_HIGHEST_LOG_HAZARD: Final = 300.0
_ONCE: Final = (m.SetEncoders, m.AskIntervals, m.AskEvaluation)


class _Refusal(Exception):
    def __init__(self, code: Refusal) -> None:
        self.code = code


class SiteStudy:
    """One site's part in one run, as a function from request bytes to reply bytes.

    Parameters
    ----------
    plan
        From the protocol that this site approved.
    rows
        The site's rows.
    on_error
        Called with any unexpected exception, for the site's own log; only a code leaves.
    """

    def __init__(
        self,
        plan: FederationPlan,
        rows: SiteRows,
        *,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self.plan = plan
        self.rows = rows
        self._on_error = on_error
        self._scaling: dict[str, tuple[Floats, Floats]] = {}
        self._columns: dict[str, Split] = {}
        self._answered: dict[type, bytes] = {}
        self._sums_given: Counter[str] = Counter()
        self._answers: dict[type, Callable[[Any], m.Message]] = {
            m.Describe: self._describe,
            m.AskMoments: self._moments,
            m.SetScaling: self._set_scaling,
            m.AskSums: self._cox_sums,
            m.SetEncoders: self._set_encoders,
            m.AskEdges: self._edges,
            m.AskIntervals: self._intervals,
            m.AskEvaluation: self._evaluate,
        }

    def answer(self, payload: bytes) -> bytes:
        """Answer one request; whatever goes wrong leaves as a code."""
        try:
            request = m.decode(payload)
            handler = self._answers.get(type(request))
            if handler is None:
                raise _Refusal("malformed_request")
            if request.run != self.plan.run:  # type: ignore[union-attr]
                raise _Refusal("wrong_run")
            if not is_within(request, self.plan):
                raise _Refusal("malformed_request")
            self._require_first(request)
            return m.encode(handler(request))
        except _Refusal as refusal:
            return m.encode(m.Refused(refusal.code))
        except (m.MessageError, KeyError, IndexError) as error:
            return self._failed(error, "malformed_request")
        except Exception as error:  # noqa: BLE001
            return self._failed(error, "site_error")

    def _failed(self, error: Exception, code: Refusal) -> bytes:
        if self._on_error is not None:
            self._on_error(error)
        return m.encode(m.Refused(code))

    def _require_first(self, request: Any) -> None:
        """Let some requests differ but once in a run; the same again is a network's doing."""
        if isinstance(request, _ONCE):
            first = m.encode(replace(request, round=0))
            if self._answered.setdefault(type(request), first) != first:
                raise _Refusal("already_answered")

    @property
    def trains(self) -> bool:
        """Whether this site's training rows pass its minimum counts for the fusion model."""
        return self._refusal(self._behind_fusion.event, self.plan.n_fusion_inputs) is None

    @property
    def _fused(self) -> NDArray[np.bool_]:
        """(n_train,) which training rows stand behind the fusion model: the same in every arm.

        Sums of two arms, or of a fit and its baseline, then never differ by a few patients.
        """
        shared = [self._present(modality) for modality in self.plan.modalities]
        own = [~np.isnan(column.train) for column in self.rows.local.values()]
        return np.logical_or.reduce([*shared, *own])

    @property
    def _behind_fusion(self) -> Outcome:
        rows = self._fused
        return Outcome(self.rows.train.event[rows], self.rows.train.time[rows])

    def _refusal(self, event: NDArray[np.bool_], n_inputs: int) -> Refusal | None:
        return self.plan.minimum.refuses(
            n_patients=len(event), n_events=int(event.sum()), n_inputs=n_inputs
        )

    def _present(self, modality: str) -> NDArray[np.bool_]:
        """(n_train,) which training rows stand behind the modality's own sums or column."""
        if modality in self.plan.sums:
            if modality in self.rows.tables:
                return np.asarray(~np.isnan(self.rows.tables[modality].train).all(axis=1))
        elif modality in self.rows.local:
            return np.asarray(~np.isnan(self.rows.local[modality].train))
        return np.zeros(len(self.rows.train), dtype=bool)

    def contributes(self, modality: str) -> bool:
        """Whether enough training patients stand behind this modality's sums or columns."""
        n_inputs = len(self.plan.sums.get(modality, ())) or 1
        event = self.rows.train.event[self._present(modality)]
        return self.trains and self._refusal(event, n_inputs) is None

    def _cross_fits(self, modality: str) -> bool:
        if modality not in self.plan.sums or not self.contributes(modality):
            return False
        present = self._present(modality)
        refusal = self.plan.minimum.refuses_folds(
            self.rows.folds[present],
            self.rows.train.event[present],
            n_folds=self.plan.n_folds,
            n_inputs=len(self.plan.sums[modality]),
        )
        return refusal is None

    def _describe(self, request: m.Describe) -> m.Description:
        if request.protocol != self.plan.protocol or request.modalities != self.plan.modalities:
            raise _Refusal("wrong_protocol")
        train, test = self._behind_fusion, self.rows.test
        # Counts below the site's minimum are not told, neither of training nor of test rows.
        shown = self.trains
        tested = int(test.event.sum()) >= self.plan.minimum.test_events
        return m.Description(
            cohort=self.rows.cohort,
            n_train=len(train) if shown else 0,
            n_train_events=int(train.event.sum()) if shown else 0,
            n_test=len(test) if tested else 0,
            n_test_events=int(test.event.sum()) if tested else 0,
            trains=self.trains,
            contributes=np.array([self.contributes(x) for x in request.modalities]),
            cross_fits=np.array([self._cross_fits(x) for x in request.modalities]),
        )

    def _training_columns(self, design: str) -> Floats:
        if not self.trains:
            raise _Refusal("below_minimum_patients")
        return (
            self.rows.tables[design].train
            if design in self.plan.sums
            else self._fusion_columns(design)
        )

    def _fusion_columns(self, arm: str) -> Floats:
        """(n_fused, m) training columns of an arm; a modality of too few patients is absent."""
        columns = self.columns(arm).train[self._fused]
        event = self._behind_fusion.event
        for column in columns.T:
            if self._refusal(event[~np.isnan(column)], 1) is not None:
                column[:] = np.nan
        return columns

    def _fusion_inputs(self, arm: str) -> Floats:
        """(n_fused, 2 m) standardised columns and flags; a flag that few patients raise is down.

        Products with such a flag would tell the few patients' other inputs.
        """
        inputs = fusion_inputs(self._fusion_columns(arm), *self._scaling[arm])
        flags = inputs[:, len(self.plan.modalities) :]
        flags[:, flags.sum(axis=0) < self.plan.minimum.cell] = 0.0
        return inputs

    def columns(self, arm: str) -> Split:
        """(n, m) modality log hazards of an arm, NaN where absent; not standardised."""
        picked = [self._column(arm, modality) for modality in self.plan.modalities]
        return Split(
            np.column_stack([c.train for c in picked]), np.column_stack([c.test for c in picked])
        )

    def _column(self, arm: str, modality: str) -> Split:
        of_consortium = arm == PROTOCOL and modality in self.plan.sums
        source = self._columns if of_consortium else self.rows.local
        return source.get(
            modality,
            Split(np.full(len(self.rows.train), np.nan), np.full(len(self.rows.test), np.nan)),
        )

    def _moments(self, request: m.AskMoments) -> m.DesignMoments:
        width = max(self.plan.n_inputs(design) for design in request.designs)
        shape = (len(request.designs), width)
        n, mean, m2 = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for row, design in enumerate(request.designs):
            if design in self.plan.sums and not self.contributes(design):
                continue
            found = moments(self._training_columns(design))
            told = np.flatnonzero(found.n >= self.plan.minimum.patients)
            for values, of_column in ((n, found.n), (mean, found.mean), (m2, found.m2)):
                values[row, told] = of_column[told]
        return m.DesignMoments(n, mean, m2)

    def _set_scaling(self, request: m.SetScaling) -> m.Done:
        for row, design in enumerate(request.designs):
            p = self.plan.n_inputs(design)
            found = (request.mean[row, :p], request.scale[row, :p])
            if not np.array_equal(self._scaling.setdefault(design, found), found):
                raise _Refusal("already_answered")
        return m.Done()

    def design(self, fit: str) -> tuple[Floats, NDArray[np.bool_]]:
        """(n, p) inputs of a fit and (n_train,) which training rows stand behind them."""
        design, _, fold = fit.partition("/")
        mean, scale = self._scaling[design]
        if design in self.plan.sums:
            rows: NDArray[np.bool_] = self._present(design)
            if fold:
                self._require_cross_fits(design)
                rows = np.logical_and(rows, self.rows.folds != int(fold), dtype=bool)
            return linear_inputs(self.rows.tables[design].train, mean, scale)[rows], rows
        return self._fusion_inputs(design), self._fused

    def _fit_sums(self, fit: str, coefficients: Floats) -> LikelihoodSums:
        design = fit.partition("/")[0]
        n_inputs = self.plan.n_coefficients(fit)
        beta = coefficients[:n_inputs]
        if design in self.plan.sums and not self.contributes(design):
            return LikelihoodSums(0.0, np.zeros(n_inputs), np.zeros((n_inputs, n_inputs)), 0, 0)
        inputs, rows = self.design(fit)
        event, time = self.rows.train.event[rows], self.rows.train.time[rows]
        refusal = self._refusal(event, n_inputs)
        if refusal is not None:
            raise _Refusal(refusal)
        if outweighed(_log_hazard(inputs, beta)):
            nothing = np.zeros(n_inputs), np.zeros((n_inputs, n_inputs))
            return LikelihoodSums(_LOWEST, *nothing, len(event), int(event.sum()))
        return cox_sums(inputs, event, time, beta)

    def _cox_sums(self, request: m.AskSums) -> m.Sums:
        if any(self._sums_given[fit] >= MAX_SUMS_PER_FIT for fit in request.fits):
            raise _Refusal("rounds_spent")
        self._sums_given.update(request.fits)
        n_fits, width = request.coefficients.shape
        gradient, information = np.zeros((n_fits, width)), np.zeros((n_fits, width, width))
        found = []
        for row, fit in enumerate(request.fits):
            sums = self._fit_sums(fit, request.coefficients[row])
            p = len(sums.gradient)
            gradient[row, :p], information[row, :p, :p] = sums.gradient, sums.information
            found.append(sums)
        return m.Sums(
            log_likelihood=np.array([s.log_likelihood for s in found]),
            gradient=gradient,
            information=information,
            n_patients=np.array([s.n_patients for s in found], dtype=np.int64),
            n_events=np.array([s.n_events for s in found], dtype=np.int64),
        )

    def _set_encoders(self, request: m.SetEncoders) -> m.Done:
        fitted = dict(zip(request.fits, request.coefficients, strict=True))
        for modality, names in self.plan.sums.items():
            if modality not in fitted:
                continue
            mean, scale = self._scaling[modality]
            table = self.rows.tables.get(modality)
            if table is None:
                continue
            if self.plan.fold_fits(modality)[0] in fitted and self.contributes(modality):
                self._require_cross_fits(modality)
            p = len(names)
            train = linear_inputs(table.train, mean, scale)
            scores = train @ fitted[modality][:p]
            for fold, fit in enumerate(self.plan.fold_fits(modality)):
                if fit in fitted:
                    rows = self.rows.folds == fold
                    scores[rows] = train[rows] @ fitted[fit][:p]
            test = linear_inputs(table.test, mean, scale) @ fitted[modality][:p]
            self._columns[modality] = Split(scores, test)
        return m.Done()

    def _require_cross_fits(self, modality: str) -> None:
        if not self._cross_fits(modality):
            raise _Refusal("fold_too_small")

    def _edges(self, request: m.AskEdges) -> m.Edges:
        train = self._behind_fusion
        if not self.trains:
            raise _Refusal("below_minimum_patients")
        kept = releasable_edges(
            train.event, train.time, request.edges_days, cell=self.plan.minimum.cell
        )
        return m.Edges(kept)

    def _intervals(self, request: m.AskIntervals) -> m.Intervals:
        train, cell = self._behind_fusion, self.plan.minimum.cell
        allowed = releasable_edges(train.event, train.time, request.edges_days, cell=cell)
        within = int(train.event[train.time <= request.edges_days[-1]].sum())
        if not self.trains or not allowed.all() or within < cell:
            raise _Refusal("small_cell")
        log_hazard = [
            _log_hazard(self._fusion_inputs(arm), beta)
            for arm, beta in zip(request.arms, request.coefficients, strict=True)
        ]
        if any(outweighed(x) for x in log_hazard):
            raise _Refusal("small_cell")
        sums = [interval_sums(x, train.event, train.time, request.edges_days) for x in log_hazard]
        risk = moments(np.column_stack(log_hazard))
        return m.Intervals(
            events=np.array([events for events, _ in sums]),
            exposure=np.array([exposure for _, exposure in sums]),
            risk=np.column_stack([risk.n, risk.mean, risk.m2]),
        )

    def own_model(self) -> FusionModel | None:
        """Fit the local-only model: this site's encoders, fused on this site's rows alone."""
        columns = self.columns(LOCAL_ENCODERS).train
        if not self.trains or np.isnan(columns).all():
            return None
        rows = ~np.isnan(columns).all(axis=1)
        try:
            return fit_late_fusion(
                columns[rows],
                self.rows.train.event[rows],
                self.rows.train.time[rows],
                modalities=self.plan.modalities,
                edges_days=self.plan.edges_days,
                ridge=self.plan.fusion_ridge,
            )
        except ConvergenceError:
            return None

    def test_log_hazard(self, arm: str, coefficients: Floats) -> Floats:
        """(n_test,) log hazard of an arm's model on the test rows; higher is worse."""
        inputs = fusion_inputs(self.columns(arm).test, *self._scaling[arm])
        return _log_hazard(inputs, coefficients)

    def _evaluate(self, request: m.AskEvaluation) -> m.Evaluation:
        test = self.rows.test
        if int(test.event.sum()) < self.plan.minimum.test_events:
            raise _Refusal("below_minimum_events")
        scored = [
            self.test_log_hazard(arm, beta)
            for arm, beta in zip(request.arms, request.coefficients, strict=True)
        ]
        if not all((np.abs(x) < _HIGHEST_LOG_HAZARD).all() for x in scored):
            raise _Refusal("malformed_request")
        own = self.own_model()
        return evaluate_arms(
            request,
            test,
            scored,
            None if own is None else own.predict(self.columns(LOCAL_ENCODERS).test),
            curve=censoring_curve(
                np.concatenate([self.rows.train.event, test.event]),
                np.concatenate([self.rows.train.time, test.time]),
            ),
            cell=self.plan.minimum.cell,
        )


def _log_hazard(inputs: Floats, coefficients: Floats) -> Floats:
    # Coefficients come from outside: an overflow is judged by its result.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(inputs @ coefficients)
