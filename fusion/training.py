"""Training of one site's survival encoders with torchsurv's Cox loss.

Every model starts as the ridge Cox model on its (averaged) inputs. Networks then move away from it
for as many steps as inner folds of the training rows support, which may be none: with a hundred
patients that start is hard to beat, and a network that cannot beat it should equal it.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from fusion.encoder_inputs import evenly, take
from fusion.encoders import FittedEncoder, patient_inputs, prepare, raw_log_hazard
from fusion.networks import (
    GatedAttention,
    LinearCox,
    build_network,
    frozen,
    pad_bags,
    reproducible_torch,
)
from fusion.survival import check_outcome, moments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import ArrayLike, NDArray

    from fusion.encoder_inputs import Floats, Inputs
    from fusion.encoder_spec import EncoderSpec
    from fusion.encoders import Preparation
    from fusion.networks import Network

# Looking at the inner folds costs as much as a step, and neighbouring steps hardly differ.
_LOOK_EVERY = 5
_CUDA_FROM_CELLS = 1 << 25


class TooFewEvents(ValueError):
    """Fewer observed events than the spec's minimum: the site cannot train this encoder."""

    code = "too_few_events"


class TrainingDiverged(ArithmeticError):
    """The loss or a log hazard stopped being finite."""

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


def fit_encoder(
    inputs: Inputs,
    event: ArrayLike,
    time: ArrayLike,
    spec: EncoderSpec,
    *,
    strata: ArrayLike | None = None,
    seed: int,
) -> FittedEncoder:
    """Train one encoder on the rows of one site.

    The result depends on the arguments only: neither on earlier use of torch nor on its number of
    threads; and torch's global state is afterwards as it was.

    Parameters
    ----------
    inputs
        (n, p) table with NaN for missing cells, or n bags of (n_tiles, dim).
    event, time
        (n,) True where observed; days from the landmark.
    spec
        Of the protocol; its ``sharing`` and ``max_inputs`` play no part here.
    strata
        (n,) labels; risk sets never span two of them.
    seed
        Of weights, dropout and inner folds; not negative.

    Raises
    ------
    TooFewEvents
        If fewer events than ``spec.min_events`` were observed.
    TrainingDiverged
        If the loss stops being finite.
    DataError
        If the inputs are empty, infinite or of the wrong kind.
    ValueError
        If event, time, strata and inputs disagree in length.
    """
    survival = outcome(event, time, strata=strata)
    n_events = int(survival.event.sum())
    if len(inputs) != len(survival):
        raise ValueError(f"inputs: found {len(inputs)} patients, needed {len(survival)}")
    if n_events < spec.min_events:
        raise TooFewEvents(f"events: found {n_events}, needed at least {spec.min_events} to train")
    with _training():
        preparation = prepare(inputs, spec)
        data = _training_data(inputs, preparation, spec)
        n_steps = _choose_steps(data, survival, spec, seed)
        learner = _Learner(data, survival, spec, seed)
        for _ in range(n_steps):
            learner.step()
        network = frozen(learner.network.cpu())
        raw = moments(raw_log_hazard(network, preparation, inputs)[:, None])
    scale = float(raw.scale[0])
    return FittedEncoder(
        spec, preparation, network, float(raw.mean[0]), scale, len(survival), n_events, n_steps
    )


@contextmanager
def _training() -> Iterator[None]:
    with reproducible_torch(), torch.enable_grad(), warnings.catch_warnings():
        # Ties are expected, in days, and Efron's method is what the study asks for.
        warnings.filterwarnings("ignore", message="Ties in `time` detected")
        yield


@dataclass(frozen=True, eq=False)
class _Data:
    """Prepared inputs of n patients: one row each for the linear start, and the network's batch."""

    rows: torch.Tensor  # (n, k) float64
    batch: tuple[torch.Tensor, ...]  # (rows,) or (tiles, mask)

    def at(self, rows: torch.Tensor) -> _Data:
        chosen = rows.to(self.batch[0].device)
        return _Data(self.rows[rows], tuple(part[chosen] for part in self.batch))


