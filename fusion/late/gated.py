r"""A small network that weighs each modality by what else is known of the patient.

With :math:`x = (z, f)` the fusion inputs of a patient, :math:`z` standardised log hazards and
:math:`f` absence flags,

.. math::

    \eta = \sum_m g_m(x)\,\beta_m z_m + \sum_m \delta_m f_m, \qquad
    g(x) = 2\,\sigma\bigl(W_2 \tanh(W_1 x + b_1) + b_2\bigr).

A gate lies between 0 (the modality is not listened to) and 2, and is 1 where :math:`W_2` and
:math:`b_2` are zero: there the network is the linear Cox model with coefficients
:math:`(\beta, \delta)`, which it starts from.

All weights travel as one flat vector in float64: :math:`\beta` (m), :math:`\delta` (m),
:math:`W_1` (h, 2 m) row by row, :math:`b_1` (h), :math:`W_2` (m, h) row by row, :math:`b_2` (m).
The network is so small that its derivatives are written out: they cost no torch, and are exact to
float64, so that a site's gradient is its part of the pooled one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from scipy.special import expit

from fusion.survival import cox_sums

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

# Strong enough that a hundred patients move no gate far; see GatedFusion for choosing it.
GATE_DECAY: Final = 0.03


class GatedWeights(NamedTuple):
    """The parts of a flat weight vector; see the module.

    Attributes
    ----------
    beta, delta
        (m,) log hazard ratio per standard deviation of each modality, and of its absence.
    w1, b1
        (h, 2 m) and (h,) from the inputs to the hidden units.
    w2, b2
        (m, h) and (m,) from the hidden units to the gates.
    """

    beta: Floats
    delta: Floats
    w1: Floats
    b1: Floats
    w2: Floats
    b2: Floats


class _Forward(NamedTuple):
    """One pass over n patients: hidden units (n, h), gates (n, m), log hazard (n,)."""

    hidden: Floats
    gates: Floats
    log_hazard: Floats


def n_gated_weights(n_modalities: int, hidden: int) -> int:
    """Length of the flat weight vector for m modalities and h hidden units."""
    return 3 * n_modalities + hidden * (3 * n_modalities + 1)


def initial_gated_weights(coefficients: ArrayLike, *, hidden: int, seed: int = 0) -> Floats:
    """Flat weights at which the network is the linear Cox model with these coefficients.

    Parameters
    ----------
    coefficients
        (2 m,) of the linear fusion model.
    hidden
        Hidden units h, at least 1.
    seed
        Of the first layer, which is random so that hidden units differ; gates are 1 all the same.
    """
    linear = np.asarray(coefficients, dtype=np.float64)
    m = _n_modalities(len(linear))
    first = np.random.default_rng(seed).normal(size=hidden * 2 * m) / np.sqrt(2 * m)
    rest = np.zeros(n_gated_weights(m, hidden) - len(linear) - len(first))
    return np.concatenate([linear, first, rest])


def unpack(weights: ArrayLike, n_modalities: int, hidden: int) -> GatedWeights:
    """Give the parts of a flat weight vector, as views.

    Raises
    ------
    ValueError
        If its length is not :func:`n_gated_weights`.
    """
    flat = np.asarray(weights, dtype=np.float64)
    m, needed = n_modalities, n_gated_weights(n_modalities, hidden)
    if flat.shape != (needed,):
        raise ValueError(
            f"weights: found shape {flat.shape}, needed ({needed},) for {m} modalities and "
            f"{hidden} hidden units"
        )
    sizes = [m, m, hidden * 2 * m, hidden, m * hidden]
    beta, delta, w1, b1, w2, b2 = np.split(flat, np.cumsum(sizes))
    return GatedWeights(beta, delta, w1.reshape(hidden, 2 * m), b1, w2.reshape(m, hidden), b2)


def gates(weights: ArrayLike, inputs: ArrayLike, hidden: int) -> Floats:
    """(n, m) weight of each modality for each patient, between 0 and 2; 1 is the linear model's."""
    x = np.asarray(inputs, dtype=np.float64)
    return _forward(unpack(weights, _n_modalities(x.shape[1]), hidden), x).gates


def gated_log_hazard(weights: ArrayLike, inputs: ArrayLike, hidden: int) -> Floats:
    """(n,) log hazard of (n, 2 m) fusion inputs; higher is worse.

    Where weights or inputs overflow it is not finite; no error is raised.
    """
    x = np.asarray(inputs, dtype=np.float64)
    return _forward(unpack(weights, _n_modalities(x.shape[1]), hidden), x).log_hazard


