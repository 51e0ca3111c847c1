from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from flows.records import Reference
from flows.registry import Registered
from flows.summary import Stopwatch, comparison, summarise_record
from fusion.evaluation import Estimate
from fusion.federation import LOCAL_ONLY
from infra.settings import Workspace
from tests.simulated_record import full_record

if TYPE_CHECKING:
    from pathlib import Path


def test_a_stopwatch_adds_up_stages_even_failed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 10.0, 10.5, 20.0])
    monkeypatch.setattr("flows.summary.clock.perf_counter", lambda: next(now))
    watch = Stopwatch(started=0.0)

    def fail() -> None:
        with watch.stage("fit"):
            raise ValueError

    with watch.stage("load"):
        next(now)
    with pytest.raises(ValueError, match=r"^$"):
        fail()
    assert watch.wall_s == {"load": 3.0, "fit": 0.5}
    assert watch.total_s == 20.0


def test_a_comparison_goes_to_json_and_back() -> None:
    estimate = Estimate(value=0.7, standard_error=0.05, low=0.6, high=0.8)
    found = comparison(
        Reference(
            concordance={"federated": estimate, "pooled": estimate},
            by_site={},
            local={"site-01": estimate},
            local_mean=0.65,
            max_coefficient_gap=1e-9,
        )
    )
    assert json.loads(json.dumps(found)) == found
    assert found["concordance"] == {"local_mean": 0.65, "federated": 0.7, "pooled": 0.7}
    assert set(found["intervals"]) == {"federated", "pooled", "local_site-01"}
    assert found["max_coefficient_gap"] == 1e-9


def test_a_summary_tells_the_pooled_gain_and_every_alarm(tmp_path: Path) -> None:
    record = full_record()
    registered = Registered("lung-os", 3, "f00", reused=False)
    found = summarise_record(record, registered, Workspace(root=tmp_path))
    assert json.loads(json.dumps(found)) == found
    gain = record.results.arms[LOCAL_ONLY].difference
    assert gain is not None
    assert found["holdout_gain"]["value"] == gain.value
    assert found["alarms"] == [
        {"site": "site-02", "reason": "worse_than_own", "z": -2.61},
        {"site": "site-03", "reason": "unlike_in_training", "z": -3.42},
    ]
