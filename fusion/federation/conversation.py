"""How the coordinator talks to the sites: who is there, what a round cost, who left and why."""

from __future__ import annotations

import time as clock
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fusion import messages as m
from fusion.federation.bounds import BoundsBroken, Watch, broken_total, other_units
from fusion.federation.checks import is_reply_to
from fusion.federation.totals import CONSORTIUM, unflatten
from fusion.secure_sum import MINIMUM_ROSTER, unmask
from fusion.survival import Moments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from fusion.federation.plan import FederationPlan
    from fusion.federation.transport import Transport

    Floats = NDArray[np.float64]

Reply = TypeVar("Reply")
Added = m.AskMoments | m.AskProducts | m.AskSums | m.AskUpdates | m.AskIntervals | m.AskPrivateSteps


class QuorumNotMet(RuntimeError):
    """Too few sites or patients to fit a consortium's model."""


@dataclass(frozen=True)
class RoundRecord:
    """One round as the coordinator saw it."""

    number: int
    stage: str
    n_sites: int
    n_fits: int
    objective: float
    bytes_sent: int
    bytes_received: int
    seconds: float


@dataclass(frozen=True)
class SiteOutcome:
    """How one site took part: its counts, and why it did not where it did not."""

    site: str
    cohort: str = ""
    n_train: int = 0
    n_train_events: int = 0
    n_test: int = 0
    n_test_events: int = 0
    trains: bool = False
    contributes: tuple[str, ...] = ()
    code: str = ""


def introduce(
    transport: Transport, introduction: m.Introduce
) -> tuple[dict[str, str], dict[str, str]]:
    """Ask every site whether it takes part in a run that is about to begin.

    Returns
    -------
    dict, dict
        Digest of the cohort of each site that does, and of each other the code that says why not.
    """
    raw = transport.ask(m.encode(introduction), transport.sites)
    replies = {site: _read(raw.get(site)) for site in transport.sites}
    cohorts = {s: r.cohort for s, r in replies.items() if isinstance(r, m.Introduced)}
    codes = {
        s: r.code if isinstance(r, m.Refused) else "unexpected_reply"
        for s, r in replies.items()
        if s not in cohorts
    }
    return cohorts, codes


