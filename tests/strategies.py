"""Hypothesis strategies that several test files share."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, get_args, get_origin

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fusion import messages as m

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS: tuple[type, ...] = get_args(m.Message)
NAMES = st.from_regex(r"[a-z0-9][a-z0-9_./-]{0,12}", fullmatch=True)
DIGESTS = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)


class Survival(NamedTuple):
    """Rows of a simulated cohort: inputs (n, p), event (n,), time (n,), strata (n,)."""

    inputs: NDArray[np.float64]
    event: NDArray[np.bool_]
    time: NDArray[np.float64]
    strata: NDArray[np.int64]


@st.composite
def survival(
    draw: st.DrawFn, *, n_inputs: int = 3, min_size: int = 12, max_size: int = 50
) -> Survival:
    """Draw rows with at least one event; times are few enough to tie."""
    n = draw(st.integers(min_size, max_size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_times = draw(st.integers(2, 80))
    event = rng.random(n) < draw(st.floats(0.2, 1.0))
    event[0] = True
    return Survival(
        rng.normal(size=(n, n_inputs)),
        event,
        rng.integers(1, n_times + 1, n).astype(np.float64),
        rng.integers(0, 3, n),
    )


@st.composite
def messages(draw: st.DrawFn, kind: type | None = None) -> m.Message:
    """Draw a message that its schema allows, of any kind or of the one given."""
    chosen = draw(st.sampled_from(KINDS)) if kind is None else kind
    sizes: dict[str, int] = {}

    def size(dim: str) -> int:
        if dim.isdigit():
            return int(dim)
        return sizes.setdefault(dim, draw(st.integers(0, 3)))

    def value(name: str, hint: object) -> object:
        if get_origin(hint) is tuple:
            dim = m._NAMED_DIM.get(name, name)
            least, most = (sizes[dim], sizes[dim]) if dim in sizes else (1, 4)
            texts = DIGESTS if name in m._DIGESTS else NAMES
            names = draw(st.lists(texts, min_size=least, max_size=most))
            sizes[dim] = len(names)
            return tuple(names)
        if hint is str:
            is_code = chosen is m.Refused
            return draw(st.sampled_from(sorted(m._CODES)) if is_code else DIGESTS)
        plain = {
            int: st.integers(0, 2**53 - 1),
            bool: st.booleans(),
            float: st.floats(allow_nan=False, allow_infinity=False),
        }
        if hint in plain:
            return draw(plain[hint])
        shape = get_args(hint)[1]
        elements = (
            st.floats(allow_nan=False, allow_infinity=False) if shape.dtype == "<f8" else None
        )
        dims = tuple(size(dim) for dim in shape.dims)
        return draw(arrays.arrays(np.dtype(shape.dtype), dims, elements=elements))

    return chosen(**{name: value(name, hint) for name, hint in m._HINTS[chosen.__name__].items()})
