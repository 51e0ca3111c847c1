"""What MLflow's pages show of a version, held against what was signed at its registration.

Tags, parameters, metrics, rounds and the description stand in MLflow's database, which more people
may write to than may sign. What was written there is itself an artifact of the run, under the
coordinator's signature; the description is the start of the model card.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from flows.lineage import FUSION
from flows.lineage_items import COORDINATOR, NOT_THERE, Item, counted, differences
from flows.mlflow_store import model_id_of
from flows.noted_tags import is_noted
from flows.registry_values import COMPLETE_TAG, DIGEST_CHARACTERS, LOGGED, shortened
from modalities.files import digest_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mlflow.entities import Metric, Run

    from flows.lineage import Lineage
    from flows.provenance import Provenance

_CARD: Final = "model_card.md"
_OURS: Final = "consilium."
_MLFLOW: Final = "mlflow."
_NAME: Final = "mlflow.runName"
_PARENT: Final = "mlflow.parentRunId"
_ROUND: Final = "round"


def check_shown(found: Lineage, said: Provenance) -> Iterator[Item]:
    """Hold everything that MLflow shows of a version against what was signed."""
    if found.version.name != f"{said.study}{FUSION}":
        yield Item(COORDINATOR, "name of the model", "changed")
    run = found.client.get_run(found.version.run_id)
    logged = _signed_values(found, said)
    yield from _version_items(found, said, logged)
    yield from _data_set_items(run, said)
    if logged is None:
        why = f"{LOGGED} is not here as it was signed, to hold them against"
        yield Item(COORDINATOR, "parameters, metrics and rounds", "elsewhere", why=why)
        return
    wanted = {**logged["tags"], _NAME: logged["name"]}
    yield from differences("tag {} of the run", _ours(run.data.tags, wanted), wanted)
    yield from differences("parameter {} of the run", run.data.params, logged["params"])
    faults = [*_metric_items(found, run, logged), *_round_items(found, run, logged)]
    yield from faults
    if not faults:
        told = (counted(len(logged["metrics"]), "metric"), counted(len(logged["rounds"]), "round"))
        yield Item(COORDINATOR, f"registry: {' and '.join(told)} read", "whole")


def _signed_values(found: Lineage, said: Provenance) -> dict[str, Any] | None:
    path = _as_signed(found, said, LOGGED)
    return None if path is None else dict(json.loads(path.read_bytes()))


def _as_signed(found: Lineage, said: Provenance, name: str) -> Path | None:
    """Give an artifact that is as it was signed; None for any other, which is named elsewhere."""
    path = found.run / name
    whole = path.is_file() and digest_path(path) == said.artifacts.get(name)
    return path if whole else None


def _ours(tags: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    """Leave out tags that people, or MLflow for itself, may add."""
    return {k: v for k, v in tags.items() if k in wanted or k.startswith(_OURS)}


def _version_items(
    found: Lineage, said: Provenance, logged: Mapping[str, Any] | None
) -> Iterator[Item]:
    tags = {k: v for k, v in found.version.tags.items() if not is_noted(k)}
    wanted = said.tags() | {COMPLETE_TAG: "true"}
    if logged is None:
        tags = {k: v for k, v in tags.items() if k in wanted}
    else:
        wanted |= {k: v for k, v in logged["tags"].items() if not k.startswith(_MLFLOW)}
        tags = _ours(tags, wanted)
    yield from differences("tag {} of the version", tags, wanted)
    card = _as_signed(found, said, _CARD)
    description = "description of the version"
    if card is None:
        why = f"{_CARD} is not here as it was signed, to hold it against"
        yield Item(COORDINATOR, description, "elsewhere", why=why)
    elif found.version.description != shortened(card.read_text(encoding="utf-8")):
        yield Item(COORDINATOR, description, "changed")


def _data_set_items(run: Run, said: Provenance) -> Iterator[Item]:
    found = {
        x.dataset.name: (x.dataset.digest, json.loads(x.dataset.source), x.tags[0].value)
        for x in run.inputs.dataset_inputs
    }
    wanted = {
        site: (
            cohort[:DIGEST_CHARACTERS],
            {"site": site, "cohort": cohort},
            "external" if site in said.external else "training",
        )
        for site, cohort in said.cohorts.items()
    }
    yield from differences("data set {} of the run", found, wanted)


def _metric_items(found: Lineage, run: Run, logged: Mapping[str, Any]) -> Iterator[Item]:
    """Hold every table of metrics against what was signed: newest, all, and those of the model."""
    history = _by_key(logged["metrics"])
    newest = {key: max(of)[2] for key, of in history.items()}
    yield from differences("metric {} of the run", run.data.metrics, newest)
    yield from differences("history of metric {}", _history(found, run, history), history)
    model = found.client.get_logged_model(model_id_of(found.version))
    yield from differences("parameter {} of the model", model.params or {}, logged["params"])
    tags = model.tags or {}
    yield from differences("tag {} of the model", _ours(tags, logged["tags"]), logged["tags"])
    shown = {(x.key, x.dataset_name or ""): x.value for x in model.metrics or ()}
    of_model = {
        (x["key"], x["dataset"] or ""): x["value"] for x in logged["metrics"] if x["of_model"]
    }
    named = ({" on ".join(filter(None, k)): v for k, v in x.items()} for x in (shown, of_model))
    yield from differences("metric {} of the model", *named)


def _by_key(metrics: list[dict[str, Any]]) -> dict[str, list[tuple[int, int, float]]]:
    found = defaultdict(list)
    for x in metrics:
        found[x["key"]].append((x["step"], x["timestamp"], x["value"]))
    return {key: sorted(of) for key, of in found.items()}


def _history(
    found: Lineage, run: Run, wanted: Mapping[str, Any]
) -> dict[str, list[tuple[int, int, float]]]:
    known = {key: found.client.get_metric_history(run.info.run_id, key) for key in wanted}
    return {key: _values(of) for key, of in known.items() if of}


def _values(metrics: list[Metric]) -> list[tuple[int, int, float]]:
    return sorted((x.step, x.timestamp, x.value) for x in metrics)


def _round_items(found: Lineage, run: Run, logged: Mapping[str, Any]) -> Iterator[Item]:
    """Hold the run of each round, below the study's, against what was signed of it."""
    asked = f"tags.`{_PARENT}` = '{run.info.run_id}'"
    children = found.client.search_runs([run.info.experiment_id], asked, max_results=10_000)
    by_number = {x.data.params.get(_ROUND, ""): x for x in children}
    wanted = {str(x["number"]): x for x in logged["rounds"]}
    if len(by_number) != len(children):
        yield Item(COORDINATOR, "rounds of the run", "changed", why=NOT_THERE)
    shown = {number: _round_values(found, x) for number, x in by_number.items()}
    yield from differences("round {} of the run", shown, wanted)


def _round_values(found: Lineage, child: Run) -> dict[str, Any] | None:
    """Give a round as it was written; None where its parts do not belong together."""
    number = child.data.params.get(_ROUND, "")
    metrics = dict(child.data.metrics)
    known = {k: found.client.get_metric_history(child.info.run_id, k) for k in metrics}
    if not number.isdecimal() or {k: _values(of) for k, of in known.items()} != {
        k: [(int(number), child.info.end_time, value)] for k, value in metrics.items()
    }:
        return None
    return {
        "name": child.info.run_name,
        "stage": child.data.params.get("stage"),
        "number": int(number),
        "begins_ms": child.info.start_time,
        "ends_ms": child.info.end_time,
        "metrics": metrics,
    }