def gated_loss_gradient(
    weights: ArrayLike,
    inputs: ArrayLike,
    event: ArrayLike,
    time: ArrayLike,
    *,
    hidden: int,
    ridge: float = 0.0,
    decay: float = GATE_DECAY,
) -> tuple[float, Floats]:
    r"""Penalised negative Efron partial log-likelihood per event, and its gradient.

    Parameters
    ----------
    weights
        Flat, as in the module.
    inputs, event, time
        (n, 2 m) fusion inputs and the (n,) outcome of one stratum, with at least one event.
    ridge
        Penalty per patient on :math:`\beta` and :math:`\delta`, as that of the linear model.
    decay
        Penalty per patient on the weights of the gates.

    Returns
    -------
    loss
        :math:`\{-\ell + \frac n2 (\text{ridge}\,\lVert\beta,\delta\rVert^2 +
        \text{decay}\,\lVert W, b\rVert^2)\} / d` with :math:`d` events; lower is better. Weighted
        by events, sites' losses average to that of the pooled rows, stratified by site. Not finite
        where the log hazard is not.
    gradient
        Flat, of the loss.

    Raises
    ------
    ValueError
        If there is no event, or shapes disagree.

    Notes
    -----
    :math:`\partial\ell/\partial w = J^\top \partial\ell/\partial\eta` with :math:`J` the Jacobian
    of the log hazards. That is the gradient of a Cox model whose inputs are :math:`(\eta, J)` at
    coefficients :math:`(1, 0)`.
    """
    x, flat = np.asarray(inputs, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    parts = unpack(flat, _n_modalities(x.shape[1]), hidden)
    seen = _forward(parts, x)
    jacobian = _jacobian(parts, x, seen)
    if not (np.isfinite(seen.log_hazard).all() and np.isfinite(jacobian).all()):
        return float("nan"), np.full(len(flat), np.nan)
    along = np.column_stack([seen.log_hazard, jacobian])
    sums = cox_sums(along, event, time, np.eye(1, along.shape[1])[0])
    if sums.n_events == 0:
        raise ValueError("gated fusion: found no events, needed at least one")
    penalty = np.full(len(flat), decay)
    penalty[: x.shape[1]] = ridge
    n, d = sums.n_patients, sums.n_events
    loss = (0.5 * n * float(penalty @ flat**2) - sums.log_likelihood) / d
    return loss, np.asarray((n * penalty * flat - sums.gradient[1:]) / d)


def _n_modalities(n_inputs: int) -> int:
    if n_inputs % 2 or n_inputs == 0:
        raise ValueError(
            f"fusion inputs: found {n_inputs}, needed a log hazard and an absence flag per modality"
        )
    return n_inputs // 2


def _forward(parts: GatedWeights, x: Floats) -> _Forward:
    m = len(parts.beta)
    # Weights come from outside: an overflow is judged by its result.
    with np.errstate(over="ignore", invalid="ignore"):
        hidden = np.tanh(x @ parts.w1.T + parts.b1)
        gate = 2.0 * expit(hidden @ parts.w2.T + parts.b2)
        log_hazard = (gate * x[:, :m]) @ parts.beta + x[:, m:] @ parts.delta
    return _Forward(hidden, gate, np.asarray(log_hazard))


def _jacobian(parts: GatedWeights, x: Floats, seen: _Forward) -> Floats:
    """(n, n_weights) derivative of each patient's log hazard by the flat weights."""
    n, m = len(x), len(parts.beta)
    with np.errstate(over="ignore", invalid="ignore"):
        # g = 2 sigma, so that its slope is g (1 - g / 2).
        by_gate = parts.beta * x[:, :m] * seen.gates * (1.0 - seen.gates / 2.0)  # (n, m)
        by_hidden = (by_gate @ parts.w2) * (1.0 - seen.hidden**2)  # (n, h)
        by_w1 = by_hidden[:, :, None] * x[:, None, :]
        by_w2 = by_gate[:, :, None] * seen.hidden[:, None, :]
        by_beta = seen.gates * x[:, :m]
    flat = [by_beta, x[:, m:], by_w1.reshape(n, -1), by_hidden, by_w2.reshape(n, -1), by_gate]
    return np.hstack(flat)
