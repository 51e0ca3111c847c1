"""Threads that share out work which leaves the interpreter, like decoding."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")
R = TypeVar("R")

_MOST_THREADS = 8


class Workers:
    """Some threads; with one, the caller's own.

    Parameters
    ----------
    n_threads
        None takes one per processor that this process may use, at most eight.
    """

    def __init__(self, n_threads: int | None = None) -> None:
        self.n_threads = n_threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        many = self.n_threads > 1
        self._pool = ThreadPoolExecutor(self.n_threads, "decode") if many else None

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Apply a function to every item; each thread takes every n-th."""
        if self._pool is None or len(items) < 2:
            return [function(item) for item in items]
        shares = [items[i :: self.n_threads] for i in range(self.n_threads)]
        done = list(self._pool.map(lambda share: [function(x) for x in share], shares))
        # The items of one round follow one another, one from each thread.
        n_rounds = len(done[0])
        rounds = [[share[i] for share in done if i < len(share)] for i in range(n_rounds)]
        return [result for one_round in rounds for result in one_round]

    def close(self) -> None:
        """Let the threads end."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
