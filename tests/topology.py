"""Two hospitals and a coordinator as they run every day: each its own servers, on PostgreSQL."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from flows.policy import POLICY_FILE
from flows.prefect_api import PrefectApi
from flows.serve import running
from flows.services import ServiceError, free_port
from tests.federated import end_services, plain_folder
from tests.postgres import postgres_server
from tests.test_canary import TABLES, plant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from flows.serve import Services
    from tests.test_canary import Planted

SIZES = (110, 100)
_COMMAND = [sys.executable, "-W", "ignore", "-c", "from flows.cli import main; main()"]
_TERMINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
QUORUM = 2
# What a hundred patients of a site reach is chance; promotion is to be seen, not the model.
_GATES = """
[gates]
min_concordance = 0.3
max_champion_loss = 0.3
min_calibration_slope = 0.2
max_calibration_slope = 3
min_observed_expected = 0.3
max_observed_expected = 3
"""
# Lets a party's programs read another policy than the one of this checkout.
_OWN_POLICY = """
import importlib.abc, importlib.util, os, sys
from pathlib import Path

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "flows.policy":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def then(module):
            run(module)
            module.read_policy.__defaults__ = (Path(os.environ["OWN_POLICY"]),)

        spec.loader.exec_module = then
        return spec

if "OWN_POLICY" in os.environ:
    sys.meta_path.insert(0, Finder())
"""


@dataclass
class PartyHere:
    """One party: its folder, what its commands find in the environment, its services."""

    root: Path
    environment: dict[str, str]
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    federation: subprocess.Popen[bytes] | None = None
    services: Services = field(init=False)

    def consilium(self, *arguments: str | Path, check: bool = True) -> str:
        """Run a command in the party's folder; give what it printed."""
        done = subprocess.run(
            [*_COMMAND, *map(str, arguments)],
            cwd=self.root,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def api(self) -> PrefectApi:
        """The party's Prefect server."""
        return PrefectApi(self.services.prefect_api, self.services.prefect_auth)

    def start(self) -> None:
        """Begin to serve."""
        (self.root / "logs").mkdir(exist_ok=True)
        with (self.root / "logs/serve.log").open("wb") as output:
            self.process = subprocess.Popen(
                [*_COMMAND, "serve", *self.options],
                cwd=self.root,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, within_s: float = 180.0) -> None:
        """Wait until the services run."""
        deadline = time.monotonic() + within_s
        while (found := running(self.root)) is None:
            assert self.process is not None
            told = (self.root / "logs/serve.log").read_text()
            assert self.process.poll() is None, told
            assert time.monotonic() < deadline, told
            time.sleep(0.2)
        self.services = found

    def stop(self) -> None:
        """End the services as a system that shuts down does."""
        if self.process is not None:
            end([self.process])

    def begin(self, deployment: str, **parameters: Any) -> str:
        """Start a deployment's run, as its page does; give the run's id."""
        found = self.api.get(f"/deployments/name/{deployment}")
        made = self.api.post(
            f"/deployments/{found['id']}/create_flow_run",
            {"parameters": {**found["parameters"], **parameters}},
        )
        return str(made["id"])

    def wait(self, run: str, *states: str, within_s: float = 240.0) -> dict[str, Any]:
        """Wait until a run is in one of these states, or has ended; give the state."""
        wanted = set(states) or _TERMINAL
        state: dict[str, Any] = {}

        def reached() -> bool:
            try:
                state.update(self.api.get(f"/flow_runs/{run}")["state"])
            except ServiceError:  # a server under load
                return False
            return state["type"] in wanted | _TERMINAL

        assert until(reached, within_s), (state, self.logs())
        return state

    def ends(self, run: str, name: str) -> dict[str, Any]:
        """Wait until a run has ended in a state of this name; give the state."""
        state = self.wait(run)
        assert state["name"] == name, (state, self.logs())
        return state

    def runs(self, flow: str) -> list[dict[str, Any]]:
        """Every run of a flow."""
        found: list[dict[str, Any]] = self.api.post(
            "/flow_runs/filter", {"flows": {"name": {"any_": [flow]}}}
        )
        return found

    def whole_logs(self) -> str:
        """Everything that the party's services wrote down."""
        return "\n".join(x.read_text(errors="replace") for x in self.root.glob("logs/*.log"))

    def artifact(self, run: str, key: str) -> dict[str, Any]:
        """Something that a run published; a run that waited published it again."""
        asked = {"artifacts": {"flow_run_id": {"any_": [run]}, "key": {"any_": [key]}}}
        found: list[dict[str, Any]] = self.api.post("/artifacts/filter", asked)
        assert found, (run, key)
        return found[-1]

    def grow(self, n: int) -> None:
        """Let patients come: each like one who is there, with everything that can be known."""
        manifest = self.root / "manifest.csv"
        listed = _table(manifest)
        listed = listed[listed["modality"].isin(TABLES)]
        known = [set(of["patient_id"]) for _, of in listed.groupby("modality")]
        new = {old: f"{old}-too" for old in sorted(set.intersection(*known))[:n]}
        assert len(new) == n
        _repeat(manifest, new, listed)
        for path in {"clinical.csv", *listed["path"]}:
            _repeat(self.root / path, new, _table(self.root / path))

    def logs(self) -> str:
        """Last lines of the party's own logs."""
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}"
            for file in sorted(self.root.glob("logs/*.log"))
        )


