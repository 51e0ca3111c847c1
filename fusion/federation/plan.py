"""What site and coordinator both know of a study before the first round."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusion.privacy import MinimumCounts

PROTOCOL = "protocol"
LOCAL_ENCODERS = "local_encoders"
LOCAL_ONLY = "local_only"


@dataclass(frozen=True)
class FederationPlan:
    """The part of the protocol that the federation runs on, the same at every party.

    Attributes
    ----------
    run
        64 hex digits that name this run.
    protocol
        Fingerprint of the approved protocol.
    modalities
        Names, in the order of the fusion model's inputs.
    sums
        Inputs of each modality whose linear encoder the consortium fits from sums; the other
        modalities have local encoders.
    encoder_ridge
        Penalty per patient of each encoder in ``sums``.
    fusion_ridge
        Penalty per patient of the fusion model.
    n_folds
        Folds of cross-fitting.
    edges_days
        Right ends of the intervals of the time grid; the last is the longest follow-up used.
    horizon_days
        Time of calibration and of the time-dependent AUC.
    n_risk_groups
        Groups of the Kaplan-Meier figure, cut at normal quantiles of the training log hazard.
    """

    run: str
    protocol: str
    modalities: tuple[str, ...]
    sums: dict[str, tuple[str, ...]]
    encoder_ridge: dict[str, float]
    fusion_ridge: float
    n_folds: int
    edges_days: tuple[float, ...]
    horizon_days: float
    n_risk_groups: int = 3
    minimum: MinimumCounts = field(default_factory=MinimumCounts)

    @property
    def arms(self) -> tuple[str, ...]:
        """Fusion models fitted side by side: as the protocol says, and with local encoders only."""
        return (PROTOCOL, LOCAL_ENCODERS) if self.sums else (PROTOCOL,)

    @property
    def n_fusion_inputs(self) -> int:
        """A log hazard and a missingness flag per modality."""
        return 2 * len(self.modalities)

    def n_inputs(self, design: str) -> int:
        """Count the inputs of a design: a modality in ``sums``, or the fusion columns of an arm."""
        return len(self.sums[design]) if design in self.sums else len(self.modalities)

    def n_coefficients(self, fit: str) -> int:
        """Count the coefficients of a fit: of one encoder, folds included, or of an arm."""
        design = fit.partition("/")[0]
        return len(self.sums[design]) if design in self.sums else self.n_fusion_inputs

    @property
    def designs(self) -> tuple[str, ...]:
        """Whatever has inputs to be scaled: modalities in ``sums``, and arms."""
        return (*self.sums, *self.arms)

    @property
    def fits(self) -> tuple[str, ...]:
        """Every fit that a site answers for: encoders, their folds, and arms."""
        folds = [fit for modality in self.sums for fit in self.fold_fits(modality)]
        return (*self.designs, *folds)

    def fold_fits(self, modality: str) -> tuple[str, ...]:
        """Names of the fits of one encoder that leave one fold out each."""
        return tuple(f"{modality}/{fold}" for fold in range(self.n_folds))
