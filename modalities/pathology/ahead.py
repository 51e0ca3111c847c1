"""An iterator that works ahead of whoever takes from it."""

from __future__ import annotations

import queue
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

T = TypeVar("T")
_POLL_S: Final = 0.1


class _End:
    """Marks the end of what the thread made, and the error that ended it."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


@contextmanager
def ahead(items: Generator[T, None, None], depth: int) -> Iterator[Iterator[T]]:
    """Let a generator run in a thread of its own, at most ``depth`` items ahead.

    Its errors are raised where the items are taken. When the block is left, early or not, the
    generator is closed in its thread, and that is waited for.

    Examples
    --------
    >>> with ahead((x * x for x in range(3)), 2) as squares:
    ...     list(squares)
    [0, 1, 4]
    """
    made: queue.Queue[T | _End] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: T | _End) -> bool:
        while not stopped.is_set():
            try:
                made.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                if not put(item):
                    break
        except BaseException as raised:  # noqa: BLE001 - raised again where items are taken
            error = raised
        finally:
            items.close()
        put(_End(error))

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        yield _taken(made)
    finally:
        stopped.set()
        thread.join()


def _taken(made: queue.Queue[T | _End]) -> Iterator[T]:
    while not isinstance(item := made.get(), _End):
        yield item
    if item.error is not None:
        raise item.error
