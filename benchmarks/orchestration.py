"""What Prefect, files and tables add to the nightly work of a site whose extractors are timers.

Every slide, scan and file of counts takes a fixed time and gives random features; all else is what
a site runs: its flow on a Prefect server of its own, ledger, tables, cohort. The whole command is
timed where a night has little to do, with the start of its server and all imports.
"""

from __future__ import annotations

import argparse
import heapq
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time as clock
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
from cross_validation import Figures, run, whole

from flows.demo import connect, demo_protocol, template
from flows.nights import read_night
from flows.services import prefect_server
from infra.settings import SITE_FILE, STUDY_FILE, Workspace
from modalities.cohort import feature_table
from modalities.pathology import SlideJob, SlideOutcome
from modalities.pathology.bags import Bag, write_bag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from anndata import AnnData

    from modalities.cohort import Exclusion
    from modalities.radiology import ScanRow

SITE, STUDY = "site-01", "demo"
N_THREADS = 2  # of the flow's task runner
_N_TILES, _N_DIM, _N_FEATURES = 64, 1280, 107
_OWN_S = {"slide": 4.0, "scan": 1.0, "counts": 1.0}
_NIGHT = """
import sys
sys.path.insert(0, sys.argv[1])
import orchestration
with orchestration.timers(**orchestration._OWN_S):
    from flows.cli import app
    app(["site", "prepare", "--root", sys.argv[2]])
"""


def write_site(root: Path, n_patients: int) -> None:
    """Write study, settings, registry, manifest and small files that stand for raw ones."""
    (root / "raw").mkdir(parents=True)
    (root / STUDY_FILE).write_text(demo_protocol(tables_only=False))
    (root / SITE_FILE).write_text(template("site.toml").format(name=SITE, secret="0" * 64))
    (root / "manifest.csv").write_text("patient_id,modality,path,mask_path,roi\n")
    (root / "clinical.csv").write_text("patient_id,event,time_days,age_years,stage,sex,treatment\n")
    for i in range(n_patients):
        add_patient(root, i)


def add_patient(root: Path, i: int) -> None:
    """Add one patient's slide, scan, counts and registry row."""
    who = f"P{i:04d}"
    for suffix in ("svs", "nii.gz", "mask.nii.gz"):
        (root / "raw" / f"{who}.{suffix}").write_bytes(f"{who} {suffix}".encode() * 1000)
    (root / "raw" / "counts.h5ad").write_bytes(who.encode() * 1000)  # one file for all
    with (root / "manifest.csv").open("a") as manifest:
        manifest.write(f"{who},pathology,raw/{who}.svs,,\n")
        manifest.write(f"{who},radiology,raw/{who}.nii.gz,raw/{who}.mask.nii.gz,\n")
        manifest.write(f"{who},omics,raw/counts.h5ad,,\n")
    with (root / "clinical.csv").open("a") as registry:
        registry.write(f"{who},{i % 2},{100 + i},{40 + i % 40},II,female,surgery\n")


@contextmanager
def timers(*, slide: float, scan: float, counts: float) -> Iterator[None]:
    """Let extraction wait so many seconds for each slide, scan and file of counts."""

    def extract_over(
        devices: Sequence[Any], jobs: Sequence[SlideJob], spec: Any, load: Any
    ) -> Iterator[tuple[SlideJob, SlideOutcome]]:
        del devices, load
        for job in jobs:
            clock.sleep(slide)
            rng = np.random.default_rng(len(job.path.name))
            features = rng.normal(size=(_N_TILES, _N_DIM)).astype(np.float32)
            made = {"input_digest": job.input_digest, "spec_fingerprint": spec.fingerprint()}
            bag = Bag(np.zeros((_N_TILES, 2), dtype=np.int64), features)
            write_bag(job.out_h5, bag, coords_attrs={}, file_attrs={**made, **job.marks})
            yield job, SlideOutcome(job.name, "done", n_tiles=_N_TILES)

    def extract_scans(
        scans: Sequence[ScanRow], spec: Any, *, modality: str
    ) -> tuple[AnnData, list[Exclusion]]:
        del modality
        clock.sleep(scan * len(scans))
        return _random(spec, [x.patient_id for x in scans]), []

    def extract_counts(
        path: Path, spec: Any, *, patient_ids: Sequence[str], modality: str
    ) -> tuple[AnnData, list[Exclusion]]:
        del path, modality
        clock.sleep(counts)
        return _random(spec, patient_ids), []

    with (
        patch("flows.embedding.extract_over", extract_over),
        patch.multiple(
            "flows.extraction", extract_scans=extract_scans, extract_counts=extract_counts
        ),
    ):
        yield


def _random(spec: Any, patient_ids: Sequence[str]) -> AnnData:
    values = np.random.default_rng(len(patient_ids)).normal(size=(len(patient_ids), _N_FEATURES))
    return feature_table(
        patient_ids,
        [f"feature_{i}" for i in range(_N_FEATURES)],
        values,
        input_digests=["0" * 64] * len(patient_ids),
        spec_fingerprint=spec.fingerprint(),
    )


def by_flow(root: Path) -> None:
    """Prepare the site as its deployment does."""
    del root  # found by CONSILIUM_ROOT
    from flows.site import prepare_site

    prepare_site(STUDY, SITE)


