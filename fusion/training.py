"""Training of one site's survival encoders: on all its rows, and out-of-fold.

Hyperparameters come from :mod:`fusion.tuning`, on inner folds of whatever rows are trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fusion.cox_loss import Outcome, TrainingDiverged, cox_loss, outcome, training_mode
from fusion.encoder_inputs import take
from fusion.encoders import FittedEncoder, prepare, raw_log_hazard
from fusion.learner import Learner, training_rows
from fusion.networks import frozen
from fusion.survival import check_outcome, moments
from fusion.tuning import LinearFits, choose

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from fusion.encoder_inputs import Floats, Inputs
    from fusion.encoder_spec import EncoderSpec
    from fusion.encoders import Preparation
    from fusion.networks import Network
    from fusion.tuning import Choice


class TooFewEvents(ValueError):
    """Fewer observed events than the spec's minimum: the site cannot train this encoder."""

    code = "too_few_events"


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

    The result depends on the arguments, and on where the spec's time budget ends the search;
    neither on earlier use of torch nor on its number of threads. Torch's global state is
    afterwards as it was.

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
        If the loss stops being finite, or the linear model has no finite optimum.
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
    with training_mode():
        preparation = prepare(inputs, spec)
        choice, networks = _trained(inputs, survival, preparation, spec, seed)
        raw = moments(raw_log_hazard(networks, preparation, inputs)[:, None])
    return FittedEncoder(
        spec=spec,
        chosen=choice.spec,
        preparation=preparation,
        networks=networks,
        centre=float(raw.mean[0]),
        scale=float(raw.scale[0]),
        n_patients=len(survival),
        n_events=n_events,
        n_steps=choice.n_steps,
        history=choice.history,
    )


def _trained(
    inputs: Inputs, survival: Outcome, preparation: Preparation, spec: EncoderSpec, seed: int
) -> tuple[Choice, tuple[Network, ...]]:
    data = training_rows(inputs, preparation, spec)
    linear = LinearFits(data.rows, survival, l1_ratio=spec.l1_ratio)
    choice = choose(data, survival, linear, spec, seed=seed)
    start = linear.fit(np.arange(len(survival)), choice.spec.default_ridge)
    learner = Learner(data, survival, choice.spec, linear.expanded(start), seed)
    for _ in range(choice.n_steps):
        learner.step()
    return choice, tuple(frozen(network.cpu()) for network in learner.networks)


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

    Preparation, hyperparameters, early stopping and the output's scale come from the training folds
    alone.

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


__all__ = [
    "CrossFitted",
    "Outcome",
    "TooFewEvents",
    "TrainingDiverged",
    "cox_loss",
    "cross_fit",
    "fit_encoder",
    "fold_seed",
    "outcome",
]