@dataclass
class Conversation:
    """Requests to sites and their replies, in rounds.

    Parameters
    ----------
    plan
        What every party approved, on the grid that the run agreed on.
    transport
        How bytes reach the sites.
    on_round
        Called after every round, for progress and tracking.
    left_out
        Sites that are asked to take part as if they had never trained.

    Notes
    -----
    A site that refuses or cannot be reached leaves the roster with its code and the run goes on
    without it.
    """

    plan: FederationPlan
    transport: Transport
    on_round: Callable[[RoundRecord], None] | None = None
    left_out: frozenset[str] = frozenset()
    rounds: list[RoundRecord] = field(default_factory=list)
    outcomes: dict[str, SiteOutcome] = field(default_factory=dict)
    cross_fits: dict[str, bool] = field(default_factory=dict)
    reduces: dict[str, bool] = field(default_factory=dict)
    _silent: dict[str, m.Message] = field(default_factory=dict)
    _keyed: tuple[str, ...] = ()
    _attempt: int = 0
    _watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self._watch = Watch(self)

    @property
    def roster(self) -> tuple[str, ...]:
        """Sites that train, in a fixed order."""
        return tuple(s for s, o in self.outcomes.items() if o.trains and not o.code)

    @property
    def reachable(self) -> tuple[str, ...]:
        """Sites that train or evaluate."""
        return tuple(s for s, o in self.outcomes.items() if not o.code)

    @property
    def offered(self) -> set[str]:
        """Modalities that some training site contributes."""
        return {x for s in self.roster for x in self.outcomes[s].contributes}

    @property
    def number(self) -> int:
        """Number of the next round."""
        return len(self.rounds) + 1

    def ask(
        self,
        request: m.Message,
        expected: type[Reply],
        sites: Sequence[str],
        *,
        stage: str,
        forgiving: bool = False,
    ) -> dict[str, Reply]:
        """Put one request to these sites.

        Whoever does not answer it as expected has left, unless the request is ``forgiving``.
        """
        payload = m.encode(request)
        started = clock.perf_counter()
        raw = self.transport.ask(payload, sites)
        replies: dict[str, Reply] = {}
        self._silent = {}
        for site in sites:
            reply = _read(raw.get(site))
            if not (isinstance(reply, expected) and is_reply_to(request, reply, self.plan)):
                self._silent[site] = reply
            elif self._watch.judge(request, reply, (site,)) is not None:
                self._silent[site] = m.Refused("not_within_bounds")
            else:
                replies[site] = reply
        if not forgiving:
            for site, reply in self._silent.items():
                self._drop(site, reply)
        self.rounds.append(
            RoundRecord(
                number=len(self.rounds) + 1,
                stage=stage,
                n_sites=len(replies),
                n_fits=len(getattr(request, "fits", ())),
                objective=float("nan"),
                bytes_sent=len(payload) * len(sites),
                bytes_received=sum(map(len, raw.values())),
                seconds=clock.perf_counter() - started,
            )
        )
        return replies

    def collect(self, request: Added, expected: type[Reply], *, stage: str) -> dict[str, Reply]:
        """Ask every training site for sums that are to be added up.

        Returns
        -------
        dict
            Per site its reply; where the plan wants secure sums, their total under the name of the
            consortium, or nothing where sites have left and masks do not cancel, or where another
            roster was answered at these very coefficients.

        Raises
        ------
        QuorumNotMet
            If too few sites are left.
        """
        if not self.plan.secure_sum:
            replies = self.ask(request, expected, self.roster, stage=stage)
            self.require_quorum()
            return replies
        return self._total(request, expected, stage=stage)

    def collect_all(self, request: Added, expected: type[Reply], *, stage: str) -> dict[str, Reply]:
        """Collect sums that hold whoever is left: where sites leave, ask the others again.

        Raises
        ------
        QuorumNotMet
            If too few sites are left, or those that are do not answer this again.
        """
        for _ in range(1 + len(self.outcomes)):
            replies = self.collect(request, expected, stage=stage)
            if replies:
                return replies
        raise QuorumNotMet(
            f"{stage}: found sites that have answered this for other sites before, needed them "
            "not to have; run the study when all sites are there"
        )

    def _total(self, request: Added, expected: type[Reply], *, stage: str) -> dict[str, Reply]:
        roster = self.roster
        for _ in range(2):  # a reply that was lost is asked for once more, under new keys
            if not self._agree_on_keys():
                return {}
            asked = replace(request, round=self.number)
            masked = self.ask(asked, m.Masked, roster, stage=stage, forgiving=True)
            if set(masked) == set(roster):
                return {CONSORTIUM: self._unmasked(asked, expected, masked)}
            self.round_done()
            self._keyed = ()  # masks of this attempt never cancel again
            found = {r.code if isinstance(r, m.Refused) else "" for r in self._silent.values()}
            if found == {"roster_changed"}:
                return {}
            if found != {"unreachable"}:
                break
        for site, reply in self._silent.items():
            self._drop(site, reply)
        self.require_quorum()
        return {}

    def _unmasked(
        self, request: m.Message, expected: type[Reply], masked: dict[str, m.Masked]
    ) -> Reply:
        try:
            total = unmask({s: r.words for s, r in masked.items()}, roster=self._keyed)
            found = unflatten(expected, request, self.plan, total)
        except ValueError as error:
            raise BoundsBroken(
                f"secure sum: found a total that is no {expected.__name__}, needed replies of "
                "every site to the same request; run the study again"
            ) from error
        if not isinstance(found, expected) or not is_reply_to(request, found, self.plan):
            raise BoundsBroken(
                f"secure sum: found a total that no {expected.__name__} can be: a site's sums "
                "are wrong; its own log may say why"
            )
        fault = self._watch.judge(request, found, self._keyed)
        if fault is not None:
            raise broken_total(fault)
        return found

    def _agree_on_keys(self) -> bool:
        """Whether the sites that train share fresh masks, after whoever cannot has left."""
        roster = self.roster
        if self._keyed == roster:
            return True
        self._attempt += 1
        ask = m.AskKey(self.plan.run, self._attempt, roster)
        keys = self.ask(ask, m.Key, roster, stage="keys")
        self.round_done()
        self.require_quorum()
        if self.roster != roster:
            return False
        told = m.SetKeys(
            self.plan.run,
            self._attempt,
            roster,
            np.array([keys[s].public for s in roster]),
            np.array([keys[s].signature for s in roster]),
        )
        self.ask(told, m.Done, roster, stage="keys")
        self.round_done()
        self.require_quorum()
        self._keyed = roster
        return self.roster == roster

    def _drop(self, site: str, reply: object) -> None:
        code = reply.code if isinstance(reply, m.Refused) else "unexpected_reply"
        self.outcomes[site] = replace(self.outcomes.get(site, SiteOutcome(site)), code=code)

    def tell(self, request: m.Message, *, stage: str) -> None:
        """Give every site that is still there an instruction.

        Raises
        ------
        QuorumNotMet
            If too few sites carry it out.
        """
        self.ask(request, m.Done, self.reachable, stage=stage)
        self.round_done()
        self.require_quorum()

    def round_done(self, objective: float = float("nan")) -> None:
        """Close a round: everything of it is known."""
        self.rounds[-1] = replace(self.rounds[-1], objective=objective)
        if self.on_round is not None:
            self.on_round(self.rounds[-1])

    def describe(self) -> None:
        """Learn which sites take part, with which modalities.

        Raises
        ------
        QuorumNotMet
            With fewer than two sites, no site above its minimum counts, or too few patients.
        """
        sites = self.transport.sites
        if len(sites) < 2:
            raise QuorumNotMet(
                f"sites: found {len(sites)}, needed at least 2; one site has nothing to federate"
            )
        replies = self._introduce([s for s in sites if s not in self.left_out], trains=True)
        if self.left_out:
            replies |= self._introduce([s for s in sites if s in self.left_out], trains=False)
        self.outcomes = {s: self.outcomes[s] for s in sites}
        self.require_quorum()
        for at, modality in enumerate(self.plan.modalities):
            taking_part = [r for r in replies.values() if r.trains and r.contributes[at]]
            self.cross_fits[modality] = bool(taking_part) and all(
                r.cross_fits[at] for r in taking_part
            )
            self.reduces[modality] = bool(taking_part) and all(r.reduces[at] for r in taking_part)

    def _introduce(self, sites: Sequence[str], *, trains: bool) -> dict[str, m.Description]:
        plan = self.plan
        request = m.Describe(plan.run, plan.protocol, plan.modalities, trains)
        replies = self.ask(request, m.Description, sites, stage="describe")
        for site, reply in replies.items():
            self.outcomes[site] = SiteOutcome(
                site=site,
                cohort=reply.cohort,
                n_train=reply.n_train,
                n_train_events=reply.n_train_events,
                n_test=reply.n_test,
                n_test_events=reply.n_test_events,
                trains=reply.trains,
                contributes=self._named(reply.contributes),
            )
        self.round_done()
        return replies

    def _named(self, flags: NDArray[np.bool_]) -> tuple[str, ...]:
        return tuple(x for x, flag in zip(self.plan.modalities, flags, strict=True) if flag)

    def require_quorum(self) -> None:
        """Raise QuorumNotMet unless enough training sites and patients are left."""
        minimum = self.plan.minimum
        if not any(o.trains or o.code for o in self.outcomes.values()):
            raise QuorumNotMet(
                f"training sites: found none above the minimum of {minimum.patients} patients and "
                f"{minimum.events} events after the split; add patients or sites"
            )
        needed = max(self.plan.min_sites, MINIMUM_ROSTER if self.plan.secure_sum else 1)
        if len(self.roster) < needed:
            why = " for a secure sum" if needed == MINIMUM_ROSTER != self.plan.min_sites else ""
            raise QuorumNotMet(
                f"training sites: found {len(self.roster)} left, needed {needed}{why}; see why "
                "the others left, or add sites"
            )
        total = sum(self.outcomes[s].n_train for s in self.roster)
        if total < minimum.pooled_patients:
            raise QuorumNotMet(
                f"training patients: found {total} over {len(self.roster)} sites, needed "
                f"{minimum.pooled_patients}; add patients or sites"
            )

    def scale(self, designs: Sequence[str], *, stage: str) -> dict[str, tuple[Floats, Floats]]:
        """Agree on mean and standard deviation of each design's inputs, once for the run.

        Returns
        -------
        dict
            Per design its (p,) mean and (p,) scale over the present training values of all sites.
        """
        ask = m.AskMoments(self.plan.run, self.number, tuple(designs))
        replies = self.collect_all(ask, m.DesignMoments, stage=stage)
        self.round_done()
        for site in other_units(replies):
            self._drop(site, m.Refused("not_within_bounds"))
            del replies[site]
        self.require_quorum()
        total = add([Moments(r.n, r.mean, r.m2) for r in replies.values()])
        scale = np.where(total.scale > 0, total.scale, 1.0)
        self.tell(
            m.SetScaling(self.plan.run, self.number, tuple(designs), total.mean, scale), stage=stage
        )
        widths = [self.plan.n_inputs(d) for d in designs]
        return {
            design: (total.mean[row, :p], scale[row, :p])
            for row, (design, p) in enumerate(zip(designs, widths, strict=True))
        }

    def agree_on_grid(self) -> Floats:
        """(k,) edges of the grid that leave no site with a small cell, for the rest of the run."""
        grid = np.array(self.plan.edges_days)
        replies = self.ask(
            m.AskEdges(self.plan.run, self.number, grid), m.Edges, self.roster, stage="grid"
        )
        self.round_done()
        self.require_quorum()
        kept = np.logical_and.reduce([r.releasable for r in replies.values()])
        edges = np.asarray(grid[np.append(kept, True)])
        self.tell(m.SetGrid(self.plan.run, self.number, edges), stage="grid")
        self.plan = replace(self.plan, edges_days=tuple(edges.tolist()))
        return edges


SumsT = TypeVar("SumsT")


def add(parts: Sequence[SumsT]) -> SumsT:
    """Add sums in the roster's order: floating-point sums are then the same in every run."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part  # type: ignore[operator]
    return total


def _read(payload: bytes | None) -> m.Message:
    if payload is None:
        return m.Refused("unreachable")
    try:
        return m.decode(payload)
    except m.MessageError:
        return m.Refused("unreadable_reply")
