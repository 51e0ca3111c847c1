"""Replies as plain vectors of sums, so that those of all sites can be added before anyone looks.

What a site sends is not always a sum itself: moments become counts, sums and sums of squares, and
averaged weights are counted by their events. Adding such vectors and reading the total back gives
what the coordinator would have made of the sites' own replies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fusion import messages as m

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from fusion.federation.plan import FederationPlan

    Floats = NDArray[np.float64]
    Shapes = Mapping[str, tuple[int, ...]]

# The name that the total of a secure sum goes by where replies are kept by site.
CONSORTIUM: Final = "consortium"


def flatten(reply: m.Message) -> Floats:
    """(n,) sums of a reply, in the order that :func:`unflatten` reads them.

    Raises
    ------
    TypeError
        If the reply is of a kind that is not added up.
    """
    if type(reply) not in _PARTS:
        raise TypeError(f"{type(reply).__name__}: found a reply that is not added up")
    parts, _ = _PARTS[type(reply)]
    return np.concatenate([np.asarray(x, dtype=np.float64).ravel() for x in parts(reply)])


def unflatten(kind: type, request: m.Message, plan: FederationPlan, total: Floats) -> m.Message:
    """Read the total of several replies back as one reply of that kind.

    Raises
    ------
    ValueError
        If the total has another length than such replies to this request have.
    """
    shapes = _SHAPES[kind](request, plan)
    sizes = [int(np.prod(shape)) for shape in shapes]
    if len(total) != sum(sizes):
        raise ValueError(f"{kind.__name__}: found {len(total)} sums, needed {sum(sizes)}")
    cuts = np.split(total, np.cumsum(sizes)[:-1])
    _, read = _PARTS[kind]
    return read(*(cut.reshape(shape) for cut, shape in zip(cuts, shapes, strict=True)))


def is_added(request: m.Message) -> bool:
    """Whether the replies to such a request are added up."""
    return type(request) in _ASKED


def n_added(request: m.Message, plan: FederationPlan) -> int:
    """Count the sums in a reply to such a request."""
    return sum(int(np.prod(shape)) for shape in _SHAPES[_ASKED[type(request)]](request, plan))


def _counts(values: Floats) -> NDArray[np.int64]:
    return np.rint(values).astype(np.int64)


def _raw(n: Floats, mean: Floats, m2: Floats) -> tuple[Floats, Floats, Floats]:
    return n, n * mean, m2 + n * mean**2


def _central(n: Floats, first: Floats, second: Floats) -> tuple[Floats, Floats, Floats]:
    n = np.rint(n)
    mean = first / np.maximum(n, 1.0)
    return n, mean, np.maximum(second - n * mean**2, 0.0)


def _moments_of(n: Floats, first: Floats, second: Floats) -> m.DesignMoments:
    return m.DesignMoments(*_central(n, first, second))


def _sums_of(ll: Floats, g: Floats, h: Floats, n: Floats, events: Floats) -> m.Sums:
    return m.Sums(ll, g, h, _counts(n), _counts(events))


def _weighted(reply: m.Updates) -> tuple[Any, ...]:
    events = reply.n_events.astype(np.float64)
    return (
        reply.weights * events[:, None], reply.loss * events, reply.n_patients, events,
    )  # fmt: skip


def _updates_of(weights: Floats, loss: Floats, n: Floats, events: Floats) -> m.Updates:
    behind = np.maximum(np.rint(events), 1.0)
    return m.Updates(weights / behind[:, None], loss / behind, _counts(n), _counts(events))


def _intervals_of(events: Floats, exposure: Floats, *raw: Floats) -> m.Intervals:
    return m.Intervals(np.rint(events), exposure, np.column_stack(_central(*raw)))


_PARTS: Final[dict[type, tuple[Callable[[Any], tuple[Any, ...]], Callable[..., m.Message]]]] = {
    m.DesignMoments: (lambda r: _raw(r.n, r.mean, r.m2), _moments_of),
    m.Products: (lambda r: (r.n, r.products), lambda n, x: m.Products(np.rint(n), x)),
    m.Sums: (
        lambda r: (r.log_likelihood, r.gradient, r.information, r.n_patients, r.n_events),
        _sums_of,
    ),
    m.Updates: (_weighted, _updates_of),
    m.Intervals: (lambda r: (r.events, r.exposure, *_raw(*r.risk.T)), _intervals_of),
    m.PrivateSteps: (lambda r: (r.gradient,), m.PrivateSteps),
}
_ASKED: Final[dict[type, type]] = {
    m.AskMoments: m.DesignMoments,
    m.AskProducts: m.Products,
    m.AskSums: m.Sums,
    m.AskUpdates: m.Updates,
    m.AskIntervals: m.Intervals,
    m.AskPrivateSteps: m.PrivateSteps,
}


def _of_moments(request: m.AskMoments, plan: FederationPlan) -> list[tuple[int, ...]]:
    shape = (len(request.designs), max(plan.n_inputs(x) for x in request.designs))
    return [shape] * 3


def _of_products(request: m.AskProducts, plan: FederationPlan) -> list[tuple[int, ...]]:
    width = max(plan.n_inputs(x) for x in request.designs)
    return [(len(request.designs),), (len(request.designs), width, width)]


def _of_sums(request: m.AskSums, plan: FederationPlan) -> list[tuple[int, ...]]:
    fits, width = request.coefficients.shape
    return [(fits,), (fits, width), (fits, width, width), (fits,), (fits,)]


def _of_updates(request: m.AskUpdates, plan: FederationPlan) -> list[tuple[int, ...]]:
    fits = len(request.fits)
    return [request.weights.shape, (fits,), (fits,), (fits,)]


def _of_intervals(request: m.AskIntervals, plan: FederationPlan) -> list[tuple[int, ...]]:
    arms = len(request.arms)
    return [(arms, len(plan.edges_days))] * 2 + [(arms,)] * 3


def _of_steps(request: m.AskPrivateSteps, plan: FederationPlan) -> list[tuple[int, ...]]:
    return [request.coefficients.shape]


_SHAPES: Final[dict[type, Callable[[Any, FederationPlan], list[tuple[int, ...]]]]] = {
    m.DesignMoments: _of_moments,
    m.Products: _of_products,
    m.Sums: _of_sums,
    m.Updates: _of_updates,
    m.Intervals: _of_intervals,
    m.PrivateSteps: _of_steps,
}
