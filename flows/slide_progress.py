"""How far slides are: a bar in a terminal with tiles per second and the time left."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from types import TracebackType

    from modalities.pathology import TileCount


class SlideProgress:
    """Shows slides and tiles as they are done.

    How many tiles there are is known of a slide once it is begun; of the others the mean counts, so
    that the time left is an estimate which gets better.

    Parameters
    ----------
    n_slides
        In all.
    """

    def __init__(self, n_slides: int) -> None:
        self._n_slides, self._n_ended = n_slides, 0
        self._tiles: dict[str, TileCount] = {}
        self._earlier: dict[str, int] = {}
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(self.description, total=None, rate="")

    @property
    def description(self) -> str:
        """How many slides have ended."""
        return f"slide {min(self._n_ended + 1, self._n_slides)} of {self._n_slides}"

    @property
    def n_done(self) -> int:
        """Tiles that are done, those of an earlier run included."""
        return sum(x.n_done for x in self._tiles.values())

    @property
    def n_expected(self) -> int:
        """Tiles in all, as far as one can tell."""
        known = sum(x.n_tiles for x in self._tiles.values())
        waiting = max(0, self._n_slides - max(self._n_ended, len(self._tiles)))
        return known + round(waiting * known / max(1, len(self._tiles)))

    @property
    def tiles_per_s(self) -> float:
        """Tiles of this run per second, since the first slide was opened."""
        elapsed = max(1e-9, time.monotonic() - self._began)
        return (self.n_done - sum(self._earlier.values())) / elapsed

    def watch(self, count: TileCount) -> None:
        """Take note of how far one slide is."""
        with self._lock:
            if not self._tiles:
                self._began = time.monotonic()
            if count.slide not in self._tiles:
                self._earlier[count.slide] = count.n_done
            self._tiles[count.slide] = count
            self._show()

    def advance(self, n: int) -> None:
        """Count ``n`` more slides as ended."""
        with self._lock:
            self._n_ended += n
            self._show()

    def _show(self) -> None:
        self._bar.update(
            self._task,
            description=self.description,
            completed=self.n_done,
            total=self.n_expected or None,
            rate=f"{self.n_done} tiles, {self.tiles_per_s:.0f}/s",
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
