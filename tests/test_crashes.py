"""Kills of a night's processes: what was extracted stays, and only batches in flight begin again.

The extractor of scans is a timer that notes what it begins and ends, in whatever process it runs;
all else is real, down to the signals.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import pytest

from flows.demo import template
from flows.services import ServiceError, free_port
from modalities.cohort import read_patient_ids
from tests.topology import PartyHere, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SITE, BATCH = "site-01", 2
_STUDY = """
schema_version = 1
[study]
name = "nightly"
data = "simulated"
horizon_days = 730
grid_days = [365, 730]
[modality.clinical]
kind = "clinical"
numeric = ["age"]
[modality.scans]
kind = "radiology"
"""
_STUB = """
import importlib.abc, importlib.util, os, sys, time

def note(what, batch):
    ids = " ".join(row.patient_id for row in batch.rows)
    with open(os.environ["NIGHT_LOG"], "a") as log:
        log.write(f"{what} {os.getpid()} {ids}\\n")

def instead(module):
    real = module.extract_batch

    def extract_batch(batch, spec, features, **means):
        note("begin", batch)
        faults = real(batch, spec, features, **means)
        note("end", batch)
        return faults

    def extract_scans(scans, spec, *, modality):
        time.sleep(0.5 * len(scans))
        ids = [scan.patient_id for scan in scans]
        about = {"input_digests": ids, "spec_fingerprint": spec.fingerprint()}
        values = module.np.arange(2.0 * len(ids)).reshape(-1, 2)
        return module.feature_table(ids, ["a", "b"], values, **about), []

    module.extract_batch, module.extract_scans = extract_batch, extract_scans

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "flows.extraction":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), instead(module))
        return spec

if "NIGHT_LOG" in os.environ:
    sys.meta_path.insert(0, Finder())
"""


@dataclass
class Noted:
    """What extraction wrote down: batches that began and ended, and in which process."""

    began: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    ended: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def in_flight(self) -> set[str]:
        """Patients of batches that began and did not end."""
        return {x for _, ids in self.began for x in ids} - self.done

    @property
    def done(self) -> set[str]:
        return {x for ids in self.ended for x in ids}


class Hospital:
    """A site whose scans are files of a few bytes."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log = folder / "site", folder / "night.log"
        stub = folder / "stub"
        for made in (stub, self.root / "raw"):
            made.mkdir(parents=True)
        (stub / "sitecustomize.py").write_text(_STUB)
        (self.root / "study.toml").write_text(_STUDY)
        text = template("site.toml").format(name=SITE, secret="0" * 64)
        (self.root / "site.toml").write_text(
            text.replace("batch_size = 64", f"batch_size = {BATCH}")
        )
        (self.root / "manifest.csv").write_text("patient_id,modality,path,mask_path,roi\n")
        (self.root / "clinical.csv").write_text("patient_id,event,time_days,age\n")
        self.environment = {
            "NIGHT_LOG": str(self.log),
            "PYTHONPATH": os.pathsep.join([str(stub), os.environ.get("PYTHONPATH", "")]),
            "OPENBLAS_NUM_THREADS": "1",
            "CONSILIUM_PREFECT_PORT": str(free_port()),
            "CONSILIUM_MLFLOW_PORT": str(free_port()),
        }
        self.n = 0
        self.forgiven: set[str] = set()  # patients whose batch was in flight at some kill

    def add(self, n: int) -> None:
        """Let so many patients come."""
        manifest, registry = self.root / "manifest.csv", self.root / "clinical.csv"
        for i in range(self.n, self.n + n):
            (self.root / f"raw/{i}.nii.gz").write_text(f"scan of {i}")
            (self.root / f"raw/{i}.mask.nii.gz").write_text(f"mask of {i}")
            row = f"p{i},scans,raw/{i}.nii.gz,raw/{i}.mask.nii.gz,\n"
            manifest.write_text(manifest.read_text() + row)
            registry.write_text(registry.read_text() + f"p{i},{i % 2},{100 + i},{40 + i}\n")
        self.n += n

    def noted(self) -> Noted:
        found = Noted()
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        for what, pid, *ids in (line.split() for line in lines):
            if what == "begin":
                found.began.append((int(pid), tuple(ids)))
            else:
                found.ended.append(tuple(ids))
        return found

    def kill_within(self, whom: Callable[[int], int]) -> Noted:
        """Kill somebody once a new batch was done and others are in flight; say what was done.

        Parameters
        ----------
        whom
            Process to kill, by that of the flow.
        """
        before = len(self.noted().ended)
        deadline = time.monotonic() + 240
        while len((now := self.noted()).ended) == before or not now.in_flight:
            assert time.monotonic() < deadline, "no batch was done"
            time.sleep(0.05)
        os.kill(whom(now.began[-1][0]), signal.SIGKILL)
        time.sleep(0.3)
        return self.noted()

    def require_nothing_done_twice(self, at_kill: Noted) -> None:
        """Nothing is lost, and no batch that had ended by the kill began again."""
        now = self.noted()
        again = {x for _, ids in now.began[len(at_kill.began) :] for x in ids}
        assert not again & at_kill.done
        assert len(at_kill.in_flight) <= 2 * BATCH  # of two threads
        counted = Counter(x for _, ids in now.began for x in ids)
        assert {x for x, n in counted.items() if n > 1} <= at_kill.in_flight | self.forgiven
        self.forgiven |= at_kill.in_flight
        everybody = {f"p{i}" for i in range(self.n)}
        assert set(ad.read_h5ad(self.root / "features/scans.h5ad").obs_names) == everybody
        assert read_patient_ids(self.root / "cohort.h5mu") == everybody
        assert not list(self.root.rglob("features/.partial-*"))


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    found = Hospital(tmp_path)
    found.add(10)
    return found