@dataclass
class Topology:
    """All parties of a consortium, each served on its own."""

    coordinator: PartyHere
    sites: dict[str, PartyHere]
    planted: Planted

    @property
    def parties(self) -> list[PartyHere]:
        """Coordinator first."""
        return [self.coordinator, *self.sites.values()]


def _table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def _repeat(path: Path, new: Mapping[str, str], rows: pd.DataFrame) -> None:
    """Add rows to a table, under new names of their patients."""
    more = rows[rows["patient_id"].isin(new)].copy()
    more["patient_id"] = more["patient_id"].map(new)
    pd.concat([_table(path), more]).to_csv(path, index=False)


def side_by_side(do: Callable[[PartyHere], object], parties: Sequence[PartyHere]) -> None:
    """Do something at several parties at once."""
    with ThreadPoolExecutor(len(parties)) as pool:
        list(pool.map(do, parties))


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask all to end at once, and make those that do not."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 40
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(holds: Callable[[], bool], within_s: float) -> bool:
    """Whether something comes to hold in time."""
    deadline = time.monotonic() + within_s
    while not (now := holds()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return now


@contextmanager
def topology(schedules: Mapping[str, Mapping[str, str]], *, workers: int) -> Iterator[Topology]:
    """Set a consortium up by the commands that its people type, and serve every party.

    Parameters
    ----------
    schedules
        Per party, ``site`` or ``coordinator``, times by flow instead of those of the file.
    workers
        Of the coordinator, at once.
    """
    with plain_folder() as folder, ExitStack() as stack:
        stack.enter_context(_ending_services(folder))
        database = stack.enter_context(postgres_server(folder, max_connections=300))
        names, planted = _write_files(folder)
        times = dict.fromkeys(names, schedules["site"])
        parties = {
            name: _party(folder / name, database, times.get(name, schedules["coordinator"]))
            for name in ("coordinator", *names)
        }
        parties["coordinator"].environment["CONSILIUM_WORKERS"] = str(workers)
        parties["coordinator"].environment |= _policy(folder)
        found = Topology(parties.pop("coordinator"), parties, planted)
        for party in found.parties:
            stack.callback(party.stop)
            party.start()
        _provision(found)
        stack.enter_context(_federation(found))
        for party in found.parties:
            party.wait_ready()
        yield found


@contextmanager
def _ending_services(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        end_services(folder.glob("*/kits/*"))


def _write_files(folder: Path) -> tuple[tuple[str, ...], Planted]:
    """Write raw files full of identifiers, and the study beside each party's."""
    from flows.demo import write_consortium

    names = write_consortium(folder, SIZES, seed=7, tables_only=True)
    planted = plant(folder, names)
    study = (folder / "study.toml").read_text() + _GATES
    home = folder / "coordinator"
    home.mkdir()
    for name in (*names, "coordinator"):
        (folder / name / "study.toml").write_text(study)
    return names, planted


def _party(root: Path, database: str, schedules: Mapping[str, str]) -> PartyHere:
    server = database.rpartition("/")[0]
    return PartyHere(
        root,
        {
            "CONSILIUM_DATABASE_URL": f"{server}/{root.name.replace('-', '_')}",
            "CONSILIUM_PREFECT_PORT": str(free_port()),
            "CONSILIUM_MLFLOW_PORT": str(free_port()),
            "CONSILIUM_SCHEDULES": json.dumps(dict(schedules)),
            "OPENBLAS_NUM_THREADS": "1",
        },
    )


def _policy(folder: Path) -> dict[str, str]:
    """Write the coordinator's policy, which asks for two approvals; its programs read that one."""
    code = folder / "policy"
    code.mkdir()
    (code / "sitecustomize.py").write_text(_OWN_POLICY)
    text = POLICY_FILE.read_text()
    assert "quorum: 1 " in text
    (code / POLICY_FILE.name).write_text(text.replace("quorum: 1 ", f"quorum: {QUORUM} "))
    path = [str(code), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"OWN_POLICY": str(code / POLICY_FILE.name), "PYTHONPATH": os.pathsep.join(path)}


def _provision(found: Topology) -> None:
    """Keys, kits and approvals, each made where it is made between hospitals."""
    home = found.coordinator.root
    keys = home / "pubs"
    keys.mkdir()
    for name, site in found.sites.items():
        site.consilium("site", "key")
        shutil.copy(site.root / "identity.pub", keys / f"{name}.pub")
    found.coordinator.consilium(
        *("federation", "provision", "study.toml", "--sites", ",".join(found.sites)),
        *("--keys", keys, "--port", str(free_port())),
    )
    approvals = home / "coordinator/approvals"
    approvals.mkdir(parents=True)
    for name, site in found.sites.items():
        shutil.move(home / "kits" / name, site.root / "kits" / name)
        site.consilium("site", "approve", "--kit", site.root / "kits" / name)
        shutil.copy(site.root / "approvals" / f"{name}.json", approvals)


@contextmanager
def _federation(found: Topology) -> Iterator[None]:
    """Every party's end of the federation, as `consilium federation start` runs it."""
    try:
        for name, party in {"coordinator": found.coordinator, **found.sites}.items():
            home = [] if name == "coordinator" else ["--site-home", party.root]
            arguments = ["federation", "start", "--kit", party.root / "kits" / name, *home]
            with (party.root / "logs/federation.log").open("wb") as output:
                party.federation = subprocess.Popen(
                    [*_COMMAND, *map(str, arguments)],
                    cwd=party.root,
                    env={**os.environ, **party.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        yield
    finally:
        started = [y for x in found.parties for y in (x.federation, x.process)]
        end([x for x in started if x is not None])
