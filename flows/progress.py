"""Progress of long work: a bar in a terminal, a progress artifact in Prefect."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

if TYPE_CHECKING:
    from types import TracebackType
    from uuid import UUID

    from fusion.federation import RoundRecord


class Progress:
    """Advances a bar on standard error and, inside a flow run, an artifact of Prefect.

    Parameters
    ----------
    label
        Site and verb; no patient, no path.
    total
        Units of work; with 0 nothing is shown.
    """

    def __init__(self, label: str, *, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._artifact: UUID | None = None

    def __enter__(self) -> Self:
        if self._total:
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total)
            self._artifact = _create_artifact(self._label)
        return self

    def advance(self, n: int) -> None:
        """Count ``n`` more units as done."""
        if not self._total:
            return
        self._done += n
        self._bar.advance(self._task, n)
        if self._artifact is not None:
            _update_artifact(self._artifact, 100.0 * self._done / self._total)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._total:
            self._bar.stop()


class RoundProgress:
    """Shows rounds as they pass; their number is known only at the end.

    Parameters
    ----------
    study
        Name of the study.
    """

    def __init__(self, study: str) -> None:
        self._study = study
        self._status = Console(stderr=True).status(f"{study}: first round")

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._status.start()
        self._artifact = _create_artifact(f"{self._study} rounds")
        return self

    def advance(self, record: RoundRecord) -> None:
        """Show a finished round."""
        self._status.update(f"{self._study}: round {record.number}, {record.stage}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._status.stop()
        if self._artifact is not None and error is None:
            _update_artifact(self._artifact, 100.0)


def _create_artifact(label: str) -> UUID | None:
    if "prefect" not in sys.modules:  # importing it takes seconds, and no flow runs without it
        return None
    from prefect.artifacts import create_progress_artifact
    from prefect.context import FlowRunContext

    if FlowRunContext.get() is None:
        return None
    key = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    created = create_progress_artifact(progress=0.0, key=key, description=label)
    return created if not hasattr(created, "__await__") else None


def _update_artifact(artifact: UUID, percent: float) -> None:
    from prefect.artifacts import update_progress_artifact

    update_progress_artifact(artifact_id=artifact, progress=min(100.0, percent))
