r"""Training of networks by averaging weights: the site's steps, and the coordinator's.

Nothing here knows the network: weights are one flat float64 vector, and a site brings a function to
its loss and gradient. The loss is a mean per event, so that a site's update counts by its events.
With one local step per round, averaging is then a step along the gradient of all rows, stratified
by site; with more, sites that differ pull the average away from the optimum of their sum.

A fit from sums (:mod:`fusion.newton`) needs several times fewer rounds where the model is linear.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np

from fusion.newton import ConvergenceError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Rule = Literal["fedavg", "fedprox", "fedadam"]

_VECTORS: Final = ("candidate", "best", "momentum", "spread")


@dataclass(frozen=True)
class LocalSteps:
    """How a site moves the weights between two rounds.

    Attributes
    ----------
    steps
        Full-batch gradient steps.
    learning_rate
        Length of a step, times the gradient.
    proximal
        Pull toward the incoming weights: FedProx's mu [1]_; 0 for FedAvg.

    References
    ----------
    .. [1] Li T, Sahu AK, Zaheer M, et al. Federated optimization in heterogeneous networks.
       Proceedings of Machine Learning and Systems 2020;2:429-450.
    """

    steps: int
    learning_rate: float
    proximal: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.learning_rate < np.inf or not 0 <= self.proximal < np.inf:
            raise ValueError(
                f"local steps: found steps {self.steps}, learning_rate {self.learning_rate} and "
                f"proximal {self.proximal}, needed at least 1, above 0 and at least 0"
            )


@dataclass(frozen=True, eq=False)
class WeightsUpdate:
    """What a site sends after its steps.

    Attributes
    ----------
    weights
        (p,) after the steps.
    loss
        Mean per event at the incoming weights, penalties included; lower is better.
    n_patients, n_events
        How many stand behind it; it counts by its events.
    """

    weights: Floats
    loss: float
    n_patients: int = 0
    n_events: int = 0


def local_update(
    loss_gradient: Callable[[Floats], tuple[float, Floats]],
    weights: Floats,
    steps: LocalSteps,
    *,
    n_patients: int = 0,
    n_events: int = 0,
) -> WeightsUpdate:
    r"""Take a site's gradient steps from the consortium's weights.

    Each is :math:`w \leftarrow w - \gamma\,\{\nabla L(w) + \mu (w - w_0)\}`, with :math:`w_0` the
    incoming weights, :math:`\gamma` the learning rate and :math:`\mu` the proximal pull.

    Parameters
    ----------
    loss_gradient
        From (p,) weights to the site's mean loss per event and its (p,) gradient.
    weights
        (p,) incoming.
    n_patients, n_events
        Behind the loss.

    Raises
    ------
    fusion.newton.ConvergenceError
        If a loss or a gradient is not finite.
    """
    start = np.asarray(weights, dtype=np.float64)
    now, losses = start, []
    for _ in range(steps.steps):
        loss, gradient = loss_gradient(now)
        losses.append(float(loss))
        if not (np.isfinite(loss) and np.isfinite(gradient).all()):
            raise ConvergenceError(
                "local steps: found a loss or gradient that is not finite; lower the learning rate"
            )
        now = now - steps.learning_rate * (gradient + steps.proximal * (now - start))
    return WeightsUpdate(now, losses[0], n_patients, n_events)


@dataclass
class AveragedFit:
    """One network's training, advanced by the updates that sites send from :attr:`candidate`.

    Attributes
    ----------
    candidate
        (p,) what sites start from next; once :attr:`converged` the best one seen.
    rule
        ``fedavg`` and ``fedprox`` take the average of the sites' weights; ``fedadam`` takes a step
        of Adam along its difference from the candidate [1]_. FedProx differs at the sites only.
    max_rounds
        Rounds after which the fit ends.
    patience, tol
        It ends earlier when for ``patience`` rounds the objective has not fallen by ``tol``.
    server_learning_rate, beta1, beta2, tau
        Of ``fedadam``: longest move of a weight in a round, the memories of the mean and of the
        squared difference, and the difference below which a move shortens.
    rounds
        How many rounds of updates were used.
    objective
        Mean loss per event over the sites at the candidate they were asked about last; lower is
        better, NaN before the first round.
    best, best_objective
        (p,) candidate of the lowest objective so far, and that objective; every candidate is
        judged by the round that starts from it, so that the last average is not a candidate.
    converged
        Whether the fit has ended.

    References
    ----------
    .. [1] Reddi S, Charles Z, Zaheer M, et al. Adaptive federated optimization. International
       Conference on Learning Representations 2021.
    """

    candidate: Floats
    rule: Rule = "fedavg"
    max_rounds: int = 40
    patience: int = 5
    tol: float = 1e-6
    server_learning_rate: float = 0.03
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    rounds: int = 0
    objective: float = np.nan
    best: Floats = field(default_factory=lambda: np.zeros(0))
    best_objective: float = np.inf
    last_fall: float = np.inf
    rounds_since: int = 0
    momentum: Floats = field(default_factory=lambda: np.zeros(0))
    spread: Floats = field(default_factory=lambda: np.zeros(0))
    converged: bool = False

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule: found {self.rule}, needed one of {', '.join(get_args(Rule))}")
        if self.max_rounds < 1 or self.patience < 1:
            raise ValueError(
                f"averaging: found max_rounds {self.max_rounds} and patience {self.patience}, "
                "needed at least 1 each"
            )
        for name in _VECTORS:
            setattr(self, name, np.array(getattr(self, name), dtype=np.float64))
        if self.momentum.size == 0:
            self.momentum = np.zeros(len(self.candidate))
            self.spread = np.full(len(self.candidate), self.tau**2)

    def restart(self) -> None:
        """Keep the weights, forget the objective: other patients now stand behind it."""
        self.best, self.best_objective, self.objective = np.zeros(0), np.inf, np.nan
        self.last_fall, self.rounds_since, self.converged = np.inf, 0, False

    def advance(self, updates: Sequence[WeightsUpdate]) -> None:
        """Take the updates that sites made from :attr:`candidate`, and move on or end.

        Raises
        ------
        fusion.newton.ConvergenceError
            If no update has an event, or one is not finite; the fit stays as it was.
        ValueError
            If an update is not of this network.
        """
        self._check(updates)
        shares = np.array([u.n_events for u in updates]) / sum(u.n_events for u in updates)
        self.rounds += 1
        self._judge(float(np.sort(shares * [u.loss for u in updates]).sum()))
        if self.rounds >= self.max_rounds or self.rounds_since >= self.patience:
            self.candidate, self.converged = self.best, True
        else:
            self.candidate = self._moved(_average(np.stack([u.weights for u in updates]), shares))

    def _check(self, updates: Sequence[WeightsUpdate]) -> None:
        if any(u.n_events < 0 for u in updates) or sum(u.n_events for u in updates) == 0:
            raise ConvergenceError("averaging: found no update with events, needed at least one")
        for update in updates:
            if update.weights.shape != self.candidate.shape:
                raise ValueError(
                    f"averaging: found weights of shape {update.weights.shape}, needed "
                    f"{self.candidate.shape}"
                )
            if not (np.isfinite(update.weights).all() and np.isfinite(update.loss)):
                raise ConvergenceError(
                    "averaging: found weights or a loss that are not finite; lower the learning "
                    "rate of the sites"
                )

    def _judge(self, objective: float) -> None:
        self.objective = objective
        if objective < self.best_objective:
            self.best, self.best_objective = self.candidate, objective
        self.rounds_since += 1
        # Against the last fall, so that many rounds of little add up.
        if self.best_objective < self.last_fall - self.tol:
            self.last_fall, self.rounds_since = self.best_objective, 0

    def _moved(self, average: Floats) -> Floats:
        if self.rule != "fedadam":
            return average
        along = average - self.candidate
        self.momentum = self.beta1 * self.momentum + (1 - self.beta1) * along
        self.spread = self.beta2 * self.spread + (1 - self.beta2) * along**2
        step = self.momentum / (np.sqrt(self.spread) + self.tau)
        return np.asarray(self.candidate + self.server_learning_rate * step)

    def state(self) -> dict[str, Any]:
        """Plain values for JSON at full precision; what is not finite yet is left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}
        return {k: v for k, v in plain.items() if not (isinstance(v, float) and not np.isfinite(v))}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> AveragedFit:
        """Go on from where :meth:`state` was taken, bit by bit.

        Raises
        ------
        ValueError
            If the state is not one of :meth:`state`.
        """
        unknown = set(state) - {f.name for f in fields(cls)}
        if unknown or "candidate" not in state:
            raise ValueError(
                f"averaging: found a state of {', '.join(sorted(state))}, needed one of a fit"
            )
        return cls(**state)


def _average(weights: Floats, shares: Floats) -> Floats:
    """(p,) average of (n, p) weights by (n,) shares; the same bits in whatever order they come."""
    # Added to the least, equal weights stay what they are to the last bit.
    least = weights.min(axis=0)
    return np.asarray(least + np.sort(shares[:, None] * (weights - least), axis=0).sum(axis=0))
