"""The demonstration: a simulated consortium, run through the very flows that hospitals run."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from importlib import resources
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from flows.protocol import load_protocol
from flows.services import client_settings
from flows.summary import comparison
from infra.settings import SITE_FILE, STUDY_FILE, Workspace
from modalities.files import replacing
from modalities.synthetic import GENE_SETS, simulate
from modalities.synthetic.tables import feature_names

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flows.services import Server
    from flows.summary import Run

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


def connect(server: Server, root: Path) -> None:
    """Point Prefect and our flows at a server and a folder; Prefect must not be imported yet."""
    os.environ.update(client_settings(server.api_url, root / "prefect"))
    os.environ["CONSILIUM_ROOT"] = str(root)


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
    root: Path,
    sites: Sequence[int],
    run: Run,
    *,
    seed: int,
    tables_only: bool,
) -> dict[str, Any]:
    """Simulate a consortium below ``root`` and run its study, as :func:`run_workspace` does.

    Every stage recognises its own finished work, so that a second call continues or repeats
    nothing.
    """
    with run.watch.stage("simulate"):
        run.say("simulating a consortium's registries and data")
        names = write_consortium(root, sites, seed=seed, tables_only=tables_only)
    return run_workspace(root, names, run)


def run_workspace(root: Path, sites: Sequence[str], run: Run) -> dict[str, Any]:
    """Prepare, train and run the study of a folder that holds study and sites.

    Returns
    -------
    dict
        The summary of the run, seconds per stage, and the results table under ``table``.
    """
    watch, say = run.watch, run.say
    with watch.stage("start"):
        connect(run.server, root)
        from flows.site import prepare_site, train_site
        from flows.study import run_study

        run.server.wait_ready()
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
        say(f"{site}: {_trained(left_out)}")
    with watch.stage("study"):
        outcome = run_study(study, list(sites))
    return {
        **outcome.summary,
        "reused": outcome.reused,
        "root": str(root),
        "wall_s": watch.wall_s | outcome.summary["wall_s"] | {"total": watch.total_s},
        "table": outcome.table,
    }


def _trained(left_out: dict[str, str]) -> str:
    """Say which modalities were left out, and why; a reason that all share stands alone."""
    reasons = {
        reason: [x for x, of in left_out.items() if of == reason] for reason in left_out.values()
    }
    if list(reasons) == ["the site is below its training minimum"]:
        return next(iter(reasons))
    without = [f"without {', '.join(names)} ({reason})" for reason, names in reasons.items()]
    return ", ".join(["encoders trained", *without])


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