def _training_data(inputs: Inputs, preparation: Preparation, spec: EncoderSpec) -> _Data:
    if spec.model != "gated_attention":
        rows = patient_inputs(preparation, inputs)
        return _Data(rows, (rows.float() if spec.model == "mlp" else rows,))
    tiles = [preparation(np.asarray(bag)) for bag in inputs]
    padded, mask = pad_bags([evenly(bag.float(), spec.max_tiles) for bag in tiles])
    large = padded.numel() >= _CUDA_FROM_CELLS and torch.cuda.is_available()
    device = torch.device("cuda" if large else "cpu")
    return _Data(
        torch.stack([bag.mean(dim=0) for bag in tiles]), (padded.to(device), mask.to(device))
    )


def _predict(
    network: Network, batch: tuple[torch.Tensor, ...], dropout: torch.Generator | None
) -> torch.Tensor:
    """(n,) log hazard on the CPU, where the loss adds up in one order every time."""
    if isinstance(network, LinearCox):
        return network(*batch)
    predicted = network(*batch, dropout=dropout)
    return (predicted[0] if isinstance(network, GatedAttention) else predicted).cpu()


def _generator(seed: int, *path: int, device: torch.device | None = None) -> torch.Generator:
    state = np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)[0]
    return torch.Generator(device or "cpu").manual_seed(int(state >> np.uint64(1)))


class _Learner:
    """One network on its way: the linear start, then one AdamW step over all its rows at a time."""

    def __init__(self, data: _Data, survival: Outcome, spec: EncoderSpec, seed: int) -> None:
        self.data, self.survival, self.spec = data, survival, spec
        self.network = build_network(data.rows.shape[1], spec, _generator(seed, 0))
        start = _ridge_start(data.rows, survival, spec.ridge)
        with torch.no_grad():
            self.network.head.copy_(start)
        device = data.batch[0].device
        self.network.to(device)
        self.dropout = _generator(seed, 1, device=device)
        rest = [p for p in self.network.parameters() if p is not self.network.head]
        self.optimiser = torch.optim.AdamW(
            [
                # The ridge of the loss is all the shrinkage that the linear weights get.
                {"params": [self.network.head], "weight_decay": 0.0},
                {"params": rest, "weight_decay": spec.weight_decay},
            ],
            lr=spec.learning_rate,
            fused=True,
        )

    def step(self) -> None:
        self.optimiser.zero_grad()
        predicted = _predict(self.network, self.data.batch, self.dropout)
        penalty = 0.5 * self.spec.ridge * self.network.head.square().sum().cpu()
        (cox_loss(predicted, self.survival) + penalty).backward()
        self.optimiser.step()

    @torch.no_grad()
    def loss_beyond(self, data: _Data, survival: Outcome) -> float:
        """Loss that a superset of its rows adds to its own: the cross-validated partial likelihood.

        Held-out patients are so compared with everyone at risk, not with each other only, of whom
        there are too few.
        """
        whole = cox_loss(_predict(self.network, data.batch, None), survival)
        own = cox_loss(_predict(self.network, self.data.batch, None), self.survival)
        return float(whole) * len(survival) - float(own) * len(self.survival)


def _ridge_start(rows: torch.Tensor, survival: Outcome, ridge: float) -> torch.Tensor:
    """(k,) coefficients of the ridge Cox model on (n, k) rows."""
    start = torch.zeros(rows.shape[1], dtype=torch.float64)
    with torch.no_grad():
        null_loss = float(cox_loss(rows @ start, survival))
    # The loss is rounded to float32, in which a line search gets lost near the optimum; it is
    # for the rare fit that runs away without one.
    for line_search in (None, "strong_wolfe"):
        with suppress(TrainingDiverged):
            weights, loss = _lbfgs(rows, survival, ridge, line_search)
            if loss <= null_loss:
                return weights
    raise TrainingDiverged(
        "linear Cox model: found no finite optimum, needed one; raise ridge or check the inputs"
    )


def _lbfgs(
    rows: torch.Tensor, survival: Outcome, ridge: float, line_search: str | None
) -> tuple[torch.Tensor, float]:
    weights = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weights], max_iter=60, tolerance_grad=1e-6, line_search_fn=line_search
    )

    def _closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = cox_loss(rows @ weights, survival) + 0.5 * ridge * weights.square().sum()
        loss.backward()
        return loss

    optimiser.step(_closure)
    return weights.detach(), float(_closure().detach())