def by_loop(root: Path) -> None:
    """Do the same work with as many threads and no Prefect."""
    from flows import site as at
    from flows.extraction import collect, extract_batch

    settings, protocol = at.open_site(STUDY, SITE)
    registry, excluded = at.read_site_registry.fn(settings, protocol)
    works, unlisted = at.list_inputs.fn(settings, protocol)
    turns = sorted((n, i, work) for i, work in enumerate(works) for n in range(len(work.pending)))
    with ThreadPoolExecutor(N_THREADS) as pool:
        batches = [(work.pending[n], work.spec, work.features) for n, _, work in turns]
        faults = list(pool.map(lambda batch: extract_batch(*batch), batches))
    tables = {work.modality: table for work in works if (table := collect(work)) is not None}
    at.write_exclusions([*excluded, *unlisted, *(x for y in faults for x in y)], root / at.EXCLUDED)
    at.assemble_cohort.fn(settings, protocol, registry, tables)


def timers_alone(n_patients: int, per_input_s: float, batch_size: int = 64) -> float:
    """Seconds that the batches wait on as many threads, if nothing else took any time."""
    each = [min(batch_size, n_patients - at) for at in range(0, n_patients, batch_size)]
    threads = [0.0] * N_THREADS
    for n in [1, *(n for n in each for _ in ("slides", "scans"))]:
        heapq.heapreplace(threads, threads[0] + n * per_input_s)
    return max(threads)


def empty(root: Path) -> None:
    """Take away whatever a night made."""
    shutil.rmtree(root / "features", ignore_errors=True)
    for name in ("cohort.h5mu", "assignments.csv", "excluded.csv"):
        (root / name).unlink(missing_ok=True)


def _seconds(work: Callable[[], object]) -> float:
    started = clock.perf_counter()
    work()
    return clock.perf_counter() - started


def first_nights(root: Path, *, per_input_s: float, repeats: int) -> Figures:
    """Seconds of a site's first night by flow and by plain loop, one after the other."""
    found: dict[str, list[float]] = {"cold_flow_s": [], "by_flow_s": [], "by_loop_s": []}
    with prefect_server(root / "prefect") as server:
        connect(server, root)
        import flows.site  # noqa: F401

        server.wait_ready()
        with timers(slide=per_input_s, scan=per_input_s, counts=per_input_s):
            # Prefect's first run of a process pays for imports and connections.
            found["cold_flow_s"].append(_seconds(lambda: by_flow(root)))
            for _ in range(repeats):
                for name, night in (("by_flow_s", by_flow), ("by_loop_s", by_loop)):
                    empty(root)
                    found[name].append(_seconds(lambda night=night: night(root)))  # type: ignore[misc]
    return {name: [round(x, 3) for x in values] for name, values in found.items()}


@dataclass(frozen=True)
class Timed:
    """A whole command: seconds, those of processors with its server's, inputs extracted."""

    wall_s: float
    cpu_s: float
    n_extracted: int


def night(root: Path) -> Timed:
    """Time the whole command ``consilium site prepare``; new inputs take realistic times."""
    here = str(Path(__file__).resolve().parent)
    ours = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    command = [sys.executable, "-W", "ignore", "-c", _NIGHT, here, str(root)]
    before_s = _children_s()
    wall_s = _seconds(
        lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ours)
    )
    told = read_night(Workspace(root=root).site(SITE))
    assert told is not None
    return Timed(wall_s, _children_s() - before_s, told.n_extracted)


def _children_s() -> float:
    """Processor seconds of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def study(arguments: argparse.Namespace) -> Figures:
    """Run the benchmark that the command line asks for."""
    with TemporaryDirectory(prefix="consilium-") as folder:
        root = Path(folder) / "site"
        write_site(root, arguments.patients)
        per_input_s = arguments.milliseconds / 1000
        first = first_nights(root, per_input_s=per_input_s, repeats=arguments.repeat)
        unchanged: list[Timed] = []
        one_new: list[Timed] = []
        for i in range(arguments.repeat):
            unchanged.append(night(root))
            add_patient(root, arguments.patients + i)
            one_new.append(night(root))
    return _figures(arguments, first, unchanged, one_new)


def _figures(
    arguments: argparse.Namespace,
    first: Figures,
    unchanged: list[Timed],
    one_new: list[Timed],
) -> Figures:
    flow_s, loop_s = (statistics.median(first[x]) for x in ("by_flow_s", "by_loop_s"))
    timers_s = timers_alone(arguments.patients, arguments.milliseconds / 1000)
    nights = {"unchanged": unchanged, "one_new_patient": one_new}
    unchanged_s, one_new_s = (statistics.median(x.wall_s for x in y) for y in nights.values())
    own_s = sum(_OWN_S.values())
    return {
        "benchmark": "orchestration",
        "patients": arguments.patients,
        "overhead": round(flow_s / loop_s - 1, 4),
        "timers_alone_s": round(timers_s, 3),
        "unchanged_s": round(unchanged_s, 2),
        "one_new_patient_s": round(one_new_s, 2),
        "own_extraction_s": own_s,
        "one_new_patient_ratio": round((one_new_s - unchanged_s) / own_s, 3),
        "targets": {"overhead": 0.05, "unchanged_s": 20, "one_new_patient_s": 2 * own_s + 20},
        "cpu_s": {
            name: round(statistics.median(x.cpu_s for x in found), 2)
            for name, found in nights.items()
        },
        "extracted": {name: [x.n_extracted for x in found] for name, found in nights.items()},
        "raw": first
        | {f"{name}_s": [round(x.wall_s, 2) for x in found] for name, found in nights.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and print one JSON object."""
    parser = argparse.ArgumentParser(description="What a site's night costs beside extraction.")
    parser.add_argument("--patients", type=whole(1), default=500, help="of the site")
    parser.add_argument("--milliseconds", type=whole(0), default=50, help="for each slide or scan")
    parser.add_argument("--repeat", type=whole(1), default=3, help="of timings; medians are shown")
    parser.add_argument("--json", action="store_true", help="the only form there is")
    return run(parser, study, arguments)


if __name__ == "__main__":
    sys.exit(main())
