"""What the federation engine costs: a study over three sites' start-up kits on this machine.

All parties are processes of their own, with mutual TLS and secure sums. Sites are prepared first,
by their flows. What is timed is a run as the coordinator sees it, from the submission of its job
until the models are there; the same run in this process says whether they are the same models.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time as clock
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from cross_validation import Figures, run, whole

from flows.demo import connect, set_up_federation, write_consortium
from flows.parties import start_parties
from flows.protocol import load_protocol
from flows.services import prefect_server
from infra.settings import STUDY_FILE, Workspace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flows.protocol import StudyProtocol
    from fusion.federation import Fitted, RoundRecord

SIZES = (110, 100, 90)
# Nothing but the fusion model is fitted together, at one penalty: the shortest study that there is.
_SHORT = "".join(
    f'[encoder.{name}]\nsharing = "local"\n'
    for name in ("clinical", "omics", "pathology", "radiology")
)


def write_study(root: Path, *, shared: bool, seed: int) -> tuple[str, ...]:
    """Simulate three sites' tables, and a study over them that shares encoders or does not."""
    sites = write_consortium(root, SIZES, seed=seed, tables_only=True, secure_sum=True)
    if not shared:
        text = (root / STUDY_FILE).read_text()
        text = text.replace("[fusion]\n", f"{_SHORT}[fusion]\nridge = 0.1\n")
        (root / STUDY_FILE).write_text(text)
    return sites


def prepare(root: Path, sites: Sequence[str]) -> None:
    """Prepare and train every site by its flows; their server is gone before anything is timed."""
    with prefect_server(root / "prefect") as server:
        connect(server, root)
        from flows.site import prepare_site, train_site

        server.wait_ready()
        study = load_protocol(root / STUDY_FILE).study.name
        for site in sites:
            prepare_site(study, site)
            train_site(study, site)


def over_engine(workspace: Workspace, protocol: StudyProtocol) -> tuple[Fitted, Figures]:
    """Run the study over the engine once; give its models and seconds."""
    from flows.links import linked
    from fusion.federation import run_federation

    rounds: list[RoundRecord] = []
    submitted = clock.perf_counter()
    with linked("flare", workspace, protocol, ()) as link:
        plan = protocol.plan(link.run_key())
        began = clock.perf_counter() - submitted
        link.open(plan)
        fitted = run_federation(plan, link, on_round=rounds.append)
        took = clock.perf_counter() - submitted
        engine_round_s = link.time_engine(fitted)["engine_round_s"]
    seconds = [r.seconds for r in rounds]
    return fitted, {
        "submit_to_first_round_s": began,
        "submit_to_result_s": took,
        "round_s": seconds,
        "engine_round_s": engine_round_s,
        "ratio": statistics.median(seconds) / engine_round_s,
    }


def in_process(workspace: Workspace, protocol: StudyProtocol, sites: tuple[str, ...]) -> Fitted:
    """Run the same study with all sites in this process."""
    from flows.links import InMemory
    from fusion.federation import run_federation

    link = InMemory(workspace, protocol, sites)
    plan = protocol.plan(link.run_key())
    link.open(plan)
    return run_federation(plan, link)


def coefficient_gap(found: Fitted, expected: Fitted) -> float:
    """Largest difference between coefficients of two runs, over all encoders and models."""
    pairs = [(found.models[x], model) for x, model in expected.models.items()]
    pairs += [(found.encoders[x], encoder) for x, encoder in expected.encoders.items()]  # type: ignore[misc]
    return max(float(np.abs(a.coefficients - b.coefficients).max()) for a, b in pairs)


def study(arguments: argparse.Namespace) -> Figures:
    """Run the benchmark that the command line asks for."""
    # Processes that are started from here inherit it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    with TemporaryDirectory(prefix="consilium-") as folder:
        root = Path(folder)
        sites = write_study(root, shared=arguments.shared_encoders, seed=arguments.seed)
        prepare(root, sites)
        workspace, protocol = Workspace(root=root), load_protocol(root / STUDY_FILE)
        expected = in_process(workspace, protocol, sites)
        with start_parties(set_up_federation(root, sites), logs=root / "logs"):
            runs = [over_engine(workspace, protocol) for _ in range(arguments.repeat)]
    return _figures([x for _, x in runs], gap=max(coefficient_gap(x, expected) for x, _ in runs))


def _figures(runs: Sequence[dict[str, Any]], *, gap: float) -> Figures:
    middle = sorted(runs, key=lambda x: x["submit_to_result_s"])[len(runs) // 2]
    medians = {
        name: float(f"{statistics.median(x[name] for x in runs):.4g}")
        for name in ("submit_to_first_round_s", "submit_to_result_s", "engine_round_s", "ratio")
    }
    return {
        "benchmark": "engine",
        "sites": len(SIZES),
        "patients": sum(SIZES),
        "cores": len(os.sched_getaffinity(0)),
        "rounds": len(middle["round_s"]),
        **medians,
        "median_round_s": float(f"{statistics.median(middle['round_s']):.4g}"),
        "round_s": [round(x, 4) for x in middle["round_s"]],
        "max_coefficient_gap": gap,
        "targets": {"submit_to_result_s": 30, "ratio": 1.5, "max_coefficient_gap": 1e-8},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and print one JSON object."""
    parser = argparse.ArgumentParser(description="Cost of the federation engine on this machine.")
    parser.add_argument("--repeat", type=whole(1), default=3, help="of runs; medians are shown")
    parser.add_argument("--cores", type=whole(1), default=2, help="for all parties together")
    parser.add_argument("--shared-encoders", action="store_true", help="twice as many rounds")
    parser.add_argument("--seed", type=whole(0), default=7, help="of the simulation")
    parser.add_argument("--json", action="store_true", help="the only form there is")
    return run(parser, study, arguments)


if __name__ == "__main__":
    sys.exit(main())