def _choose_steps(data: _Data, survival: Outcome, spec: EncoderSpec, seed: int) -> int:
    """Return the number of AdamW steps, perhaps 0, with the least loss held out of inner folds."""
    if spec.model in ("linear", "mean_pooling") or spec.max_steps == 0:
        return 0
    learners = []
    folds = _inner_folds(survival, spec.inner_folds, seed)
    for fold in range(spec.inner_folds):
        rows = torch.from_numpy(np.flatnonzero(folds != fold))
        learners.append(_Learner(data.at(rows), survival.at(rows), spec, seed))
    best_step, best_loss = 0, sum(one.loss_beyond(data, survival) for one in learners)
    for step in range(1, spec.max_steps + 1):
        for one in learners:
            one.step()
        if step % _LOOK_EVERY:
            continue
        loss = sum(one.loss_beyond(data, survival) for one in learners)
        if loss < best_loss:
            best_step, best_loss = step, loss
        elif step - best_step >= spec.patience:
            break
    return best_step


def _inner_folds(survival: Outcome, n_folds: int, seed: int) -> NDArray[np.int64]:
    """(n,) fold of each patient: events, and strata within them, are dealt evenly."""
    n = len(survival)
    shuffle = np.random.default_rng([seed, 2]).random(n)
    strata = np.zeros(n) if survival.strata is None else survival.strata.numpy()
    dealt = np.lexsort((shuffle, strata, ~survival.event.numpy()))
    folds = np.empty(n, dtype=np.int64)
    folds[dealt] = np.arange(n) % n_folds
    return folds


@dataclass(frozen=True, eq=False)
class CrossFitted:
    """Out-of-fold log hazards and the encoders they came from.

    Attributes
    ----------
    out_of_fold
        (n,) standardised log hazard of each patient by an encoder that did not see them.
    encoders
        One per fold, in the order of the sorted fold numbers.
    """

    out_of_fold: Floats
    encoders: tuple[FittedEncoder, ...]


def cross_fit(
    inputs: Inputs,
    event: ArrayLike,
    time: ArrayLike,
    folds: ArrayLike,
    spec: EncoderSpec,
    *,
    strata: ArrayLike | None = None,
    seed: int,
) -> CrossFitted:
    """Score every patient by an encoder trained on the other folds.

    Preparation, early stopping and the output's scale come from the training folds alone.

    Parameters
    ----------
    inputs, event, time, spec, strata, seed
        As in :func:`fit_encoder`.
    folds
        (n,) fold number of each patient, of at least two folds.

    Raises
    ------
    ValueError
        If there is only one fold or lengths disagree, and as :func:`fit_encoder`.
    """
    events, times = check_outcome(event, time)
    of_fold = np.asarray(folds)
    if of_fold.shape != events.shape or len(inputs) != len(events):
        raise ValueError(
            f"folds and inputs: found {of_fold.shape} and {len(inputs)}, needed ({len(events)},)"
        )
    numbers = np.unique(of_fold)
    if len(numbers) < 2:
        raise ValueError(f"folds: found {len(numbers)}, needed at least 2")
    out_of_fold = np.empty(len(events))
    encoders = []
    for position, number in enumerate(numbers):
        train, held_out = np.flatnonzero(of_fold != number), np.flatnonzero(of_fold == number)
        encoder = fit_encoder(
            take(inputs, train),
            events[train],
            times[train],
            spec,
            strata=None if strata is None else np.asarray(strata)[train],
            seed=fold_seed(seed, position),
        )
        out_of_fold[held_out] = encoder.log_hazard(take(inputs, held_out))
        encoders.append(encoder)
    return CrossFitted(out_of_fold, tuple(encoders))


def fold_seed(seed: int, fold: int) -> int:
    """Seed of one fold's fit, so that folds neither share a seed nor depend on each other."""
    return int(np.random.SeedSequence([seed, 3, fold]).generate_state(1, np.uint32)[0])
