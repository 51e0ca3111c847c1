"""A small simulated consortium that runs over the federation engine, for tests of the border."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import ssl
import tempfile
import threading
import time
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from fusion import messages as m
from fusion.federation.consortium import CONSORTIUM_FILE, COORDINATOR, read_consortium
from fusion.federation.plan import CALIBRATION_SLOPE, PROTOCOL
from fusion.federation.private_fitting import OPENING
from infra.provision import ADMIN, set_home
from infra.settings import STUDY_FILE, Workspace

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import pytest

    from flows.links import OverEngine
    from flows.protocol import StudyProtocol
    from fusion.federation import FederationPlan, Fitted, RoundRecord
    from infra.settings import SiteSettings

    Heard = list[tuple[m.Message, dict[str, m.Message]]]

T = TypeVar("T")
SIZES = (110, 100, 90)
TIMEOUT_S = 60.0


def eventually(holds: Callable[[], bool], within_s: float = 30.0) -> bool:
    deadline = time.monotonic() + within_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def children(pid: int) -> list[int]:
    """Ids of a process's children."""
    listed = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in listed for child in file.read_text().split()]


def services_of(kit: Path) -> list[int]:
    """Ids of the engine's services that run from a site's kit."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if str(kit) in words and "nvflare.private.fed.app.client.client_train" in words:
                found.append(int(process.name))
    return found


def end_services(kits: Iterable[Path]) -> None:
    """End what a party that was killed left running."""
    for pid in [pid for kit in kits for pid in services_of(kit)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _begun(pid: int) -> int:
    """Tell when a process began, in ticks."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def prepared_consortium(
    root: Path, sizes: Sequence[int] = SIZES, *, more: str = ""
) -> tuple[str, ...]:
    """Simulate a study of tables with secure sums, to where a run can begin; give its sites.

    Parameters
    ----------
    more
        Sections of its protocol.
    """
    from flows.demo import write_consortium
    from flows.protocol import load_protocol

    sites = write_consortium(root, sizes, seed=7, tables_only=True, secure_sum=True)
    study = root / STUDY_FILE
    timeout = f"[federation]\ntimeout_s = {TIMEOUT_S}\n"
    study.write_text(study.read_text().replace("[federation]\n", timeout) + more)
    protocol = load_protocol(study)
    for site in sites:
        prepare_site(Workspace(root=root).site(site), protocol)
    return sites


def prepare_site(settings: SiteSettings, protocol: StudyProtocol) -> None:
    """Do what the site's flows do, without their server, and with encoders that are none."""
    from flows import site as flow
    from flows.extraction import collect, extract_batch
    from flows.loading import encoder_key, load_inputs

    registry, _ = flow.read_site_registry.fn(settings, protocol)
    works, _ = flow.list_inputs.fn(settings, protocol)
    for work in works:
        for batch in work.pending:
            extract_batch(batch, work.spec, work.features)
    tables = {work.modality: table for work in works if (table := collect(work)) is not None}
    flow.assemble_cohort.fn(settings, protocol, registry, tables)
    inputs = load_inputs(settings, protocol)
    for name, found in inputs.modalities.items():
        folder = settings.path("encoders", name)
        folder.mkdir(parents=True)
        values = np.nan_to_num(np.asarray(found.values, dtype=np.float64))
        np.save(folder / "log_hazard.npy", values[:, :3].sum(axis=1))
        about = {"key": encoder_key(inputs.cohort, protocol, name), "reason": "", "trained": False}
        (folder / "encoder.json").write_text(json.dumps(about))


@dataclass
class Loopback:
    """All parties of a consortium as processes on this machine.

    Attributes
    ----------
    decrypted
        Sites whose traffic the wire reads in the clear.
    """

    root: Path
    protocol: StudyProtocol
    kits: Mapping[str, Path]
    pids: dict[str, int]
    wire: Wire
    decrypted: set[str] = field(default_factory=set)
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def workspace(self) -> Workspace:
        return Workspace(root=self.root)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(sorted(self.pids.keys() - {COORDINATOR}))

    @contextmanager
    def link(self) -> Iterator[OverEngine]:
        """Begin a job."""
        from flows.federated import federation
        from flows.links import OverEngine

        if self.pids:  # else they are another process's
            assert eventually(lambda: not children(self.service(COORDINATOR)))  # of the last job
        with federation(self.workspace, self.protocol) as engine:
            yield OverEngine(engine, self.workspace, self.protocol)

    def charged(self) -> dict[str, int]:
        return {site: charged(self.root / site / "answered.jsonl") for site in self.sites}

    def start(self, party: str) -> None:
        """Start a party that was killed."""
        from flows import parties

        log = self.root / "logs" / f"{party}.log"
        process = parties._start_process(self.kits[party], log)
        self._started.append(process)
        self.pids[party] = process.pid
        assert eventually(lambda: parties.CONNECTED in log.read_text())

    def stop(self) -> None:
        """End what was started again."""
        from flows import parties

        parties._stop_processes(self._started)

    def service(self, party: str) -> int:
        """Id of the engine's service that a party runs; it comes back when it dies."""
        assert eventually(lambda: bool(children(self.pids[party])))
        return children(self.pids[party])[0]

    def services(self, party: str) -> list[int]:
        """Ids of all services that run from a party's kit, whoever started them."""
        return services_of(self.kits[party])

    def job(self, party: str) -> int:
        """Id of the process of the job that runs at a party."""
        assert eventually(lambda: bool(children(self.service(party))))
        return max(children(self.service(party)), key=_begun)  # an earlier one may still be ending

    def log(self, party: str) -> str:
        files = [self.kits[party] / name for name in ("log.txt", "engine.log")]
        return "".join(file.read_text() for file in files if file.exists())


