"""The demonstration: a simulated consortium, run through the very flows that hospitals run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import resources
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from flows.approvals import FOLDER as APPROVALS
from flows.approvals import write_approval
from flows.federated import KITS
from flows.gate import approve_at
from flows.identity import identity
from flows.protocol import load_protocol
from flows.services import client_settings
from flows.summary import comparison
from fusion.federation.consortium import CONSORTIUM_FILE, COORDINATOR, read_consortium
from infra.provision import Keys, Server, provision
from infra.settings import SITE_FILE, STUDY_FILE, Workspace
from modalities.files import replacing
from modalities.synthetic import GENE_SETS, simulate
from modalities.synthetic.tables import feature_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flows.services import Server as PrefectServer
    from flows.study import StudyOutcome
    from flows.summary import Run

FederationKind = Literal["memory", "flare"]
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


def connect(server: PrefectServer, root: Path) -> None:
    """Point Prefect and our flows at a server and a folder; Prefect must not be imported yet."""
    os.environ.update(client_settings(server.api_url, root / "prefect"))
    os.environ["CONSILIUM_ROOT"] = str(root)


def demo_protocol(*, tables_only: bool, secure_sum: bool = False) -> str:
    """``study.toml`` of the demonstration."""
    sums = "secure_sum" if secure_sum else "plain"
    if tables_only:
        columns = {x: json.dumps(feature_names(x)) for x in ("pathology", "radiology", "omics")}
        return template("demo_tables.toml").format(name=f"{STUDY}-tables", sums=sums, **columns)
    sets = "\n".join(f"{name} = {json.dumps(list(genes))}" for name, genes in GENE_SETS.items())
    return template("demo.toml").format(name=STUDY, sums=sums) + sets + "\n"


def write_consortium(
    root: Path,
    sites: Sequence[int],
    *,
    seed: int,
    tables_only: bool = False,
    secure_sum: bool = False,
    advance: Callable[[int], None] | None = None,
) -> tuple[str, ...]:
    """Simulate raw files and configure a study over them; return the sites' names.

    Raises
    ------
    ValueError
        If the folder holds another simulation.
    """
    truth = simulate(root, sites, seed=seed, tables_only=tables_only, advance=advance)
    protocol = demo_protocol(tables_only=tables_only, secure_sum=secure_sum)
    write_once(root / STUDY_FILE, protocol)
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
    federation: FederationKind = "memory",
) -> dict[str, Any]:
    """Simulate a consortium below ``root`` and run its study, as :func:`run_workspace` does.

    Every stage recognises its own finished work, so that a second call continues or repeats
    nothing. Over ``flare`` the sums are secure ones.
    """
    with run.watch.stage("simulate"):
        run.say("simulating a consortium's registries and data")
        names = write_consortium(
            root, sites, seed=seed, tables_only=tables_only, secure_sum=federation == "flare"
        )
    return run_workspace(root, names, run, federation=federation)


def run_workspace(
    root: Path, sites: Sequence[str], run: Run, *, federation: FederationKind = "memory"
) -> dict[str, Any]:
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
    with _parties(root, sites, run, federation), watch.stage("study"):
        outcome: Any = run_study(study, list(sites), federation)
    return _told(root, outcome, run)


def run_from_kits(root: Path, run: Run) -> dict[str, Any]:
    """Run the study of a coordinator's folder over the federation engine, whose parties run.

    Returns
    -------
    dict
        As :func:`run_workspace`.
    """
    with run.watch.stage("start"):
        connect(run.server, root)
        from flows.study import run_study

        run.server.wait_ready()
    study = load_protocol(root / STUDY_FILE).study.name
    with run.watch.stage("study"):
        outcome: Any = run_study(study, [], "flare")
    return _told(root, outcome, run)


def _told(root: Path, outcome: StudyOutcome, run: Run) -> dict[str, Any]:
    return {
        **outcome.summary,
        "reused": outcome.reused,
        "root": str(root),
        "wall_s": run.watch.wall_s | outcome.summary["wall_s"] | {"total": run.watch.total_s},
        "table": outcome.table,
    }


@contextmanager
def _parties(
    root: Path, sites: Sequence[str], run: Run, federation: FederationKind
) -> Iterator[None]:
    """Play all parties of the consortium on this machine, for as long as the study runs."""
    if federation == "memory":
        yield
        return
    from flows.parties import start_parties

    with run.watch.stage("provision"):
        kits = set_up_federation(root, sites)
    run.say(f"starting the coordinator and {len(sites)} sites as processes of their own")
    with ExitStack() as stack:
        with run.watch.stage("connect"):
            stack.enter_context(start_parties(kits, logs=root / "logs"))
        yield


def set_up_federation(root: Path, sites: Sequence[str]) -> dict[str, Path]:
    """Make keys, start-up kits and approvals of every party, where all are on this machine.

    Returns
    -------
    dict
        Kit per party.
    """
    protocol = load_protocol(root / STUDY_FILE)
    homes = {site: Workspace(root=root).site(site).home for site in sites}
    keys = Keys(
        coordinator=identity(root / COORDINATOR).public,
        sites={site: identity(home).public for site, home in homes.items()},
        quorum=len(sites),
    )
    shutil.rmtree(root / KITS, ignore_errors=True)
    kits = provision(
        protocol.study.name,
        keys,
        out=root / KITS,
        server=Server(port=_free_port()),
        homes=dict.fromkeys(sites, root.resolve()),
    )
    consortium = read_consortium(kits[COORDINATOR] / CONSORTIUM_FILE)
    for site in sites:
        approval = approve_at(root, site, consortium, say=lambda line: None)
        write_approval(approval, root / COORDINATOR / APPROVALS)
    return kits


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


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
