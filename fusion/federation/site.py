"""The site's side of a study: it holds the rows, answers with sums, and refuses what it should."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fusion import messages as m
from fusion.averaging import LocalSteps, local_update
from fusion.discrete import hazard_sums, hazard_weights
from fusion.federation.alarms import own_warnings
from fusion.federation.answered import AnswerLedger
from fusion.federation.checks import is_within
from fusion.federation.designs import NotReleased, SiteDesigns
from fusion.federation.masking import SiteMasks
from fusion.federation.plan import (
    CALIBRATION_SLOPE,
    LOCAL_ENCODERS,
    MAX_TRY_ROUNDS,
    PROTOCOL,
    FederationPlan,
)
from fusion.federation.private_fitting import OPENING, SitePrivacy, schedule
from fusion.federation.rows import Split
from fusion.federation.self_check import model_fault, self_check
from fusion.federation.site_evaluation import evaluate_site, personal_coefficients
from fusion.federation.totals import is_added
from fusion.keys import digest
from fusion.late import fit_late_fusion
from fusion.late.gated import gated_log_hazard, gated_loss_gradient
from fusion.newton import MAX_ROUNDS, ConvergenceError, LikelihoodSums
from fusion.privacy import outweighed, releasable_edges, saturated
from fusion.survival import cox_sums, interval_sums, moments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from fusion.differential_privacy import PrivacyLedger
    from fusion.federation.answered import Book
    from fusion.federation.masking import SiteIdentity
    from fusion.federation.plan import AveragingPlan
    from fusion.federation.rows import SiteRows
    from fusion.late import FusionModel
    from fusion.privacy import Refusal

    Floats = NDArray[np.float64]

# Sums at ever other coefficients tell ever more of the rows. A fit gets those that Newton's method
# needs, and some for starting over when a site leaves.
MAX_SUMS_PER_FIT: Final = MAX_ROUNDS + 10
# Over all runs on one cohort: a run may end early and begin again, with fewer sites for one.
RERUNS: Final = 3
_ANY_RUN: Final = "0" * 64
# Stands for sums that one patient outweighs: no step ends there, the coordinator halves it.
_LOWEST: Final = -1e12
# Far above any model's, far below where its exponential overflows.
_HIGHEST_LOG_HAZARD: Final = 300.0
_ONCE: Final = (
    m.AskProducts, m.SetComponents, m.SetEncoders, m.SetGrid,
    m.AskIntervals, m.AskEvaluation,
)  # fmt: skip


class SiteStudy:
    """One site's part in one run, as a function from request bytes to reply bytes.

    Parameters
    ----------
    plan
        From the protocol that this site approved.
    rows
        The site's rows.
    identity
        The site's key and whom it believes, for secure sums.
    ledger
        The site's only one of noisy releases; needed where the plan has a privacy budget.
    book
        What was answered about these rows before, in whatever run; a fresh one where None.
    on_error
        Called with any unexpected exception, for the site's own log; only a code leaves.
    on_warning
        Called with one sentence for each way in which the consortium's model does not fit this
        site's own rows, for the site's own log; nothing of it leaves.

    Notes
    -----
    Where the plan allows leaving sites out, the requests of these further runs carry names of their
    own (:meth:`FederationPlan.left_out_runs`), and each has a part of its own.
    """

    def __init__(
        self,
        plan: FederationPlan,
        rows: SiteRows,
        *,
        identity: SiteIdentity | None = None,
        book: Book | None = None,
        ledger: PrivacyLedger | None = None,
        on_error: Callable[[Exception], None] | None = None,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        self.designs = SiteDesigns(plan, rows)
        self._book = AnswerLedger().open("") if book is None else book
        self._masks = SiteMasks(identity, self._book)
        self._ledger = ledger
        self._noisy: SitePrivacy | None = None
        self._on_error = on_error
        self._on_warning = on_warning
        self._trains_here: bool | None = None
        self._approved = plan
        self._grid_agreed = False
        self._own: list[FusionModel | None] = []
        self._absent_from: str | None = None
        self._networks: dict[str, Floats] = {}
        self._answered: dict[type, bytes] = {}
        self._sums_given: Counter[str] = Counter()
        self._updates_given: Counter[str] = Counter()
        self._left_out: dict[str, SiteStudy | None] = dict.fromkeys(plan.left_out_runs)
        self._answers: dict[type, Callable[[Any], m.Message]] = {
            m.Describe: self._describe,
            m.AskKey: self._key,
            m.SetKeys: self._set_keys,
            m.AskMoments: self._moments,
            m.SetScaling: self._set_scaling,
            m.AskProducts: self._products,
            m.SetComponents: self._set_components,
            m.AskSums: self._sums,
            m.AskPrivateSteps: self._private_steps,
            m.SetEncoders: self._set_encoders,
            m.AskUpdates: self._updates,
            m.SetNetworks: self._set_networks,
            m.AskEdges: self._edges,
            m.SetGrid: self._set_grid,
            m.AskIntervals: self._intervals,
            m.AskEvaluation: self._evaluate,
        }

    @property
    def plan(self) -> FederationPlan:
        """What this site approved, on the grid that the run agreed on."""
        return self.designs.plan

    @property
    def rows(self) -> SiteRows:
        """The site's rows."""
        return self.designs.rows

    @property
    def trains(self) -> bool:
        """Whether this site's training rows pass its minimum counts for the fusion model."""
        return self.designs.trains

    def answer(self, payload: bytes) -> bytes:
        """Answer one request; whatever goes wrong leaves as a code."""
        try:
            request = m.decode(payload)
            handler = self._answers.get(type(request))
            if handler is None:
                raise NotReleased("malformed_request")
            run = request.run  # type: ignore[union-attr]
            if run in self._left_out:
                self._require_one_absence(request)
                return self._part_in(run).answer(payload)
            if run != self.plan.run:
                raise NotReleased("wrong_run")
            if not is_within(request, self.plan):
                raise NotReleased("malformed_request")
            self._require_first(request)
            return m.encode(self._reply(handler, request))
        except NotReleased as refusal:
            return m.encode(m.Refused(refusal.code))
        except (m.MessageError, KeyError, IndexError) as error:
            return self._failed(error, "malformed_request")
        except Exception as error:  # noqa: BLE001
            return self._failed(error, "site_error")

    def _reply(self, handler: Callable[[Any], m.Message], request: Any) -> m.Message:
        """Answer, behind masks where the plan wants them; test rows' sums are each site's own."""
        fits = getattr(request, "fits", ())
        if not (self.plan.secure_sum and is_added(request)) or fits == (CALIBRATION_SLOPE,):
            return handler(request)
        if CALIBRATION_SLOPE in fits:
            raise NotReleased("malformed_request")
        self._masks.require_fresh(request, private=self.plan.private)
        return self._masks.hide(request, handler(request))

    def _key(self, request: m.AskKey) -> m.Key:
        return self._masks.key(request, self.plan)

    def _set_keys(self, request: m.SetKeys) -> m.Done:
        return self._masks.agree(request)

    def _failed(self, error: Exception, code: Refusal) -> bytes:
        if self._on_error is not None:
            self._on_error(error)
        return m.encode(m.Refused(code))

    def _require_one_absence(self, request: Any) -> None:
        """Let this site be left out of one run only: its patients are then evaluated but once."""
        if isinstance(request, m.Describe) and not request.trains:
            if self._absent_from not in (None, request.run):
                raise NotReleased("already_answered")
            self._absent_from = request.run

    def _part_in(self, run: str) -> SiteStudy:
        part = self._left_out[run]
        if part is None:
            plan = self._approved.left_out_plan(run)
            part = self._left_out[run] = SiteStudy(
                plan,
                self.rows,
                book=self._book,
                on_error=self._on_error,
                on_warning=self._on_warning,
            )
        return part

    def _require_first(self, request: Any) -> None:
        """Let some requests differ but once in a run; the same again is a network's doing."""
        said = self._trains_here is not None or isinstance(request, m.Describe)
        if self.plan.brief and not said:
            # Else training rows could give sums first and be evaluated as test rows then.
            raise NotReleased("malformed_request")
        if isinstance(request, _ONCE):
            first = m.encode(replace(request, run=_ANY_RUN, round=0))
            if self._answered.setdefault(type(request), first) != first:
                raise NotReleased("already_answered")
            self._count([(type(request).__name__, digest(first), RERUNS)])

    def _count(self, asked: Sequence[tuple[str, str, int]]) -> None:
        """Count what is asked of these rows, over all runs."""
        kind = "left out: " if self.plan.brief else ""
        if not self._book.spend([(kind + name, request, most) for name, request, most in asked]):
            raise NotReleased("rounds_spent")

    def columns(self, arm: str) -> Split:
        """(n, m) modality log hazards of an arm, NaN where absent; not standardised."""
        return self.designs.columns(arm)

    def contributes(self, modality: str) -> bool:
        """Whether enough training patients stand behind this modality's sums or columns."""
        return self.designs.contributes(modality)

    def _describe(self, request: m.Describe) -> m.Description:
        if request.protocol != self.plan.protocol or request.modalities != self.plan.modalities:
            raise NotReleased("wrong_protocol")
        if not (request.trains or self.plan.brief):
            raise NotReleased("malformed_request")
        if self._trains_here is None:
            if request.trains:
                self._require_sound(self_check(self.rows))
            self._trains_here = request.trains
            if not request.trains:
                self._become_external()
        elif self._trains_here != request.trains:
            raise NotReleased("already_answered")
        designs = self.designs
        train, test = designs.behind_fusion, designs.test
        # Counts below the site's minimum are not told, neither of training nor of test rows.
        shown = designs.trains
        tested = int(test.event.sum()) >= self.plan.minimum.test_events
        return m.Description(
            cohort=self.rows.cohort,
            n_train=len(train) if shown else 0,
            n_train_events=int(train.event.sum()) if shown and not self.plan.private else 0,
            n_test=len(test) if tested else 0,
            n_test_events=int(test.event.sum()) if tested else 0,
            trains=shown,
            contributes=np.array([designs.contributes(x) for x in request.modalities]),
            cross_fits=np.array([designs.cross_fits(x) for x in request.modalities]),
            reduces=np.array([designs.reduces(x) for x in request.modalities]),
        )

    def _require_sound(self, fault: str | None) -> None:
        """Contribute nothing while the site's own rows look wrong; its own log says why."""
        if fault is None:
            return
        if self._on_error is not None:
            self._on_error(ValueError(fault))
        raise NotReleased("not_within_bounds")

    def _become_external(self) -> None:
        """Take part as if this site had never trained, unless that would single patients out.

        Who has nothing but modalities with local encoders is then not evaluated, and would follow
        from the counts of the study's own run by subtraction.
        """
        took_part = int(self.designs.fused.sum()) + int(self.designs.tested.sum())
        self.designs.rows = self.rows.as_external()
        left = took_part - int(self.designs.tested.sum())
        if 0 < left < self.plan.minimum.cell:
            raise NotReleased("small_cell")

    def _moments(self, request: m.AskMoments) -> m.DesignMoments:
        width = max(self.plan.n_inputs(design) for design in request.designs)
        shape = (len(request.designs), width)
        n, mean, m2 = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for row, design in enumerate(request.designs):
            if design in self.plan.sums and not self.contributes(design):
                continue
            found = moments(self.designs.training_columns(design))
            told = np.flatnonzero(found.n >= self.plan.minimum.patients)
            for values, of_column in ((n, found.n), (mean, found.mean), (m2, found.m2)):
                values[row, told] = of_column[told]
        return m.DesignMoments(n, mean, m2)

    def _set_scaling(self, request: m.SetScaling) -> m.Done:
        # Another scale makes other sums of the same coefficients.
        self._count(
            [
                (f"SetScaling: {design}", digest(mean.tobytes() + scale.tobytes()), RERUNS)
                for design, mean, scale in zip(
                    request.designs, request.mean, request.scale, strict=True
                )
            ]
        )
        for row, design in enumerate(request.designs):
            p = self.plan.n_inputs(design)
            found = (request.mean[row, :p], request.scale[row, :p])
            if not np.array_equal(self.designs.scaling.setdefault(design, found), found):
                raise NotReleased("already_answered")
        return m.Done()

    def _products(self, request: m.AskProducts) -> m.Products:
        width = max(self.plan.n_inputs(design) for design in request.designs)
        n, products = np.zeros(len(request.designs)), []
        for row, design in enumerate(request.designs):
            found = np.zeros((width, width))
            if self.designs.reduces(design):
                rows = self.designs.scaled(design).train[self.designs.present(design)]
                n[row], p = len(rows), rows.shape[1]
                found[:p, :p] = rows.T @ rows
            products.append(found)
        return m.Products(n, np.array(products))

    def _set_components(self, request: m.SetComponents) -> m.Done:
        for row, design in enumerate(request.designs):
            axes = request.axes[row, : self.plan.n_inputs(design), : self.plan.components[design]]
            with np.errstate(over="ignore", invalid="ignore"):
                products = axes.T @ axes
            if not np.allclose(products, np.eye(axes.shape[1]), atol=1e-8):
                raise NotReleased("malformed_request")
            self.designs.axes[design] = axes
        return m.Done()

    def _fit_sums(self, fit: str, coefficients: Floats) -> LikelihoodSums:
        design, p = fit.partition("/")[0], self.plan.n_coefficients(fit)
        beta = coefficients[:p]
        if design in self.plan.sums and not self.contributes(design):
            return _nothing(p, 0.0)
        inputs, outcome = self.designs.design(fit)
        refusal = self._refusal_of(design, outcome.event, p)
        if refusal is not None:
            raise NotReleased(refusal)
        n_baseline = self.plan.n_baseline if design in self.plan.arms else 0
        if n_baseline:
            self._require_grid()
        if design == CALIBRATION_SLOPE:
            return self._slope_sums(beta)
        if outweighed(_log_hazard(inputs, beta[n_baseline:])):
            return _nothing(p, _LOWEST, len(outcome), int(outcome.event.sum()))
        if n_baseline:
            rows, edges = (inputs, outcome.event, outcome.time), np.array(self.plan.edges_days)
            if saturated(hazard_weights(*rows, beta, edges_days=edges)):
                return _nothing(p, _LOWEST, len(outcome), int(outcome.event.sum()))
            return hazard_sums(*rows, beta, edges_days=edges)
        return cox_sums(inputs, outcome.event, outcome.time, beta)

    def _slope_sums(self, slope: Floats) -> LikelihoodSums:
        """Give the sums of the one coefficient that stretches the test rows' log hazards."""
        inputs, outcome = self.designs.design(CALIBRATION_SLOPE)
        if outweighed(_log_hazard(inputs, slope)):
            raise NotReleased("small_cell")
        k, rows = self.plan.n_baseline, (inputs, outcome.event, outcome.time)
        if k == 0:
            return cox_sums(*rows, slope)
        # The log odds of the intervals are the model's own, and the site's intercept is free.
        theta = np.concatenate([self.designs.slope_baseline, slope])
        edges = np.array(self.plan.edges_days)
        if saturated(hazard_weights(*rows, theta, edges_days=edges)):
            raise NotReleased("small_cell")
        sums = hazard_sums(*rows, theta, edges_days=edges)
        return replace(sums, gradient=sums.gradient[k:], information=sums.information[k:, k:])

    def _refusal_of(self, design: str, event: NDArray[np.bool_], n_inputs: int) -> Refusal | None:
        if design == CALIBRATION_SLOPE:
            enough = int(event.sum()) >= self.plan.minimum.test_events
            return None if enough else "below_minimum_events"
        return self.designs.refusal(event, n_inputs)

    def _spend(self, fits: tuple[str, ...]) -> None:
        """Count sums per fit, and those of all fits that choose one penalty together.

        The latter are sums of the same rows, so that each of their names adds to what one learns.
        """
        self._sums_given.update(fits)
        for fit in fits:
            design, _, part = fit.partition("/")
            tried = part.startswith("try-")
            if tried:
                self._sums_given[f"{design}/try"] += 1
            most = MAX_TRY_ROUNDS * len(self.plan.try_fits(design))
            spent = tried and self._sums_given[f"{design}/try"] > most
            if spent or self._sums_given[fit] > MAX_SUMS_PER_FIT:
                raise NotReleased("rounds_spent")

    def _count_points(self, request: Any, points: Floats, most: int) -> None:
        """Count the points at which each fit is asked about."""
        self._count(
            [
                (f"{type(request).__name__}: {fit}", digest(point.tobytes()), most)
                for fit, point in zip(request.fits, points, strict=True)
            ]
        )

    def _sums(self, request: m.AskSums) -> m.Sums:
        self._spend(request.fits)
        self._count_points(request, request.coefficients, RERUNS * MAX_SUMS_PER_FIT)
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

    def _privacy(self) -> SitePrivacy:
        if self._ledger is None or not self.plan.private or not self.trains:
            raise NotReleased("malformed_request")
        if self._noisy is None:
            self._noisy = SitePrivacy(
                schedule(self.plan.budget, self.plan.private_fits),
                self._ledger,
                label=(self.plan.run, self.rows.cohort),
                outcome=self.designs.behind_fusion,
                edges_days=self.plan.edges_days,
            )
        return self._noisy

    def _private_steps(self, request: m.AskPrivateSteps) -> m.PrivateSteps:
        end, found = self._privacy(), np.zeros_like(request.coefficients)
        if request.step == OPENING:
            found[0, 0] = end.opening()
            return m.PrivateSteps(found)
        if PROTOCOL in request.fits:
            self._require_described()
        for row, fit in enumerate(request.fits):
            if fit != PROTOCOL and not self.contributes(fit):
                continue
            inputs, outcome = self.designs.design(fit)
            p = self.plan.n_coefficients(fit)
            refusal = self._refusal_of(fit, outcome.event, p)
            if refusal is not None:
                raise NotReleased(refusal)
            found[row, :p] = end.step(
                fit, request.step, request.coefficients[row, :p], inputs=inputs, outcome=outcome
            )
        return m.PrivateSteps(found)

    def _require_described(self) -> None:
        """Refuse what rests on the consortium's encoders at a site begun in the midst of a run.

        Under a budget each site scales for itself, so that nothing else that it lacks would show.
        """
        if self.plan.private and self._trains_here is None:
            raise NotReleased("malformed_request")

    def _set_encoders(self, request: m.SetEncoders) -> m.Done:
        fitted = dict(zip(request.fits, request.coefficients, strict=True))
        for modality in self.plan.sums:
            if modality not in fitted or modality not in self.rows.tables:
                continue
            self._require_folds_of(modality, fitted)
            p = self.plan.n_coefficients(modality)
            inputs = self.designs.shared_inputs(modality)
            folds = {
                fold: inputs.train @ fitted[fit][:p] for fold, fit in self._folds(modality, fitted)
            }
            beta = fitted[modality][:p]
            self.designs.encoder_lengths[modality] = float(np.linalg.norm(beta))
            whole = Split(inputs.train @ beta, inputs.test @ beta)
            self.designs.encode(modality, whole, folds)
        return m.Done()

    def _folds(self, modality: str, fitted: dict[str, Floats]) -> list[tuple[int, str]]:
        return [(n, x) for n, x in enumerate(self.plan.fold_fits(modality)) if x in fitted]

    def _require_folds_of(self, modality: str, fitted: dict[str, Floats]) -> None:
        if self._folds(modality, fitted) and self.contributes(modality):
            self.designs.require_cross_fits(modality)

    def _updates(self, request: m.AskUpdates) -> m.Updates:
        for fit in request.fits:
            if self._updates_given[fit] >= self._averaging(fit).rounds + 10:
                raise NotReleased("rounds_spent")
        self._updates_given.update(request.fits)
        rounds = max(self._averaging(fit).rounds for fit in request.fits) + 10
        self._count_points(request, request.weights, RERUNS * rounds)
        weights, loss = np.zeros_like(request.weights), np.zeros(len(request.fits))
        counts = np.zeros((2, len(request.fits)), dtype=np.int64)
        for row, fit in enumerate(request.fits):
            n_weights = self.plan.n_weights(fit)
            found = self._loss_gradient(fit, request.ridge)
            if found is None:
                continue
            gradient, event = found
            refusal = self.designs.refusal(event, 1)
            if refusal is not None:
                raise NotReleased(refusal)
            averaging = self._averaging(fit)
            steps = LocalSteps(averaging.local_steps, averaging.learning_rate, averaging.proximal)
            update = local_update(gradient, request.weights[row, :n_weights], steps)
            weights[row, :n_weights], loss[row] = update.weights, update.loss
            counts[:, row] = len(event), int(event.sum())
        return m.Updates(weights, loss, counts[0], counts[1])

    def _averaging(self, fit: str) -> AveragingPlan:
        found = self.plan.averaging(fit)
        if found is None:
            raise NotReleased("malformed_request")
        return found

    def _loss_gradient(
        self, fit: str, ridge: float
    ) -> tuple[Callable[[Floats], tuple[float, Floats]], NDArray[np.bool_]] | None:
        """Loss of a network on the site's rows behind a fit, or None where it has none."""
        design = fit.partition("/")[0]
        if design == PROTOCOL:
            inputs, outcome = self.designs.design(PROTOCOL)
            hidden = self.plan.gating_hidden
            return (
                lambda w: gated_loss_gradient(
                    w, inputs, outcome.event, outcome.time, hidden=hidden, ridge=ridge
                )
            ), outcome.event
        if not self.contributes(design):
            return None
        rows, network = self.designs.behind(fit), self.rows.networks[design]
        return (lambda w: network.loss_gradient(w, rows)), self.rows.train.event[rows]

    def _set_networks(self, request: m.SetNetworks) -> m.Done:
        self._count_points(request, request.weights, RERUNS)
        n_train = len(self.rows.train)
        fitted = {
            fit: weights[: self.plan.n_weights(fit)]
            for fit, weights in zip(request.fits, request.weights, strict=True)
        }
        for fit, weights in fitted.items():
            if not np.array_equal(self._networks.setdefault(fit, weights), weights):
                raise NotReleased("already_answered")
        for modality, network in self.rows.networks.items():
            if modality not in fitted:
                continue
            self._require_folds_of(modality, fitted)
            scores = network.log_hazard(fitted[modality])
            folds = {
                fold: network.log_hazard(fitted[fit])[:n_train]
                for fold, fit in self._folds(modality, fitted)
            }
            self.designs.encode(modality, Split(scores[:n_train], scores[n_train:]), folds)
        return m.Done()

    def _edges(self, request: m.AskEdges) -> m.Edges:
        train = self.designs.behind_fusion
        if not self.trains:
            raise NotReleased("below_minimum_patients")
        kept = releasable_edges(
            train.event, train.time, request.edges_days, cell=self.plan.minimum.cell
        )
        # A site may allow fewer intervals than the study has: the first ones are kept.
        return m.Edges(kept & (np.cumsum(kept) < self.plan.minimum.intervals))

    def _set_grid(self, request: m.SetGrid) -> m.Done:
        train, cell = self.designs.behind_fusion, self.plan.minimum.cell
        if len(request.edges_days) > self.plan.minimum.intervals:
            raise NotReleased("small_cell")
        if self.trains:
            allowed = releasable_edges(train.event, train.time, request.edges_days, cell=cell)
            within = int(train.event[train.time <= request.edges_days[-1]].sum())
            if not allowed.all() or within < cell:
                raise NotReleased("small_cell")
        self.designs.plan = replace(self.plan, edges_days=tuple(request.edges_days.tolist()))
        self._grid_agreed = True
        return m.Done()

    def _require_grid(self) -> None:
        """Refuse sums by interval until the grid has no small cell."""
        if not self._grid_agreed:
            raise NotReleased("malformed_request")

    def _intervals(self, request: m.AskIntervals) -> m.Intervals:
        if not self.trains:
            raise NotReleased("below_minimum_patients")
        if self.plan.private:
            noisy = self._privacy().intervals(
                request.coefficients[0], self.designs.fusion_inputs(PROTOCOL)
            )
            return m.Intervals(*(x[None] for x in noisy))
        self._require_grid()
        train = self.designs.behind_fusion
        log_hazard = [
            self._fusion_log_hazard(arm, self.designs.fusion_inputs(arm), beta)
            for arm, beta in zip(request.arms, request.coefficients, strict=True)
        ]
        if any(outweighed(x) for x in log_hazard):
            raise NotReleased("small_cell")
        edges = np.array(self.plan.edges_days)
        sums = [interval_sums(x, train.event, train.time, edges) for x in log_hazard]
        risk = moments(np.column_stack(log_hazard))
        return m.Intervals(
            events=np.array([events for events, _ in sums]),
            exposure=np.array([exposure for _, exposure in sums]),
            risk=np.column_stack([risk.n, risk.mean, risk.m2]),
        )

    def _fusion_log_hazard(self, arm: str, inputs: Floats, coefficients: Floats) -> Floats:
        if arm == PROTOCOL and arm in self._networks:
            return gated_log_hazard(self._networks[arm], inputs, hidden=self.plan.gating_hidden)
        return _log_hazard(inputs, coefficients)

    def own_model(self) -> FusionModel | None:
        """Fit the local-only model, once: this site's encoders, fused on this site's rows alone."""
        if not self._own:
            self._own.append(self._fit_own())
        return self._own[0]

    def _fit_own(self) -> FusionModel | None:
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
        """(n_tested,) log hazard of an arm's model on the evaluated rows; higher is worse."""
        return self._fusion_log_hazard(arm, self.designs.test_inputs(arm), coefficients)

    def _evaluate(self, request: m.AskEvaluation) -> m.Evaluation:
        self._require_described()
        test = self.designs.test
        if int(test.event.sum()) < self.plan.minimum.test_events:
            raise NotReleased("below_minimum_events")
        if self.plan.brief and self._trains_here is not False:
            raise NotReleased("already_answered")  # in the study's own run
        scored: list[Floats | None] = []
        for arm, beta in zip(request.arms, request.coefficients, strict=True):
            known = ~np.isnan(self.columns(arm).test[self.designs.tested]).all()
            scored.append(self.test_log_hazard(arm, beta) if known else None)
        if not all((np.abs(x) < _HIGHEST_LOG_HAZARD).all() for x in scored if x is not None):
            raise NotReleased("malformed_request")
        if scored[0] is None:
            raise NotReleased("modality_absent")
        scored += [self._own_log_hazard(), self._personal_log_hazard(request)]
        self.designs.slope = scored[0]
        self.designs.slope_baseline = request.baseline[0][: self.plan.n_baseline]
        evaluated = evaluate_site(request, self.designs, scored)
        self._warn(evaluated)
        return evaluated

    def _warn(self, evaluated: m.Evaluation) -> None:
        """Tell this site's own log, and nobody else, where the model does not fit its rows."""
        if self._on_warning is None:
            return
        for sentence in own_warnings(self.plan, evaluated):
            self._on_warning(sentence)
        fault = self._encoders_fault() if self.trains else None
        if fault is not None:
            self._on_warning(fault)

    def _encoders_fault(self) -> str | None:
        """Ask of the consortium's encoders what the site asked of its own before it took part."""
        of_consortium = [x in self.plan.shared for x in self.plan.modalities]
        columns = self.columns(PROTOCOL).train[:, of_consortium]
        return model_fault(list(columns.T), self.rows.train)

    def _own_log_hazard(self) -> Floats | None:
        own = self.own_model()
        if own is None:
            return None
        found = own.predict(self.columns(LOCAL_ENCODERS).test[self.designs.tested])
        # Who lacks what the site's own model reads is at its average.
        return np.nan_to_num(found, nan=0.0)

    def _personal_log_hazard(self, request: m.AskEvaluation) -> Floats | None:
        if not self.trains or PROTOCOL in self._networks:
            return None
        at = request.arms.index(PROTOCOL)
        beta = personal_coefficients(
            self.designs,
            np.concatenate(
                [request.baseline[at][: self.plan.n_baseline], request.coefficients[at]]
            ),
            request.between_site_variance,
        )
        return None if beta is None else self.test_log_hazard(PROTOCOL, beta)


def _nothing(
    p: int, log_likelihood: float, n_patients: int = 0, n_events: int = 0
) -> LikelihoodSums:
    return LikelihoodSums(log_likelihood, np.zeros(p), np.zeros((p, p)), n_patients, n_events)


def _log_hazard(inputs: Floats, coefficients: Floats) -> Floats:
    # Coefficients come from outside: an overflow is judged by its result.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(inputs @ coefficients)
