"""The Cox loss that networks are trained with: torchsurv's, on outcomes as it reads them."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from fusion.networks import reproducible_torch
from fusion.survival import check_outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import ArrayLike


class TrainingDiverged(ArithmeticError):
    """The loss or a log hazard stopped being finite, or a linear model has no optimum."""

    code = "training_diverged"


@dataclass(frozen=True, eq=False)
class Outcome:
    """Survival of n patients as the loss reads it.

    Attributes
    ----------
    event
        (n,) bool, True where observed.
    order
        (n,) float32 dense rank of the time; a censored patient comes right after the events of
        the same day, so that they are at risk at those events whatever the order of rows.
    strata
        (n,) stratum numbers, or None for one stratum.
    """

    event: torch.Tensor
    order: torch.Tensor
    strata: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.event)

    @property
    def n_events(self) -> int:
        """Observed events."""
        return int(self.event.sum())

    def at(self, rows: torch.Tensor) -> Outcome:
        """Return the outcome of some patients."""
        strata = None if self.strata is None else self.strata[rows]
        return Outcome(self.event[rows], self.order[rows], strata)


def outcome(event: ArrayLike, time: ArrayLike, *, strata: ArrayLike | None = None) -> Outcome:
    """Outcome of n patients from their event, time in days and stratum labels.

    Raises
    ------
    ValueError
        If shapes differ, or a time is not finite and positive.
    """
    events, times = check_outcome(event, time)
    _, day = np.unique(times, return_inverse=True)
    # Ranks, because float32 would merge times that differ by less than a part in ten million.
    _, order = np.unique(2 * day + ~events, return_inverse=True)
    numbers = None
    if strata is not None:
        if np.shape(strata) != events.shape:
            raise ValueError(f"strata: found shape {np.shape(strata)}, needed {events.shape}")
        numbers = torch.from_numpy(np.unique(np.asarray(strata), return_inverse=True)[1])
    return Outcome(torch.from_numpy(events), torch.from_numpy(order.astype(np.float32)), numbers)


def cox_loss(log_hazard: torch.Tensor, of: Outcome) -> torch.Tensor:
    """Negative Efron partial log-likelihood per patient, of (n,) log hazards.

    Adding a constant to all log hazards, or permuting patients, leaves it as it is.

    Raises
    ------
    TrainingDiverged
        If a log hazard or the loss is not finite.
    """
    if not bool(torch.isfinite(log_hazard).all()):
        raise TrainingDiverged(
            "log hazard: found a value that is not finite, needed all finite; "
            "lower learning_rate or raise ridge"
        )
    loss = _partial_likelihood()(
        log_hazard - log_hazard.detach().max(),
        of.event,
        of.order,
        ties_method="efron",
        reduction="sum",
        strata=of.strata,
    ) / len(of)
    if not bool(torch.isfinite(loss)):
        raise TrainingDiverged(
            "Cox loss: found a value that is not finite, needed a finite one; "
            "lower learning_rate or raise ridge"
        )
    return loss


@cache
def _partial_likelihood() -> Callable[..., torch.Tensor]:
    """Import torchsurv's loss, which takes seconds, when the first fit needs it."""
    with warnings.catch_warnings():
        # It compiles a function with torch's deprecated script compiler as it is imported.
        warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.jit.script`")
        from torchsurv.loss.cox import neg_partial_log_likelihood
    return neg_partial_log_likelihood


@contextmanager
def training_mode() -> Iterator[None]:
    """Reproducible torch with gradients while it lasts, and no warning of ties."""
    with reproducible_torch(), torch.enable_grad(), warnings.catch_warnings():
        # Ties are expected, in days, and Efron's method is what the study asks for.
        warnings.filterwarnings("ignore", message="Ties in `time` detected")
        yield
