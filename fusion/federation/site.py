"""The site's side of a study: it holds the rows, answers with sums, and refuses what it should."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion import messages as m
from fusion.evaluation import (
    CensoringCurve,
    brier_sums,
    calibration_sums,
    censoring_curve,
    life_table,
    null_brier_sums,
    pair_counts,
    uno_pair_counts,
)
from fusion.federation.plan import LOCAL_ENCODERS, PROTOCOL, FederationPlan
from fusion.late import FusionModel, fit_late_fusion, fusion_inputs, linear_inputs
from fusion.privacy import releasable_edges
from fusion.survival import CoxSums, cox_sums, cumulative_hazard, interval_sums, moments

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fusion.privacy import Refusal

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """Outcome of some patients: ``event`` (n,) True where observed, ``time`` (n,) in days."""

    event: NDArray[np.bool_]
    time: Floats

    def __len__(self) -> int:
        return len(self.time)


@dataclass(frozen=True)
class Split:
    """Values of the training rows and of the test rows, each (n, ...)."""

    train: Floats
    test: Floats


@dataclass(frozen=True)
class SiteRows:
    """Everything that the federation needs of a site. No row of it ever leaves.

    Attributes
    ----------
    cohort
        Digest of the cohort under the site's own secret, 64 hex digits.
    train, test
        Outcomes; a site below its training minimum has test rows only.
    folds
        (n_train,) fold of each training row.
    tables
        Per modality in the plan's ``sums``: harmonised (n, p) inputs; a row of NaN where the
        patient lacks the modality.
    local
        Per modality: (n,) log hazard of the site's own encoder, out-of-fold on the training rows;
        NaN where the patient lacks the modality, absent where the site trained no encoder.
    """

    cohort: str
    train: Outcome
    test: Outcome
    folds: NDArray[np.int64]
    tables: dict[str, Split]
    local: dict[str, Split]


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
        self._answers: dict[type, Callable[[Any], m.Message]] = {
            m.Describe: self._describe,
            m.AskMoments: self._moments,
            m.SetScaling: self._set_scaling,
            m.AskCoxSums: self._cox_sums,
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

    @property
    def trains(self) -> bool:
        """Whether this site's training rows pass its minimum counts for the fusion model."""
        return self._refusal(self.rows.train.event, self.plan.n_fusion_inputs) is None

    def _refusal(self, event: NDArray[np.bool_], n_inputs: int) -> Refusal | None:
        return self.plan.minimum.refuses(
            n_patients=len(event), n_events=int(event.sum()), n_inputs=n_inputs
        )

    def _present(self, modality: str) -> NDArray[np.bool_]:
        """(n_train,) which training rows have the modality."""
        if modality in self.rows.tables:
            return np.asarray(~np.isnan(self.rows.tables[modality].train).all(axis=1))
        if modality in self.rows.local:
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
        train, test = self.rows.train, self.rows.test
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
            else self.columns(design).train
        )

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
            p = len(found.n)
            n[row, :p], mean[row, :p], m2[row, :p] = found.n, found.mean, found.m2
        return m.DesignMoments(n, mean, m2)

    def _set_scaling(self, request: m.SetScaling) -> m.Done:
        for row, design in enumerate(request.designs):
            p = self.plan.n_inputs(design)
            if not (request.scale[row, :p] > 0).all():
                raise _Refusal("malformed_request")
            self._scaling[design] = (request.mean[row, :p], request.scale[row, :p])
        return m.Done()

    def design(self, fit: str) -> tuple[Floats, NDArray[np.bool_]]:
        """(n, p) inputs of a fit and (n_train,) which training rows stand behind them."""
        design, _, fold = fit.partition("/")
        mean, scale = self._scaling[design]
        if design in self.plan.sums:
            rows: NDArray[np.bool_] = self._present(design)
            if fold:
                if not self._cross_fits(design):
                    raise _Refusal("fold_too_small")
                rows = np.logical_and(rows, self.rows.folds != int(fold), dtype=bool)
            return linear_inputs(self.rows.tables[design].train, mean, scale)[rows], rows
        columns = self.columns(design).train
        some = np.asarray(~np.isnan(columns).all(axis=1), dtype=np.bool_)
        return fusion_inputs(columns, mean, scale)[some], some

    def _fit_sums(self, fit: str, coefficients: Floats) -> CoxSums:
        design = fit.partition("/")[0]
        n_inputs = len(self.plan.sums.get(design, ())) or self.plan.n_fusion_inputs
        beta = coefficients[:n_inputs]
        if design in self.plan.sums and not self.contributes(design):
            return CoxSums(0.0, np.zeros(n_inputs), np.zeros((n_inputs, n_inputs)), 0, 0)
        inputs, rows = self.design(fit)
        refusal = self._refusal(self.rows.train.event[rows], n_inputs)
        if refusal is not None:
            raise _Refusal(refusal)
        return cox_sums(inputs, self.rows.train.event[rows], self.rows.train.time[rows], beta)

    def _cox_sums(self, request: m.AskCoxSums) -> m.CoxSumsReply:
        n_fits, width = request.coefficients.shape
        gradient, information = np.zeros((n_fits, width)), np.zeros((n_fits, width, width))
        found = []
        for row, fit in enumerate(request.fits):
            sums = self._fit_sums(fit, request.coefficients[row])
            p = len(sums.gradient)
            gradient[row, :p], information[row, :p, :p] = sums.gradient, sums.information
            found.append(sums)
        return m.CoxSumsReply(
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

    def _edges(self, request: m.AskEdges) -> m.Edges:
        train = self.rows.train
        if not self.trains:
            raise _Refusal("below_minimum_patients")
        kept = releasable_edges(
            train.event, train.time, request.edges_days, cell=self.plan.minimum.cell
        )
        return m.Edges(kept)

    def _intervals(self, request: m.AskIntervals) -> m.Intervals:
        train = self.rows.train
        allowed = releasable_edges(
            train.event, train.time, request.edges_days, cell=self.plan.minimum.cell
        )
        if not self.trains or not allowed.all():
            raise _Refusal("small_cell")
        log_hazard = [
            fusion_inputs(self.columns(arm).train, *self._scaling[arm]) @ beta
            for arm, beta in zip(request.arms, request.coefficients, strict=True)
        ]
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
        return fit_late_fusion(
            columns[rows],
            self.rows.train.event[rows],
            self.rows.train.time[rows],
            modalities=self.plan.modalities,
            edges_days=self.plan.edges_days,
            ridge=self.plan.fusion_ridge,
        )

    def test_log_hazard(self, arm: str, coefficients: Floats) -> Floats:
        """(n_test,) log hazard of an arm's model on the test rows; higher is worse."""
        inputs = fusion_inputs(self.columns(arm).test, *self._scaling[arm])
        return np.asarray(inputs @ coefficients)

    def _evaluate(self, request: m.AskEvaluation) -> m.Evaluation:
        test = self.rows.test
        if int(test.event.sum()) < self.plan.minimum.test_events:
            raise _Refusal("below_minimum_events")
        scored = {
            arm: self.test_log_hazard(arm, beta)
            for arm, beta in zip(request.arms, request.coefficients, strict=True)
        }
        curve = censoring_curve(
            np.concatenate([self.rows.train.event, test.event]),
            np.concatenate([self.rows.train.time, test.time]),
        )
        of_arms = [
            self._arm_tables(request, row, log_hazard, curve)
            for row, log_hazard in enumerate(scored.values())
        ]
        own = self.own_model()
        ranked = list(scored.values())
        if own is not None:
            ranked.append(own.predict(self.columns(LOCAL_ENCODERS).test))
        pairs = [pair_counts(x, test.event, test.time).to_vector() for x in ranked]
        uno = [
            uno_pair_counts(x, test.event, test.time, curve, request.horizon_days).to_vector()
            for x in ranked
        ]
        null = null_brier_sums(test.event, test.time, request.edges_days, curve).to_vector()
        return m.Evaluation(
            n_test=len(test),
            n_test_events=int(test.event.sum()),
            pairs=np.array(pairs),
            uno=np.array(uno),
            brier=np.array([brier for brier, _, _ in of_arms] + [null]),
            life_table=np.array([life for _, life, _ in of_arms]),
            calibration=np.array([cells for _, _, cells in of_arms]),
        )

    def _arm_tables(
        self, request: m.AskEvaluation, row: int, log_hazard: Floats, curve: CensoringCurve
    ) -> tuple[Floats, Floats, Floats]:
        """Brier sums, life table and calibration of one arm; a table with a small cell is zeros."""
        test, edges, cuts = self.rows.test, request.edges_days, request.groups[row]
        hazard = request.hazard_per_day[row]

        def surviving(times: Floats) -> Floats:
            expected = np.exp(log_hazard)[:, None] * cumulative_hazard(hazard, edges, times)
            return np.exp(-expected)

        group = np.searchsorted(cuts, log_hazard)
        n_groups = len(cuts) + 1
        life = life_table(test.event, test.time, group, np.append(0.0, edges), n_groups)
        cells = calibration_sums(
            surviving(np.array([request.horizon_days]))[:, 0],
            test.event,
            test.time,
            group,
            horizon=request.horizon_days,
            censoring=curve,
            n_groups=n_groups,
        )
        brier = brier_sums(surviving(edges), test.event, test.time, edges, curve)
        return (
            brier.to_vector(),
            self._without_small_cells(life.counts, life.to_vector()),
            self._without_small_cells(
                np.stack([cells.n_patients, cells.n_events]), cells.to_vector()
            ),
        )

    def _without_small_cells(self, counts: Floats, vector: Floats) -> Floats:
        small = (counts > 0) & (counts < self.plan.minimum.cell)
        return np.zeros_like(vector) if small.any() else vector
