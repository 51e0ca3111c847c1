from __future__ import annotations

import json

import pytest

from flows.records import Reference
from flows.summary import Stopwatch, comparison
from fusion.evaluation import Estimate


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
