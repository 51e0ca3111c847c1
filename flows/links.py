"""How a run reaches its sites: all in this process, or over the federation engine."""

from __future__ import annotations

import statistics
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

from flows.federated import Federation, FederationRefused, federation
from flows.gate import own_limits, privacy_ledger
from flows.identity import identity
from flows.inputs import keyed_digest, site_rows
from flows.loading import load_encoders, load_inputs
from flows.reference import Consortium
from flows.sealed import note, warn
from flows.snapshots import record_run, released
from flows.versions import CODE, source_digest
from fusion.federation import InProcess, SiteStudy, run_federation
from fusion.federation.masking import SiteIdentity
from modalities.cohort import read_cohort_digest
from modalities.files import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flows.inputs import LocalEncoder, SiteInputs
    from flows.protocol import StudyProtocol
    from fusion.federation import FederationPlan, Fitted
    from infra.settings import Workspace

# How often a run begins again after the engine's job was lost.
LOSSES: Final = 2


class Link(Protocol):
    """A transport that also knows how a run begins, and what is left of it afterwards."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that can be asked."""

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        """Send one request to these sites; one that cannot be reached is absent."""

    def run_key(self) -> str:
        """Name of the run by protocol, cohorts and code: equal for an unchanged rerun."""

    def open(self, plan: FederationPlan) -> None:
        """Make the run possible."""

    def again(self, run: str) -> None:
        """Begin again after the sites were lost, in the run of this name."""

    def time_engine(self, fitted: Fitted) -> dict[str, float]:
        """Seconds of a round of the engine alone, beside those of this run."""

    def consortium(self) -> Consortium | None:
        """Rows of every site, where they are here: simulated and public data."""


class InMemory:
    """All sites in this process.

    Parameters
    ----------
    workspace
        Folder that has the sites below it.
    """

    def __init__(
        self, workspace: Workspace, protocol: StudyProtocol, sites: tuple[str, ...]
    ) -> None:
        self._workspace, self._protocol, self._sites = workspace, protocol, sites
        self._transport: InProcess | None = None
        self._consortium: Consortium | None = None

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in the order given."""
        return self._sites

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        """Let the sites answer side by side."""
        assert self._transport is not None
        return self._transport.ask(payload, sites)

    def run_key(self) -> str:
        """Name of the run by protocol, released cohorts and code.

        Raises
        ------
        modalities.cohort.DataError
            If a site has no cohort.
        """
        cohorts = {}
        for site in self._sites:
            settings = self._workspace.site(site)
            snapshot = released(settings, self._protocol, roster=tuple(sorted(self._sites)))
            cohorts[site] = keyed_digest(settings.key, read_cohort_digest(snapshot.cohort))
        return fingerprint([self._protocol.fingerprint(), cohorts, source_digest(*CODE)])

    def open(self, plan: FederationPlan) -> None:
        """Bring up every site's part in the run, each from its own files."""
        inputs: dict[str, SiteInputs] = {}
        local: dict[str, dict[str, LocalEncoder]] = {}
        studies: dict[str, SiteStudy] = {}
        settings = {site: self._workspace.site(site) for site in self._sites}
        keys = {site: identity(found.home) for site, found in settings.items()}
        trusted = {site: key.public for site, key in keys.items()}
        for site, found in settings.items():
            roster = tuple(sorted(self._sites))
            snapshot = released(found, self._protocol, roster=roster)
            record_run(found, snapshot.number, plan.run)
            inputs[site] = load_inputs(found, self._protocol, snapshot=snapshot)
            local[site] = load_encoders(found, self._protocol, inputs[site])
            studies[site] = SiteStudy(
                self._protocol.plan(plan.run, minimum=own_limits(found, self._protocol)),
                site_rows(inputs[site], local[site], self._protocol),
                identity=SiteIdentity(site, keys[site], trusted),
                ledger=privacy_ledger(found, self._protocol),
                on_error=note,
                on_warning=warn,
            )
        self._transport = InProcess(studies)
        self._consortium = Consortium(self._protocol, inputs, studies, local)

    def again(self, run: str) -> None:
        """Nothing is ever lost in this process."""

    def time_engine(self, fitted: Fitted) -> dict[str, float]:
        """There is no engine."""
        return {}

    def consortium(self) -> Consortium | None:
        """Everything of every site."""
        return self._consortium


class OverEngine:
    """Sites behind the federation engine, each on its own machine.

    Parameters
    ----------
    engine
        The running job.
    workspace
        The coordinator's; where data are simulated or public it may also hold the sites.
    """

    def __init__(self, engine: Federation, workspace: Workspace, protocol: StudyProtocol) -> None:
        self._engine, self._workspace, self._protocol = engine, workspace, protocol
        self._plan: FederationPlan | None = None

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the consortium's sites."""
        return self._engine.sites

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        """Send one signed request to these sites."""
        return self._engine.ask(payload, sites)

    def run_key(self) -> str:
        """Name of the run, after every site was asked to take part."""
        return self._engine.run_key()

    def open(self, plan: FederationPlan) -> None:
        """Sites open their own part."""
        self._plan = plan

    def again(self, run: str) -> None:
        """Begin a new job.

        Raises
        ------
        FederationRefused
            If a site would bring another cohort now.
        """
        self._engine.again()
        if self._engine.run_key() != run:
            raise FederationRefused(
                "run: found other sites or cohorts after the engine's job was lost, needed the "
                "same; run the study again"
            )

    def time_engine(self, fitted: Fitted) -> dict[str, float]:
        """Seconds of an echo of a median round's size, in the same job."""
        sizes = [r.bytes_received / max(r.n_sites, 1) for r in fitted.rounds]
        return {"engine_round_s": self._engine.time_engine(int(statistics.median(sizes)))}

    def consortium(self) -> Consortium | None:
        """Replay the run in this process, where its sites' simulated or public rows are here too.

        What it gives, pooled rows among it, is what the run over the engine is compared with.
        """
        here = set(self._workspace.site_names())
        if self._protocol.study.data == "patients" or not set(self.sites) <= here:
            return None
        assert self._plan is not None
        replay = InMemory(self._workspace, self._protocol, self.sites)
        replay.open(self._plan)
        run_federation(self._plan, replay)
        return replay.consortium()


@contextmanager
def linked(
    kind: str,
    workspace: Workspace,
    protocol: StudyProtocol,
    sites: tuple[str, ...],
) -> Iterator[Link]:
    """Reach the sites of a run in the way that is asked for.

    Raises
    ------
    FederationRefused
        If there is no such way.
    """
    if kind == "memory":
        yield InMemory(workspace, protocol, sites)
    elif kind == "flare":
        with federation(workspace, protocol) as engine:
            yield OverEngine(engine, workspace, protocol)
    else:
        raise FederationRefused(f"federation: found {kind!r}, needed memory or flare")