class Wire:
    """What lies between sites and coordinator: it writes down all that passes, and can be cut.

    Parameters
    ----------
    port
        Where it leads.
    heard
        File of everything that passes, in both directions.
    kits
        Start-up kits, to read what passes in the clear: the wire then ends the sites' encryption
        in the coordinator's name, and goes on in each site's. Without them it only passes bytes.
    ends
        Names of those who have a port of their own here, and can be cut off alone.
    """

    def __init__(
        self,
        port: int,
        heard: Path,
        kits: Mapping[str, Path] | None = None,
        *,
        ends: Iterable[str] = ("",),
    ) -> None:
        self._target, self._kits = port, kits
        self._heard = heard.open("ab")
        self._loop = asyncio.new_event_loop()
        self._servers: list[asyncio.Server] = []
        self._open: dict[asyncio.StreamWriter, str] = {}
        self._cut: set[str] = set()
        self.parties: set[str] = set()
        self.ports = dict.fromkeys(ends, 0)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._heard.close()

    def cut(self, *ends: str) -> None:
        """Drop every connection of these ends, of all where none is named; let none through."""
        self._cut |= set(ends or self.ports)
        asyncio.run_coroutine_threadsafe(self._drop(), self._loop).result(10)

    def mend(self) -> None:
        """Let connections through again."""
        self._cut.clear()

    async def _listen(self) -> None:
        context = None if self._kits is None else _context(self._kits[COORDINATOR], "server")
        for end in self.ports:
            passing = partial(self._pass, end)
            server = await asyncio.start_server(passing, "127.0.0.1", 0, ssl=context)
            self._servers.append(server)
            self.ports[end] = int(server.sockets[0].getsockname()[1])

    async def _drop(self) -> None:
        for writer, end in tuple(self._open.items()):
            if end in self._cut:
                writer.transport.abort()

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        self._cut |= set(self.ports)
        await self._drop()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pass(
        self, end: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if end in self._cut:
            writer.transport.abort()
            return
        context = None
        if self._kits is not None:
            subject = dict(x[0] for x in writer.get_extra_info("peercert")["subject"])
            self.parties.add(subject["commonName"])
            context = _context(self._kits[subject["commonName"]], "client")
        name = None if context is None else "localhost"
        try:
            onward = await asyncio.open_connection(
                "127.0.0.1", self._target, ssl=context, server_hostname=name
            )
        except OSError:  # the server is not there, or was killed
            writer.transport.abort()
            return
        await asyncio.gather(self._pump(end, reader, onward[1]), self._pump(end, onward[0], writer))

    async def _pump(
        self, end: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._open[writer] = end
        try:
            while data := await reader.read(1 << 16):
                self._heard.write(data)
                writer.write(data)
                await writer.drain()
        except OSError:  # an end is gone
            pass
        finally:
            self._open.pop(writer, None)
            writer.transport.abort()


def _context(kit: Path, end: str) -> ssl.SSLContext:
    """Speak as a kit's party does."""
    startup = kit / "startup"
    purpose = ssl.PROTOCOL_TLS_SERVER if end == "server" else ssl.PROTOCOL_TLS_CLIENT
    context = ssl.SSLContext(purpose)
    context.load_verify_locations(startup / "rootCA.pem")
    context.load_cert_chain(startup / f"{end}.crt", startup / f"{end}.key")
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    return context


def port_of(kits: Mapping[str, Path]) -> int:
    """Port on which the coordinator of these kits listens."""
    config = json.loads((kits[COORDINATOR] / "startup" / "fed_server.json").read_text())
    return int(config["servers"][0]["admin_port"])


def lead_through(wire: Wire, kits: Mapping[str, Path]) -> None:
    """Let the sites of these kits find the wire where they look for the coordinator."""
    own = port_of(kits)
    for name, port in wire.ports.items():
        file = kits[name] / "startup" / "fed_client.json"
        file.write_text(file.read_text().replace(f"localhost:{own}", f"localhost:{port}"))


@contextmanager
def loopback(root: Path, *, overhear: bool = False) -> Iterator[Loopback]:
    """Start all parties of a prepared consortium, with a wire between.

    What passes is written to ``wire``; with ``overhear`` also what it says, to ``wire-opened``.
    """
    from flows.demo import set_up_federation
    from flows.parties import start_parties
    from flows.protocol import load_protocol

    kits = set_up_federation(root, Workspace(root=root).site_names())
    with ExitStack() as stack:
        port, decrypted = port_of(kits), set[str]()
        if overhear:
            opened = stack.enter_context(Wire(port, root / "wire-opened", kits))
            (port,), decrypted = opened.ports.values(), opened.parties
        sites = kits.keys() - {COORDINATOR, ADMIN}
        wire = stack.enter_context(Wire(port, root / "wire", ends=sites))
        lead_through(wire, kits)
        stack.callback(end_services, kits.values())  # after the parties were stopped
        pids = stack.enter_context(start_parties(kits, logs=root / "logs"))
        found = Loopback(root, load_protocol(root / STUDY_FILE), kits, pids, wire, decrypted)
        stack.callback(found.stop)
        yield found


@contextmanager
def plain_folder() -> Iterator[Path]:
    """Give a folder whose name holds nothing that the engine cannot use; pytest's may."""
    folder = Path(tempfile.mkdtemp(prefix="consilium-test-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def shared(config: pytest.Config, name: str, make: Callable[[], AbstractContextManager[T]]) -> T:
    """Make something once for all test files, and end it with them."""
    made: dict[str, T] = config.__dict__.setdefault("_consilium_shared", {})
    if name not in made:
        stack = ExitStack()
        config.add_cleanup(stack.close)
        made[name] = stack.enter_context(make())
    return made[name]


@contextmanager
def running() -> Iterator[Loopback]:
    """Prepare a consortium and start its parties."""
    with plain_folder() as folder:
        prepared_consortium(folder)
        with loopback(folder) as parties:
            yield parties


@dataclass(frozen=True)
class Clean:
    """A run that nobody disturbed, over the engine, and the same run in this process.

    Attributes
    ----------
    charged
        Per site the lines of its ledger of answers.
    """

    run: str
    over_engine: Fitted
    in_process: Fitted
    rounds: list[RoundRecord]
    engine_round_s: float
    charged: dict[str, int]
    overheard: list[Heard]


@contextmanager
def undisturbed(parties: Loopback) -> Iterator[Clean]:
    """Run the study of a consortium whose parties have done nothing yet."""
    from flows.links import InMemory
    from fusion.federation import run_federation

    inside = InMemory(parties.workspace, parties.protocol, parties.sites)
    plan = parties.protocol.plan(inside.run_key())
    inside.open(plan)
    expected = run_federation(plan, inside)
    rounds: list[RoundRecord] = []
    with parties.link() as link:
        run = link.run_key()
        faults = Faults(link)
        found = run_federation(parties.protocol.plan(run), faults, on_round=rounds.append)
        engine_round_s = link.time_engine(found)["engine_round_s"]
    yield Clean(run, found, expected, rounds, engine_round_s, parties.charged(), faults.heard)


@contextmanager
def another_study(parties: Loopback, *, more: str) -> Iterator[Loopback]:
    """Lead the kits of the same parties to another protocol's folder, for as long as this lasts.

    Parameters
    ----------
    more
        Sections of the protocol.
    """
    from flows.approvals import FOLDER, write_approval
    from flows.demo import KITS
    from flows.gate import approve_at
    from flows.protocol import load_protocol

    with plain_folder() as root:
        sites = prepared_consortium(root, more=more)
        for party in (*sites, COORDINATOR):
            for key in (parties.root / party).glob("identity.*"):
                (root / party).mkdir(exist_ok=True)
                shutil.copy2(key, root / party)
        (root / KITS).symlink_to(parties.root / KITS)
        consortium = read_consortium(parties.kits[COORDINATOR] / CONSORTIUM_FILE)
        for site in sites:
            approval = approve_at(root, site, consortium, say=lambda _: None)
            write_approval(approval, root / COORDINATOR / FOLDER)
            set_home(parties.kits[site], root)
        try:
            yield replace(parties, root=root, protocol=load_protocol(root / STUDY_FILE))
        finally:
            for site in sites:
                set_home(parties.kits[site], parties.root)


def charged(ledger: Path) -> int:
    """Count what a site was charged for the model; test rows tell a slope at ever other points."""
    return sum(CALIBRATION_SLOPE not in line for line in ledger.read_text().splitlines())


def fits_of(request: m.Message, *designs: str) -> bool:
    fits = getattr(request, "fits", ())
    return isinstance(request, m.AskSums) and any(f.partition("/")[0] in designs for f in fits)


def moments_of(request: m.Message, *designs: str) -> bool:
    return isinstance(request, m.AskMoments) and any(d in designs for d in request.designs)


def updates_of(request: m.Message, *designs: str) -> bool:
    fits = getattr(request, "fits", ())
    return isinstance(request, m.AskUpdates) and any(f.partition("/")[0] in designs for f in fits)


def networks_of(request: m.Message, *designs: str) -> bool:
    return isinstance(request, m.SetNetworks) and any(f in designs for f in request.fits)


def steps_of(request: m.Message, *fits: str, first: int = 1) -> bool:
    """Whether a request is for noisy gradients of such a fit, from this step on."""
    if not isinstance(request, m.AskPrivateSteps) or request.step < first:
        return False
    return first == OPENING or any(f in fits for f in request.fits)


SHARED = ("radiology", "clinical", "pathology", "omics")
STATES: dict[str, Callable[[m.Message], bool]] = {
    "describe": lambda r: isinstance(r, m.Describe),
    "keys": lambda r: isinstance(r, m.AskKey),
    "agreement": lambda r: isinstance(r, m.SetKeys),
    "encoder moments": lambda r: moments_of(r, *SHARED),
    "products": lambda r: isinstance(r, m.AskProducts),
    "components told": lambda r: isinstance(r, m.SetComponents),
    "encoder fit": lambda r: fits_of(r, *SHARED),
    "encoders told": lambda r: isinstance(r, m.SetEncoders),
    "fusion grid": lambda r: isinstance(r, m.AskEdges),
    "grid told": lambda r: isinstance(r, m.SetGrid),
    "fusion moments": lambda r: moments_of(r, PROTOCOL),
    "fusion fit": lambda r: fits_of(r, PROTOCOL),
    "baseline": lambda r: isinstance(r, m.AskIntervals),
    "evaluation": lambda r: isinstance(r, m.AskEvaluation),
    "calibration": lambda r: fits_of(r, CALIBRATION_SLOPE),
}
# Of studies that train networks by averaging, and of those with a privacy budget.
NETWORK_STATES: dict[str, Callable[[m.Message], bool]] = {
    "network rounds": lambda r: updates_of(r, *SHARED),
    "networks told": lambda r: networks_of(r, *SHARED),
    "gate rounds": lambda r: updates_of(r, PROTOCOL),
    "gates told": lambda r: networks_of(r, PROTOCOL),
}
NOISY_STATES: dict[str, Callable[[m.Message], bool]] = {
    "noisy opening": lambda r: steps_of(r, first=OPENING),
    "noisy encoder steps": lambda r: steps_of(r, *SHARED),
    "noisy encoders told": lambda r: isinstance(r, m.SetEncoders),
    "noisy fusion steps": lambda r: steps_of(r, PROTOCOL),
    "noisy baseline": lambda r: isinstance(r, m.AskIntervals),
    "noisy evaluation": lambda r: isinstance(r, m.AskEvaluation),
}
_ALL = STATES | NETWORK_STATES | NOISY_STATES
# A fit is disturbed once it is under way.
_AFTER = {
    "encoder fit": 3, "fusion fit": 3, "network rounds": 2, "gate rounds": 2,
    "noisy encoder steps": 3, "noisy fusion steps": 3,
}  # fmt: skip


@dataclass
class Faults:
    """Carries messages, does things as states of the protocol are reached, and notes what is said.

    Parameters
    ----------
    inner
        A transport, or a whole link.
    planned
        State, and what to do before the request that it begins with is sent; one after the other.
    """

    inner: Any
    planned: list[tuple[str, Callable[[], None]]] = field(default_factory=list)
    heard: list[Heard] = field(default_factory=lambda: [[]])
    _seen: int = 0

    @property
    def sites(self) -> tuple[str, ...]:
        return self.inner.sites

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        request = m.decode(payload)
        if self.planned and _ALL[self.planned[0][0]](request):
            self._seen += 1
            if self._seen == _AFTER.get(self.planned[0][0], 1):
                self._seen = 0
                self.planned.pop(0)[1]()
        replies: dict[str, bytes] = self.inner.ask(payload, sites)
        self.heard[-1].append((request, {s: m.decode(r) for s, r in replies.items()}))
        return replies

    def run_key(self) -> str:
        return self.inner.run_key()

    def open(self, plan: FederationPlan) -> None:
        self.inner.open(plan)

    def again(self, run: str) -> None:
        self.heard.append([])
        self._seen = 0
        self.inner.again(run)