@contextmanager
def served(hospital: Hospital) -> Iterator[PartyHere]:
    party = PartyHere(hospital.root, hospital.environment)
    party.start()
    try:
        party.wait_ready()
        yield party
    finally:
        party.stop()


def prepare(hospital: Hospital) -> subprocess.Popen[bytes]:
    command = "from flows.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", command, "site", "prepare"],
        cwd=hospital.root,
        env={**os.environ, **hospital.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_a_command_that_was_killed_goes_on_where_it_stopped(hospital: Hospital) -> None:
    first = prepare(hospital)
    at_kill = hospital.kill_within(lambda pid: pid)
    assert first.wait(60) == -signal.SIGKILL
    assert prepare(hospital).wait(300) == 0
    hospital.require_nothing_done_twice(at_kill)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def program(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def worker_of(flow: int) -> int:
    """The worker above a run's process."""
    pid = parent(flow)
    while "worker-process" not in program(pid):
        assert pid > 1
        pid = parent(pid)
    return pid


def server_of(party: PartyHere) -> int:
    """Prefect's server below the party's services."""
    found = [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if entry.joinpath("stat").exists()
        and parent(int(entry.name)) == party.services.pid
        and "flows.service_programs prefect" in program(int(entry.name))
    ]
    (pid,) = found
    return pid


def completes(party: PartyHere, run: str) -> bool:
    """Whether a run completes in the end, begun again after its crash by nobody."""

    def done() -> bool:
        try:
            return bool(party.api.get(f"/flow_runs/{run}")["state"]["type"] == "COMPLETED")
        except ServiceError:  # the server was killed
            return False

    return until(done, 300)


def _without_training(party: PartyHere) -> None:
    """Ten new patients would have encoders trained, which costs time and is not looked at."""
    for found in party.api.post("/automations/filter", {}):
        if found["name"].startswith("train-encoders"):
            kept = ("name", "description", "trigger", "actions")
            wanted = {x: found[x] for x in kept} | {"enabled": False}
            party.api.put(f"/automations/{found['id']}", wanted)


def test_a_killed_run_worker_or_server_costs_the_batches_in_flight(hospital: Hospital) -> None:
    with served(hospital) as party:
        party.consilium("deploy")
        _without_training(party)
        kills: dict[str, Callable[[int], int]] = {
            "run": lambda pid: pid,
            "worker": worker_of,
            "server": lambda _: server_of(party),
        }
        for who, whom in kills.items():
            run = party.begin(f"prepare-site/{SITE}")
            at_kill = hospital.kill_within(whom)
            assert completes(party, run), (who, party.logs())
            hospital.require_nothing_done_twice(at_kill)
            hospital.add(6)
