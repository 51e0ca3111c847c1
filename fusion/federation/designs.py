"""From a site's rows to the matrices that its sums are of, and who stands behind each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fusion.federation.plan import CALIBRATION_SLOPE, LOCAL_ENCODERS, fold_of, without
from fusion.federation.rows import Outcome, Split
from fusion.late import fusion_inputs, linear_inputs
from fusion.survival import moments

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fusion.federation.plan import FederationPlan
    from fusion.federation.rows import SiteRows
    from fusion.privacy import Refusal

    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool_]


class NotReleased(Exception):
    """A site's refusal; the code is all that leaves."""

    def __init__(self, code: Refusal) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class SiteDesigns:
    """A site's rows as one run sees them: scaled, encoded, and cut by the minimum counts.

    Attributes
    ----------
    scaling
        Per design the (p,) mean and (p,) scale that the coordinator set.
    axes
        Per modality the (p, k) axes that reduce its scaled inputs.
    encoded
        Per modality the log hazards of the consortium's encoder.
    encoder_lengths
        Norm of its coefficients, where a privacy budget leaves each site to scale for itself.
    slope
        Test log hazards whose calibration slope is asked for; ``slope_baseline`` are the log odds
        of a discrete model's intervals.
    """

    plan: FederationPlan
    rows: SiteRows
    scaling: dict[str, tuple[Floats, Floats]] = field(default_factory=dict)
    axes: dict[str, Floats] = field(default_factory=dict)
    encoded: dict[str, Split] = field(default_factory=dict)
    encoder_lengths: dict[str, float] = field(default_factory=dict)
    slope: Floats | None = None
    slope_baseline: Floats = field(default_factory=lambda: np.zeros(0))
    _matrices: dict[tuple[str, int | None], tuple[Floats, Outcome]] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether this site's training rows pass its minimum counts for the fusion model."""
        return self.refusal(self.behind_fusion.event, self.plan.n_fusion_inputs) is None

    @property
    def fused(self) -> Flags:
        """(n_train,) which training rows stand behind the fusion model: the same in every arm.

        Sums of two arms, or of a fit and its baseline, then never differ by a few patients.
        """
        shared = [self.present(modality) for modality in self.plan.modalities]
        own = [~np.isnan(column.train) for column in self.rows.local.values()]
        return np.logical_or.reduce([*shared, *own])

    @property
    def behind_fusion(self) -> Outcome:
        """Outcome of the rows behind the fusion model."""
        rows = self.fused
        return Outcome(self.rows.train.event[rows], self.rows.train.time[rows])

    @property
    def tested(self) -> Flags:
        """(n_test,) test rows of patients who have some modality; the others have no risk."""
        n_train = len(self.rows.train)
        found: list[Flags] = [np.zeros(len(self.rows.test), dtype=bool)]
        found += [
            np.asarray(~np.isnan(table.test).all(axis=1)) for table in self.rows.tables.values()
        ]
        found += [~np.isnan(column.test) for column in self.rows.local.values()]
        found += [network.present[n_train:] for network in self.rows.networks.values()]
        return np.logical_or.reduce(found)

    @property
    def test(self) -> Outcome:
        """Outcome of the rows that are evaluated."""
        rows = self.tested
        return Outcome(self.rows.test.event[rows], self.rows.test.time[rows])

    def refusal(self, event: Flags, n_inputs: int) -> Refusal | None:
        """Why a sum over these patients does not leave, or None."""
        return self.plan.minimum.refuses(
            n_patients=len(event), n_events=int(event.sum()), n_inputs=n_inputs
        )

    def present(self, modality: str) -> Flags:
        """(n_train,) which training rows stand behind the modality's own sums or column."""
        n_train = len(self.rows.train)
        if modality in self.plan.sums:
            if modality in self.rows.tables:
                return np.asarray(~np.isnan(self.rows.tables[modality].train).all(axis=1))
        elif modality in self.plan.networks:
            if modality in self.rows.networks:
                return self.rows.networks[modality].present[:n_train]
        elif modality in self.rows.local:
            return np.asarray(~np.isnan(self.rows.local[modality].train))
        return np.zeros(n_train, dtype=bool)

    def contributes(self, modality: str) -> bool:
        """Whether enough training patients stand behind this modality's sums or columns."""
        n_inputs = self.plan.n_coefficients(modality) if modality in self.plan.sums else 1
        event = self.rows.train.event[self.present(modality)]
        return self.trains and self.refusal(event, n_inputs) is None

    def cross_fits(self, modality: str) -> bool:
        """Whether every fold of a shared encoder passes too."""
        if modality not in self.plan.shared or not self.contributes(modality):
            return False
        present = self.present(modality)
        refusal = self.plan.minimum.refuses_folds(
            self.rows.folds[present],
            self.rows.train.event[present],
            n_folds=self.plan.n_folds,
            n_inputs=self.plan.n_coefficients(modality) if modality in self.plan.sums else 1,
        )
        return refusal is None

    def require_cross_fits(self, modality: str) -> None:
        """Refuse a fit that leaves a fold out where folds are too small."""
        if not self.cross_fits(modality):
            raise NotReleased("fold_too_small")

    def reduces(self, modality: str) -> bool:
        """Whether enough patients stand behind the products of a modality's inputs."""
        if modality not in self.plan.components or not self.contributes(modality):
            return False
        event = self.rows.train.event[self.present(modality)]
        return self.refusal(event, self.plan.n_inputs(modality)) is None

    def training_columns(self, design: str) -> Floats:
        """Raw inputs of a design, whose moments the consortium shares."""
        if not self.trains:
            raise NotReleased("below_minimum_patients")
        if design in self.plan.sums:
            return self.rows.tables[design].train
        return self.fusion_columns(design)

    def scaled(self, modality: str) -> Split:
        """(n, p) standardised inputs of a shared table, before any reduction."""
        table, scaling = self.rows.tables[modality], self._scaling(modality)
        return Split(linear_inputs(table.train, *scaling), linear_inputs(table.test, *scaling))

    def shared_inputs(self, modality: str) -> Split:
        """(n, p) inputs of a shared linear encoder."""
        scaled = self.scaled(modality)
        if modality not in self.plan.components:
            return scaled
        axes = self.axes[modality]
        return Split(scaled.train @ axes, scaled.test @ axes)

    def fusion_columns(self, arm: str) -> Floats:
        """(n_fused, m) training columns of an arm; a modality of too few patients is absent."""
        columns = self.columns(arm).train[self.fused]
        event = self.behind_fusion.event
        for column in columns.T:
            if self.refusal(event[~np.isnan(column)], 1) is not None:
                column[:] = np.nan
        return columns

    def fusion_inputs(self, arm: str) -> Floats:
        """(n_fused, 2 m) standardised columns and flags; a flag that few patients raise is down.

        Products with such a flag would tell the few patients' other inputs. A flag that the arm
        raises for everybody is down too: it says nothing.
        """
        inputs = fusion_inputs(self.fusion_columns(arm), *self._scaling(arm))
        flags = inputs[:, len(self.plan.modalities) :]
        flags[:, flags.sum(axis=0) < self.plan.minimum.cell] = 0.0
        for at, modality in enumerate(self.plan.modalities):
            if arm == without(modality):
                flags[:, at] = 0.0
        return inputs

    def columns(self, arm: str) -> Split:
        """(n, m) modality log hazards of an arm, NaN where absent; not standardised."""
        picked = [self._column(arm, modality) for modality in self.plan.modalities]
        return Split(
            np.column_stack([c.train for c in picked]), np.column_stack([c.test for c in picked])
        )

    def _column(self, arm: str, modality: str) -> Split:
        if arm == without(modality):
            return self._absent
        of_site = arm == LOCAL_ENCODERS or modality not in self.plan.shared
        return (self.rows.local if of_site else self.encoded).get(modality, self._absent)

    @property
    def _absent(self) -> Split:
        rows = self.rows
        return Split(np.full(len(rows.train), np.nan), np.full(len(rows.test), np.nan))

    def test_inputs(self, arm: str) -> Floats:
        """(n_tested, 2 m) fusion inputs of the rows that are evaluated."""
        return fusion_inputs(self.columns(arm).test[self.tested], *self._scaling(arm))

    def model_columns(self, arm: str) -> Split:
        """(n, m) columns as the run's model reads them: scaled here where the site scales."""
        found = self.columns(arm)
        if not self.plan.private:
            return found
        mean, scale = self._scaling(arm)
        return Split((found.train - mean) / scale, (found.test - mean) / scale)

    def _scaling(self, design: str) -> tuple[Floats, Floats]:
        """Mean and scale of a design's columns: agreed on, or this site's own under a budget."""
        if self.plan.private and design not in self.scaling:
            self.scaling[design] = (
                self._own_scaling(self.rows.tables[design])
                if design in self.plan.sums
                else self._arm_scaling(design)
            )
        return self.scaling[design]

    def _own_scaling(self, columns: Split) -> tuple[Floats, Floats]:
        found = moments(columns.train if self.trains else columns.test)
        return found.mean, np.where(found.scale > 0, found.scale, 1.0)

    def _arm_scaling(self, arm: str) -> tuple[Floats, Floats]:
        """Scale shared columns by a public number; a local encoder's by the site's own rows."""
        mean, scale = np.zeros(len(self.plan.modalities)), np.ones(len(self.plan.modalities))
        for at, modality in enumerate(self.plan.modalities):
            if modality in self.plan.shared:
                scale[at] = self.encoder_lengths.get(modality, 0.0) or 1.0
            else:
                column = self._column(arm, modality)
                own = self._own_scaling(Split(column.train[:, None], column.test[:, None]))
                mean[at], scale[at] = own[0][0], own[1][0]
        return mean, scale

    def design(self, fit: str) -> tuple[Floats, Outcome]:
        """(n, p) inputs of a fit from sums, and the outcome of the rows behind them.

        Whatever they are made of is set once in a run, so that they are made once.
        """
        design = fit.partition("/")[0]
        if design == CALIBRATION_SLOPE:
            if self.slope is None:
                raise NotReleased("malformed_request")
            return self.slope[:, None], self.test
        key = (design, fold_of(fit))
        if key not in self._matrices:
            self._matrices[key] = self._design(design, fit)
        return self._matrices[key]

    def _design(self, design: str, fit: str) -> tuple[Floats, Outcome]:
        if design not in self.plan.sums:
            return self.fusion_inputs(design), self.behind_fusion
        rows = self.behind(fit)
        inputs = self.shared_inputs(design).train[rows]
        return inputs, Outcome(self.rows.train.event[rows], self.rows.train.time[rows])

    def behind(self, fit: str) -> NDArray[np.intp]:
        """Which training rows stand behind the fit of a shared encoder."""
        design, fold = fit.partition("/")[0], fold_of(fit)
        rows = self.present(design)
        if fold is not None:
            self.require_cross_fits(design)
            rows = rows & (self.rows.folds != fold)
        return np.flatnonzero(rows)

    def encode(self, modality: str, whole: Split, folds: dict[int, Floats]) -> None:
        """Keep a consortium encoder's log hazards, out-of-fold where folds were fitted.

        Parameters
        ----------
        whole
            Log hazards by the encoder of all patients.
        folds
            Per fold, (n_train,) log hazards by the encoder that did not see it.
        """
        train = whole.train.copy()
        for fold, scores in folds.items():
            rows = self.rows.folds == fold
            train[rows] = scores[rows]
        self.encoded[modality] = Split(train, whole.test)
