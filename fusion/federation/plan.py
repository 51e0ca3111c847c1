"""What site and coordinator both know of a study before the first round."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

from fusion.differential_privacy import Budget
from fusion.privacy import MinimumCounts

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

PROTOCOL: Final = "protocol"
LOCAL_ENCODERS: Final = "local_encoders"
LOCAL_ONLY: Final = "local_only"
PERSONALISED: Final = "personalised"
CALIBRATION_SLOPE: Final = "calibration_slope"
RESERVED_NAMES: Final = (PROTOCOL, LOCAL_ENCODERS, LOCAL_ONLY, PERSONALISED, CALIBRATION_SLOPE)
MAX_SITE_GROUPS: Final = 5
MAX_LEFT_OUT: Final = 10
# A fit that helps to choose a penalty and has not converged by then counts as failed.
MAX_TRY_ROUNDS: Final = 15

FusionKind = Literal["cox", "logistic_hazard", "gated"]


def without(modality: str) -> str:
    """Name of the arm that leaves one modality out; no modality has a point in its name."""
    return f"without.{modality}"


@dataclass(frozen=True)
class AveragingPlan:
    """How a network is trained by averaging weights.

    Attributes
    ----------
    start
        (w,) weights that training begins from.
    rule
        How the coordinator combines the sites' weights.
    rounds, local_steps
        Most rounds, and full-batch steps of a site in each.
    learning_rate
        Of a local step.
    proximal
        Strength of the pull toward the consortium's weights in a local step.
    """

    start: NDArray[np.float64]
    rule: Literal["fedavg", "fedprox", "fedadam"] = "fedavg"
    rounds: int = 40
    local_steps: int = 5
    learning_rate: float = 0.1
    proximal: float = 0.0


@dataclass(frozen=True)
class FederationPlan:
    """The part of the protocol that the federation runs on, the same at every party.

    Attributes
    ----------
    study
        Name of the study.
    run
        64 hex digits that name this run.
    protocol
        Fingerprint of the approved protocol.
    modalities
        Names, in the order of the fusion model's inputs.
    sums
        Inputs of each modality whose linear encoder the consortium fits from sums.
    networks
        Modalities whose network the consortium trains by averaging weights. Those in neither have
        local encoders.
    encoder_ridge
        Penalties per patient tried for each encoder in ``sums``; a single one is taken.
    fusion_ridge
        The same for the fusion model.
    l1_ratio
        Share of an encoder's penalty that is on absolute values; 0 where not named.
    components
        Modalities in ``sums`` whose inputs a federated PCA reduces, to how many components.
    fusion_model
        Kind of the protocol's fusion model.
    gating, gating_hidden
        Of a gated fusion model, and its hidden units.
    n_folds
        Folds of cross-fitting.
    edges_days
        Right ends of the intervals of the time grid; the last is the longest follow-up used.
    horizon_days
        Time of calibration, of the time-dependent AUC and of net benefit.
    n_risk_groups
        Groups of the Kaplan-Meier figure, cut at normal quantiles of the training log hazard.
    subgroups
        Per variable the names of its levels, in the order of the site's codes.
    treatments
        Names of the treatment's levels; none for no comparison.
    thresholds
        Risks by the horizon at which net benefit is computed, increasing.
    leave_one_site_out
        Whether the study is repeated without each training site, and evaluated there.
    secure_sum
        Whether the sums that models are fitted from leave a site behind masks only, so that the
        coordinator sees their total.
    budget
        Of differential privacy, for the sums that models are fitted from; off by default.
    min_sites
        Training sites below which a run ends.
    brief
        Whether this is such a run: only sites left out are evaluated, and tell of no table, because
        tables of almost the same groups would tell of the few patients between them.
    """

    run: str
    protocol: str
    modalities: tuple[str, ...]
    sums: dict[str, tuple[str, ...]]
    encoder_ridge: dict[str, tuple[float, ...]]
    fusion_ridge: tuple[float, ...]
    n_folds: int
    edges_days: tuple[float, ...]
    horizon_days: float
    l1_ratio: dict[str, float] = field(default_factory=dict)
    components: dict[str, int] = field(default_factory=dict)
    networks: dict[str, AveragingPlan] = field(default_factory=dict)
    fusion_model: FusionKind = "cox"
    gating: AveragingPlan | None = None
    gating_hidden: int = 4
    n_risk_groups: int = 3
    subgroups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    treatments: tuple[str, ...] = ()
    thresholds: tuple[float, ...] = ()
    leave_one_site_out: bool = False
    secure_sum: bool = False
    budget: Budget = field(default_factory=Budget)
    min_sites: int = 1
    brief: bool = False
    minimum: MinimumCounts = field(default_factory=MinimumCounts)
    study: str = ""

    @property
    def left_out_runs(self) -> tuple[str, ...]:
        """Names of the runs that leave one group of training sites out each."""
        if not self.leave_one_site_out:
            return ()
        return tuple(
            hashlib.sha256(f"{self.run} without {group}".encode()).hexdigest()
            for group in range(MAX_LEFT_OUT)
        )

    def left_out_plan(self, run: str) -> FederationPlan:
        """Plan of one of these runs: the same study, reported in less detail."""
        return replace(
            self,
            run=run,
            leave_one_site_out=False,
            subgroups={},
            treatments=(),
            thresholds=(),
            brief=True,
        )

    @property
    def private(self) -> bool:
        """Whether models are fitted from noisy sums only: whole encoders, and one fusion model."""
        return self.budget.is_on

    @property
    def shared(self) -> tuple[str, ...]:
        """Modalities whose encoder belongs to the consortium."""
        return tuple(x for x in self.modalities if x in self.sums or x in self.networks)

    @property
    def main_arms(self) -> tuple[str, ...]:
        """Fusion models that are reported in full: the protocol's, and on local encoders only."""
        return (PROTOCOL, LOCAL_ENCODERS) if self.shared and not self.private else (PROTOCOL,)

    @property
    def arms(self) -> tuple[str, ...]:
        """Fusion models fitted side by side; the last ones leave one modality out each."""
        if len(self.modalities) == 1 or self.private:
            return self.main_arms
        return (*self.main_arms, *(without(x) for x in self.modalities))

    @property
    def scored(self) -> tuple[str, ...]:
        """What is compared on test patients: the arms, the site's own model, the personalised."""
        return (*self.arms, LOCAL_ONLY, PERSONALISED)

    @property
    def n_fusion_inputs(self) -> int:
        """A log hazard and a missingness flag per modality."""
        return 2 * len(self.modalities)

    @property
    def n_baseline(self) -> int:
        """Coefficients of a fusion fit that come before those of its inputs."""
        return len(self.edges_days) if self.fusion_model == "logistic_hazard" else 0

    @property
    def n_levels(self) -> int:
        """Levels of all subgroup variables together."""
        return sum(map(len, self.subgroups.values()))

    def n_inputs(self, design: str) -> int:
        """Count the inputs of a design: a modality in ``sums``, or the fusion columns of an arm."""
        return len(self.sums[design]) if design in self.sums else len(self.modalities)

    def n_coefficients(self, fit: str) -> int:
        """Count the coefficients of a fit: of one encoder, of an arm, or of the slope."""
        design = fit.partition("/")[0]
        if design == CALIBRATION_SLOPE:
            return 1
        if design in self.sums:
            return self.components.get(design, len(self.sums[design]))
        return self.n_baseline + self.n_fusion_inputs

    def n_weights(self, fit: str) -> int:
        """Count the weights of a network, folds included."""
        plan = self.averaging(fit)
        return 0 if plan is None else len(plan.start)

    def averaging(self, fit: str) -> AveragingPlan | None:
        """How a network is trained, folds included; None for gates that the model has not."""
        design = fit.partition("/")[0]
        return self.gating if design == PROTOCOL else self.networks[design]

    @property
    def designs(self) -> tuple[str, ...]:
        """Whatever has inputs to be scaled: modalities in ``sums``, and arms."""
        return (*self.sums, *self.arms)

    @property
    def fits(self) -> tuple[str, ...]:
        """Every fit from sums that a site answers for."""
        if self.private:
            return (CALIBRATION_SLOPE,)
        folds = [fit for modality in self.sums for fit in self.fold_fits(modality)]
        tries = [fit for design in (*self.sums, PROTOCOL) for fit in self.try_fits(design)]
        slope = () if self.brief else (CALIBRATION_SLOPE,)
        return (*self.designs, *folds, *tries, *slope)

    @property
    def private_fits(self) -> tuple[str, ...]:
        """Fits that noisy sums may make: encoders of all patients, and the protocol's arm."""
        return (*self.sums, PROTOCOL)

    @property
    def network_fits(self) -> tuple[str, ...]:
        """Every network trained by averaging that a site answers for."""
        folds = [fit for modality in self.networks for fit in self.fold_fits(modality)]
        gated = (PROTOCOL,) if self.fusion_model == "gated" else ()
        return (*self.networks, *folds, *gated)

    def fold_fits(self, modality: str) -> tuple[str, ...]:
        """Names of the fits of one encoder that leave one fold of patients out each."""
        return tuple(f"{modality}/{fold}" for fold in range(self.n_folds))

    def ridges(self, design: str) -> tuple[float, ...]:
        """Penalties per patient that are tried for a design."""
        return self.encoder_ridge[design] if design in self.sums else self.fusion_ridge

    def try_fits(self, design: str) -> tuple[str, ...]:
        """Names of the fits that choose a penalty: each strength without each group of sites."""
        if len(self.ridges(design)) == 1:
            return ()
        return tuple(
            self.try_fit(design, strength, group)
            for strength in range(len(self.ridges(design)))
            for group in range(MAX_SITE_GROUPS)
        )

    def try_fit(self, design: str, strength: int, group: int) -> str:
        """Name of the fit of one strength without one group of sites."""
        return f"{design}/try-{strength}-{group}"


def fold_of(fit: str) -> int | None:
    """Fold of patients that a fit leaves out, or None."""
    part = fit.partition("/")[2]
    return int(part) if part.isdigit() else None


def site_groups(sizes: Sequence[int]) -> list[int]:
    """Deal sites into at most five groups of about equal size, the largest sites first.

    Parameters
    ----------
    sizes
        (n_sites,) patients of each site.

    Returns
    -------
    list of int
        (n_sites,) group of each site, from 0.
    """
    filled = [0] * min(MAX_SITE_GROUPS, len(sizes))
    groups = [0] * len(sizes)
    for site in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        groups[site] = filled.index(min(filled))
        filled[groups[site]] += max(sizes[site], 1)
    return groups
