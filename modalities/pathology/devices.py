"""Slides over several devices: each takes the next slide when it is done with one."""

from __future__ import annotations

import threading
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from modalities.pathology.pipeline import extract_slides

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from modalities.pathology.pipeline import (
        Encoder,
        SlideJob,
        SlideOutcome,
        TileCount,
        Watch,
    )
    from modalities.pathology.spec import PathologySpec

    Done = tuple[SlideJob, SlideOutcome]

_DRIVER = Path("/proc/driver/nvidia/gpus")
# GPUs of Windows below Linux, and of another maker, of which nothing says how many there are.
_UNCOUNTED = (Path("/dev/dxg"), Path("/dev/kfd"))


def found_devices() -> Sequence[str | None]:
    """Give the devices to embed on; (None,) leaves one to torch, which is not imported for that."""
    n_listed = len(list(_DRIVER.iterdir())) if _DRIVER.is_dir() else 0
    if n_listed < 2 and not any(path.exists() for path in _UNCOUNTED):
        return (None,)
    from modalities.pathology.network import devices

    return devices()


def extract_over(
    devices: Sequence[str | None],
    jobs: Iterable[SlideJob],
    spec: PathologySpec,
    load: Callable[[str | None], Encoder],
    *,
    watch: Watch | None = None,
) -> Generator[Done, None, None]:
    """Extract slides as :func:`extract_slides` does, over several devices in the order of ending.

    Parameters
    ----------
    load
        Loads the encoder onto a device; called once per device, and not where nothing is to do.

    Raises
    ------
    UnknownEncoder, MissingWeights
        If the encoder cannot be loaded.
    """
    if len(devices) == 1:
        yield from extract_slides(jobs, spec, cache(partial(load, devices[0])), watch=watch)
        return
    shared = _Shared(jobs)
    ended: SimpleQueue[Done | BaseException | None] = SimpleQueue()

    def work(device: str | None) -> None:
        try:
            encoder = cache(partial(load, device))
            for done in extract_slides(shared.take(), spec, encoder, watch=shared.watched(watch)):
                ended.put(done)
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - it is raised where the slides are asked for
            shared.stop()
            ended.put(error)
        finally:
            ended.put(None)

    threads = [threading.Thread(target=work, args=(x,), daemon=True) for x in devices]
    for thread in threads:
        thread.start()
    try:
        yield from _until_all_ended(ended, len(threads))
    finally:
        shared.stop()
        for thread in threads:
            thread.join()


def _until_all_ended(
    ended: SimpleQueue[Done | BaseException | None], n_threads: int
) -> Generator[Done, None, None]:
    while n_threads:
        found = ended.get()
        if found is None:
            n_threads -= 1
        elif isinstance(found, BaseException):
            raise found
        else:
            yield found


class _Stopped(Exception):
    """Nobody waits for the slides any more."""


class _Shared:
    """Slides that several threads take from, each slide once."""

    def __init__(self, jobs: Iterable[SlideJob]) -> None:
        self._jobs = iter(jobs)
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def take(self) -> Iterator[SlideJob]:
        """Yield slides until there are no more."""
        while True:
            with self._lock:
                job = next(self._jobs, None)
            if job is None:
                return
            yield job

    def stop(self) -> None:
        """Give out no further slide, and end those in hand after their next batch."""
        self._stopped.set()
        with self._lock:
            self._jobs = iter(())

    def watched(self, watch: Watch | None) -> Watch:
        """Give a watch that ends a slide once all is stopped; its rows stay."""

        def told(count: TileCount) -> None:
            if self._stopped.is_set():
                raise _Stopped
            if watch is not None:
                watch(count)

        return told
