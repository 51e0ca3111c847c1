"""The demonstration: a simulated consortium, run through the very flows that hospitals run."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import resources
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from flows.protocol import load_protocol
from flows.services import client_settings, prefect_server
from flows.summary import Stopwatch, comparison
from infra.settings import SITE_FILE, STUDY_FILE, Workspace
from modalities.files import replacing
from modalities.synthetic import GENE_SETS, simulate
from modalities.synthetic.tables import feature_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flows.services import Server

    Say = Callable[[str], None]

STUDY = "demo"
DEFAULT_SITES = (160, 110, 90, 40)


def template(name: str) -> str:
    """Text of a template that ships with the package."""
    return resources.files("flows").joinpath("templates", name).read_text(encoding="utf-8")


def write_once(path: Path, text: str) -> None:
    """Write a file, or leave it as it is where it holds the same."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def demo_protocol(*, tables_only: bool) -> str:
    """``study.toml`` of the demonstration."""
    if tables_only:
        columns = {x: json.dumps(feature_names(x)) for x in ("pathology", "radiology", "omics")}
        return template("demo_tables.toml").format(name=f"{STUDY}-tables", **columns)
    sets = "\n".join(f"{name} = {json.dumps(list(genes))}" for name, genes in GENE_SETS.items())
    return template("demo.toml").format(name=STUDY) + sets + "\n"


def write_consortium(
    root: Path,
    sites: Sequence[int],
    *,
    seed: int,
    tables_only: bool = False,
    advance: Callable[[int], None] | None = None,
) -> tuple[str, ...]:
    """Simulate raw files and configure a study over them; return the sites' names.

    Raises
    ------
    ValueError
        If the folder holds another simulation.
    """
    truth = simulate(root, sites, seed=seed, tables_only=tables_only, advance=advance)
    write_once(root / STUDY_FILE, demo_protocol(tables_only=tables_only))
    for site in truth.log_hazard:
        # A simulated site's secret follows from the seed, so that the demo's split does too.
        secret = hashlib.sha256(f"simulated {seed} {site}".encode()).hexdigest()
        text = template("site.toml").format(name=site, secret=secret)
        write_once(root / site / SITE_FILE, text)
    return tuple(truth.log_hazard)


def run_demo(
    root: Path, sites: Sequence[int], *, seed: int, tables_only: bool, say: Say
) -> dict[str, Any]:
    """Simulate, prepare, train and run the study; return the summary with the table's text.

    Every stage recognises its own finished work, so that a second call continues or repeats
    nothing.
    """
    watch = Stopwatch()
    root = root.resolve()
    with prefect_server(root / "prefect") as server:
        with watch.stage("simulate"):
            say("simulating a consortium's registries and data")
            names = write_consortium(root, sites, seed=seed, tables_only=tables_only)
        return _run_flows(root, names, server, watch, say)


def run_workspace(root: Path, sites: Sequence[str], say: Say) -> dict[str, Any]:
    """Prepare, train and run the study of a folder that holds study and sites."""
    with prefect_server(root / "prefect") as server:
        return _run_flows(root, sites, server, Stopwatch(), say)


@contextmanager
def prefect_session(root: Path) -> Iterator[None]:
    """Make flows report to a Prefect server for the length of the block.

    Prefect must not have been imported before.
    """
    with prefect_server(root / "prefect") as server:
        _connect(server, root)
        yield


def _connect(server: Server, root: Path) -> None:
    os.environ.update(client_settings(server.api_url, root / "prefect"))
    os.environ["CONSILIUM_ROOT"] = str(root)
    server.wait_ready()


def _run_flows(
    root: Path, sites: Sequence[str], server: Server, watch: Stopwatch, say: Say
) -> dict[str, Any]:
    """Run the flows of every site, then the coordinator's."""
    with watch.stage("start"):
        _connect(server, root)
        from flows.site import prepare_site, train_site
        from flows.study import run_study

    study = load_protocol(root / STUDY_FILE).study.name
    for site in sites:
        with watch.stage("prepare"):
            prepared = prepare_site(study, site)
        say(
            f"{site}: {prepared.n_patients} patients, {prepared.n_extracted} inputs extracted, "
            f"{prepared.n_excluded} set aside"
        )
    for site in sites:
        with watch.stage("train"):
            left_out = train_site(study, site)
        reasons = sorted(set(left_out.values()))
        say(f"{site}: {'; '.join(reasons) or 'encoders trained'}")
    with watch.stage("study"):
        outcome = run_study(study, list(sites))
    return {
        **outcome.summary,
        "reused": outcome.reused,
        "root": str(root),
        "wall_s": watch.wall_s | outcome.summary["wall_s"] | {"total": watch.total_s},
        "table": outcome.table,
    }


def compare_seeds(
    sites: Sequence[int], seeds: Sequence[int], *, workers: int = 2
) -> dict[str, Any]:
    """Repeat the comparison of arms on tables simulated from several seeds, without servers.

    Returns
    -------
    dict
        ``seeds``: per seed its concordances; ``n_federated_above_local``; means over seeds.
    """
    jobs = [(tuple(sites), seed) for seed in seeds]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(_compare_seed, jobs))
    arms = list(runs[0]["concordance"])
    above = [r["concordance"]["federated"] > r["concordance"]["local_mean"] for r in runs]
    return {
        "n_seeds": len(runs),
        "n_federated_above_local": int(np.sum(above)),
        "mean_concordance": {
            arm: float(np.mean([r["concordance"][arm] for r in runs])) for arm in arms
        },
        "max_coefficient_gap": max(r["max_coefficient_gap"] for r in runs),
        "seeds": runs,
    }


def _compare_seed(job: tuple[tuple[int, ...], int]) -> dict[str, Any]:
    from flows.memory import read_workspace, run_in_memory

    sites, seed = job
    with TemporaryDirectory() as folder:
        write_consortium(Path(folder), sites, seed=seed, tables_only=True)
        protocol, inputs, truth = read_workspace(Workspace(root=Path(folder)))
    fitted, reference = run_in_memory(protocol, inputs, true_log_hazard=truth)
    rounds = max(fitted.fit_rounds.values())
    return {"seed": seed, "rounds": rounds, **comparison(reference)}
