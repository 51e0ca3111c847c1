"""A run in plain values, for JSON and for people: figures, counts, seconds per stage."""

from __future__ import annotations

import time as clock
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flows.records import Reference, StudyRecord
    from flows.registry import Registered
    from flows.services import Server
    from fusion.evaluation import Estimate
    from infra.settings import Workspace


@dataclass
class Stopwatch:
    """Wall seconds per stage."""

    wall_s: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=clock.perf_counter)

    @property
    def total_s(self) -> float:
        """Seconds since the watch was made."""
        return clock.perf_counter() - self.started

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to a stage."""
        started = clock.perf_counter()
        try:
            yield
        finally:
            self.wall_s[name] = self.wall_s.get(name, 0.0) + clock.perf_counter() - started


@dataclass(frozen=True)
class Run:
    """What a command starts before anything slow: the server, the watch, where to say things."""

    server: Server
    watch: Stopwatch
    say: Callable[[str], None]


def summarise_record(
    record: StudyRecord, registered: Registered, workspace: Workspace
) -> dict[str, Any]:
    """Give the figures of a run as plain values for JSON."""
    fitted, reference = record.fitted, record.reference
    summary: dict[str, Any] = {
        "study": record.protocol.study.name,
        "run": record.run,
        "n_sites": len(fitted.sites),
        "n_training_sites": sum(s.trains for s in fitted.sites),
        "n_patients": sum(s.n_train + s.n_test for s in fitted.sites),
        "n_train": fitted.n_patients,
        "rounds": max(fitted.fit_rounds.values()),
        "rounds_per_fit": fitted.fit_rounds,
        "messages": len(fitted.rounds),
        "round_s": [r.seconds for r in fitted.rounds],
        "sums": record.protocol.federation.sums,
        "model_name": registered.model_name,
        "model_version": registered.version,
        "tracking_uri": workspace.mlflow_uri,
        "lowered_minimums": list(record.protocol.privacy.lowered()),
        "coefficients": fitted.models["protocol"].coefficients.tolist(),
        "released": {
            arm: _interval(result.concordance) for arm, result in record.results.arms.items()
        },
        "holdout_gain": _interval(record.results.holdout_gain),
        "alarms": [asdict(alarm) for alarm in record.results.alarms],
    }
    return summary | (comparison(reference) if reference is not None else {})


def comparison(reference: Reference) -> dict[str, Any]:
    """Give the arms of a comparison as plain values; every arm on the same test patients."""
    arms = {arm: e.value for arm, e in reference.concordance.items()}
    return {
        "concordance": {"local_mean": reference.local_mean, **arms},
        "intervals": {
            **{arm: _interval(e) for arm, e in reference.concordance.items()},
            **{f"local_{site}": _interval(e) for site, e in reference.local.items()},
        },
        "max_coefficient_gap": reference.max_coefficient_gap,
    }


def _interval(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else asdict(estimate)
