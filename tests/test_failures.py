"""Kills, hangs, cuts and full disks at every state of the protocol: the same model, or a sentence.

Quick versions play all parties in this process, with the sites' ledgers on the disk, and reach
every state; the slow ones kill real processes of a consortium over the federation engine.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from flows.sealed import SiteError
from fusion import messages as m
from fusion.audit import LOG_FILE, AuditError, AuditLog, joined_witnesses, verify_log, witnesses_of
from fusion.differential_privacy import Budget, PrivacyLedger
from fusion.federation import (
    AveragingPlan,
    FederationLost,
    InProcess,
    QuorumNotMet,
    SiteStudy,
    run_federation,
)
from fusion.federation.answered import AnswerLedger
from fusion.federation.consortium import COORDINATOR, Consortium
from fusion.federation.envelope import SignedTransport, SiteDesk
from fusion.federation.masking import MAX_ROSTERS
from fusion.keys import SigningKey
from fusion.late.gated import initial_gated_weights
from tests import federated
from tests.consortium import (
    EASY,
    N_RADIOLOGY,
    Flaky,
    LinearNetwork,
    identities_of,
    keys_of,
    small,
    studies_of,
)
from tests.federated import NETWORK_STATES, NOISY_STATES, STATES, Faults, charged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flows.links import OverEngine
    from fusion.federation import FederationPlan, Fitted, SiteRows
    from tests.federated import Clean, Heard, Loopback

pytestmark = pytest.mark.border

PLAN = replace(EASY, secure_sum=True, components={"radiology": 3})
AVERAGED = AveragingPlan(np.zeros(N_RADIOLOGY), rounds=4, local_steps=2, learning_rate=0.2)
NETWORKED = replace(
    PLAN,
    sums={"clinical": PLAN.sums["clinical"]},
    components={},
    networks={"radiology": AVERAGED},
    fusion_model="gated",
    gating=replace(AVERAGED, start=initial_gated_weights(np.zeros(6), hidden=4)),
)
NOISY = replace(EASY, secure_sum=True, budget=Budget(epsilon=3.0))
SENTENCE = re.compile(r"\A[a-z][^\n]{20,300}\Z")
# From here on every sum of the model was added up.
FITTED = ("evaluation", "calibration", "noisy evaluation")


def short_of(n: int) -> str:
    """What a run says of which so many sites are left."""
    return (
        f"training sites: found {n} left, needed 3 for a secure sum; see why the others left, or "
        "add sites"
    )


class Masks:
    """Every masked reply ever heard, and under which keys of which roster."""

    def __init__(self) -> None:
        self.replies: dict[tuple[Any, ...], np.ndarray] = {}
        self.rosters: dict[tuple[Any, ...], tuple[str, ...]] = {}

    def take(self, heard: list[tuple[m.Message, dict[str, m.Message]]]) -> None:
        """Note what one job said, whose sites began with new keys."""
        job, attempt, roster = object(), 0, tuple[str, ...]()
        for request, replies in heard:
            if isinstance(request, m.AskKey):
                assert request.attempt > attempt
                attempt, roster = request.attempt, tuple(sorted(request.roster))
            masked = {s: r.words for s, r in replies.items() if isinstance(r, m.Masked)}
            for site, words in masked.items():
                assert site in roster
                where = (job, attempt, request.round)  # type: ignore[union-attr]
                assert self.rosters.setdefault(where, roster) == roster
                assert (site, where) not in self.replies, "one mask for two replies"
                self.replies[site, where] = words

    def take_all(self, jobs: list[Heard]) -> None:
        for heard in jobs:
            self.take(heard)

    def require_fresh(self) -> None:
        """The same mask twice would show: the difference of two replies is then one of sums."""
        alike = defaultdict(list)
        for (site, _), words in self.replies.items():
            alike[site, words.shape].append(words[:, 0])
        assert sum(map(len, alike.values())) == len(self.replies) > 0
        for highs in alike.values():
            for one, other in combinations(highs, 2):
                if len(one) > 8:
                    difference = (one - other).view(np.int64)
                    assert np.abs(difference.astype(np.float64)).max() > 2.0**55


class Homes:
    """Sites in this process that keep what they answered on the disk, and can die and come back."""

    def __init__(self, folder: Path, rows: dict[str, SiteRows], plan: FederationPlan) -> None:
        self.folder, self.rows, self.plan = folder, rows, plan
        self._ledgers: dict[str, AnswerLedger] = {}
        self._noise: dict[str, PrivacyLedger] = {}
        self._studies: dict[str, SiteStudy] = {}
        self.errors: list[Exception] = []
        self.begin(*rows)

    def begin(self, *sites: str) -> None:
        """Let the processes of these sites die, and new ones begin."""
        identities = identities_of(self.rows)
        for site in sites:
            if site in self._ledgers:
                self._ledgers[site].close()
            self._ledgers[site] = AnswerLedger(self.folder / f"{site}.jsonl")
            if self.plan.private:
                self._noise[site] = PrivacyLedger(
                    self.noise(site), epsilon=self.plan.budget.epsilon, delta=self.plan.budget.delta
                )
            self._studies[site] = SiteStudy(
                self.plan,
                self.rows[site],
                identity=identities[site],
                book=self._ledgers[site].open("rows"),
                ledger=self._noise.get(site),
                on_error=self.errors.append,
            )

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.rows)

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        return InProcess(self._studies).ask(payload, sites)

    def close(self) -> None:
        for ledger in self._ledgers.values():
            ledger.close()

    def largest(self) -> int:
        """Bytes of the largest ledger."""
        return max((self.folder / f"{site}.jsonl").stat().st_size for site in self.rows)

    def noise(self, site: str) -> Path:
        """File of all that left a site with noise."""
        return self.folder / f"{site}-noise.jsonl"

    def charged(self) -> dict[str, int]:
        return {site: charged(self.folder / f"{site}.jsonl") for site in self.rows}

    def spent(self) -> dict[str, float]:
        """Epsilon of what each site released."""
        return {site: ledger.spent() for site, ledger in self._noise.items()}


def networked() -> dict[str, SiteRows]:
    """Sites whose radiology is a network's."""
    found = small()
    for rows in found.values():
        table = rows.tables.pop("radiology")
        values = np.concatenate([table.train, table.test])
        values -= np.nanmean(values, axis=0)
        rows.networks["radiology"] = LinearNetwork(values, rows.train)  # type: ignore[index]
    return found


KINDS = {"sums": (PLAN, small, STATES), "networks": (NETWORKED, networked, NETWORK_STATES)}
EVERYWHERE = [(kind, state) for kind, (*_, states) in KINDS.items() for state in states]


def assert_same(found: Fitted, expected: Fitted, *, atol: float = 1e-10) -> None:
    assert found.models.keys() == expected.models.keys()
    for arm, model in found.models.items():
        other = expected.models[arm]
        np.testing.assert_allclose(model.coefficients, other.coefficients, atol=atol, rtol=0)
        np.testing.assert_allclose(model.baseline, other.baseline, atol=atol, rtol=0)
        np.testing.assert_allclose(model.covariance, other.covariance, atol=atol, rtol=0)
    for name, encoder in found.encoders.items():
        np.testing.assert_allclose(
            encoder.coefficients, expected.encoders[name].coefficients, atol=atol, rtol=0
        )


@pytest.fixture(scope="module")
def undisturbed_of(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Fitted, dict[str, int]]]:
    """What three sites come to when nothing happens, and what it was charged."""
    found = {}
    for kind, (plan, rows, _) in KINDS.items():
        homes = Homes(tmp_path_factory.mktemp(kind), rows(), plan)
        fitted = run_federation(plan, homes)
        homes.close()
        found[kind] = (fitted, homes.charged())
    return found


@pytest.fixture(scope="module")
def undisturbed(
    undisturbed_of: dict[str, tuple[Fitted, dict[str, int]]],
) -> tuple[Fitted, dict[str, int]]:
    return undisturbed_of["sums"]


@pytest.fixture
def kind() -> str:
    return "sums"


@pytest.fixture
def homes(kind: str, tmp_path: Path) -> Iterator[Homes]:
    """Three sites that were never asked anything."""
    plan, rows, _ = KINDS[kind]
    found = Homes(tmp_path, rows(), plan)
    yield found
    found.close()


class Killed(BaseException):
    """The process that runs the study is no more: nothing catches it."""


def _die() -> None:
    raise Killed


@pytest.mark.parametrize(("kind", "state"), EVERYWHERE)
def test_a_coordinator_killed_at_any_state_begins_again_to_the_same_model_and_charge(
    kind: str,
    state: str,
    homes: Homes,
    undisturbed_of: dict[str, tuple[Fitted, dict[str, int]]],
) -> None:
    masks, (fitted, charge) = Masks(), undisturbed_of[kind]
    first = Faults(homes, [(state, _die)])
    with pytest.raises(Killed):
        run_federation(homes.plan, first)
    homes.begin(*homes.sites)  # jobs end with the process that runs the study
    second = Faults(homes)
    assert_same(run_federation(homes.plan, second), fitted)
    assert homes.charged() == charge
    masks.take(first.heard[0])
    masks.take(second.heard[0])
    masks.require_fresh()
    assert not homes.errors


@pytest.mark.parametrize(("kind", "state"), EVERYWHERE)
def test_a_site_killed_at_any_state_is_never_added_in_again_without_its_keys(
    kind: str,
    state: str,
    homes: Homes,
    undisturbed_of: dict[str, tuple[Fitted, dict[str, int]]],
) -> None:
    masks, (fitted, charge) = Masks(), undisturbed_of[kind]
    fault = Faults(homes, [(state, lambda: homes.begin("site-02"))])
    if state in {"describe", "keys", *FITTED}:
        assert_same(run_federation(homes.plan, fault), fitted)
    else:
        with pytest.raises(QuorumNotMet) as error:
            run_federation(homes.plan, fault)
        assert str(error.value) == short_of(2)
    homes.begin(*homes.sites)
    again = Faults(homes)
    assert_same(run_federation(homes.plan, again), fitted)
    assert homes.charged() == charge
    masks.take(fault.heard[0])
    masks.take(again.heard[0])
    masks.require_fresh()


@pytest.fixture(scope="module")
def spent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Epsilon that each site spends when nothing happens."""
    homes = Homes(tmp_path_factory.mktemp("noise"), small(), NOISY)
    run_federation(NOISY, homes)
    homes.close()
    return homes.spent()


@pytest.mark.parametrize("victim", ["coordinator", "site-02"])
@pytest.mark.parametrize("state", NOISY_STATES)
def test_noise_is_drawn_once_and_charged_once_whoever_is_killed(
    state: str, victim: str, tmp_path: Path, spent: dict[str, float]
) -> None:
    homes, ended = Homes(tmp_path, small(), NOISY), None
    kill = _die if victim == "coordinator" else lambda: homes.begin(victim)
    with suppress(Killed, QuorumNotMet):
        ended = run_federation(NOISY, Faults(homes, [(state, kill)]))
    assert (ended is not None) == (state in FITTED and victim != "coordinator")
    released = {site: homes.noise(site).read_bytes() for site in homes.sites}
    homes.begin(*homes.sites)
    fitted = run_federation(NOISY, homes)
    assert homes.spent() == spent
    assert 2.9 < min(spent.values()) <= max(spent.values()) <= NOISY.budget.epsilon
    for site, before in released.items():
        assert homes.noise(site).read_bytes().startswith(before)
    if ended is not None:
        assert_same(ended, fitted)
    homes.begin(*homes.sites)
    assert_same(run_federation(NOISY, homes), fitted)
    assert homes.spent() == spent
    homes.close()


@pytest.mark.parametrize("state", ["noisy fusion steps", "noisy baseline", "noisy evaluation"])
def test_a_site_begun_anew_under_a_budget_tells_nothing_without_the_encoders_it_was_told(
    state: str, tmp_path: Path
) -> None:
    """Each site scales for itself, so that it would else answer as if it lacked a modality."""
    plain = replace(NOISY, secure_sum=False)
    homes = Homes(tmp_path, small(), plain)
    fitted = run_federation(plain, Faults(homes, [(state, lambda: homes.begin("site-02"))]))
    assert {s.site: s.code for s in fitted.sites if s.code} == {"site-02": "malformed_request"}
    assert set(fitted.evaluations) == {"site-01", "site-03"}
    homes.close()


def _silent_from(state: str, site: str, studies: dict[str, SiteStudy]) -> Flaky:
    reached = False

    def at(request: m.Message, _: int) -> bool:
        nonlocal reached
        reached = reached or STATES[state](request)
        return reached

    return Flaky(studies, site, at)


@pytest.mark.parametrize("state", STATES)
def test_a_site_lost_at_any_state_leaves_too_few_or_a_model_that_was_complete(
    state: str, undisturbed: tuple[Fitted, dict[str, int]]
) -> None:
    flaky = _silent_from(state, "site-02", studies_of(small(), PLAN))
    if state in FITTED:
        fitted = run_federation(PLAN, flaky)
        assert_same(fitted, undisturbed[0])
        assert ("site-02" in fitted.evaluations) == (state == "calibration")
        return
    with pytest.raises(QuorumNotMet) as error:
        run_federation(PLAN, flaky)
    assert str(error.value) == short_of(2)


@pytest.mark.parametrize("state", [s for s in STATES if s not in {*FITTED, "baseline"}])
def test_the_others_go_on_without_a_lost_site_to_the_model_of_plain_sums(state: str) -> None:
    rows = small(210, 160, 140, 170)
    found = run_federation(PLAN, _silent_from(state, "site-02", studies_of(rows, PLAN)))
    plain = replace(PLAN, secure_sum=False)
    expected = run_federation(plain, _silent_from(state, "site-02", studies_of(rows, plain)))
    if state in {"keys", "agreement"}:  # of which plain sums have none
        others = {s: r for s, r in rows.items() if s != "site-02"}
        expected = run_federation(plain, InProcess(studies_of(others, plain)))
    assert next(s.code for s in found.sites if s.site == "site-02") == "unreachable"
    assert_same(found, expected, atol=1e-7)


def test_a_baseline_is_not_added_up_again_at_the_same_coefficients_without_a_lost_site() -> None:
    flaky = _silent_from("baseline", "site-02", studies_of(small(210, 160, 140, 170), PLAN))
    with pytest.raises(QuorumNotMet, match=r"have answered this for other sites before") as error:
        run_federation(PLAN, flaky)
    assert SENTENCE.fullmatch(str(error.value))


@pytest.mark.parametrize("state", ["encoder moments", "encoder fit", "fusion fit", "baseline"])
def test_a_reply_that_is_lost_once_is_asked_for_under_new_keys_to_the_same_model(
    state: str, homes: Homes, undisturbed: tuple[Fitted, dict[str, int]]
) -> None:
    masks, to_lose = Masks(), list[str]()

    class LosesOne(Faults):
        def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
            replies = super().ask(payload, sites)
            while to_lose:
                del replies[to_lose.pop()]
            return replies

    fault = LosesOne(homes, [(state, lambda: to_lose.append("site-03"))])
    assert_same(run_federation(PLAN, fault), undisturbed[0])
    assert homes.charged() == undisturbed[1]
    assert max(r.attempt for r, _ in fault.heard[0] if isinstance(r, m.AskKey)) == 2
    masks.take(fault.heard[0])
    masks.require_fresh()


@contextmanager
def _full_disk() -> Iterator[Callable[[int], None]]:
    """Give what lets no file grow beyond so many bytes, half a line of a ledger included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("state", STATES)
def test_a_disk_that_is_full_at_any_state_lets_nothing_out_and_loses_no_record(
    state: str, homes: Homes, undisturbed: tuple[Fitted, dict[str, int]]
) -> None:
    with _full_disk() as let_no_file_grow_beyond:
        full = [(state, lambda: let_no_file_grow_beyond(homes.largest() + 40))]
        fault = Faults(homes, full)
        if state in FITTED:
            assert_same(run_federation(PLAN, fault), undisturbed[0])
        else:
            with pytest.raises(QuorumNotMet) as error:
                run_federation(PLAN, fault)
            assert str(error.value) == short_of(0)
    assert all(isinstance(e, OSError) for e in homes.errors)
    homes.begin(*homes.sites)
    assert_same(run_federation(PLAN, homes), undisturbed[0])
    assert homes.charged() == undisturbed[1]


@dataclass
class Desks:
    """Sites in this process that are asked in signed envelopes, and the coordinator's log of it."""

    homes: Homes
    log: AuditLog
    key: SigningKey = field(default_factory=lambda: SigningKey(bytes(32)))

    def transport(self) -> SignedTransport:
        keys = keys_of(self.homes.rows)
        public = {site: key.public for site, key in keys.items()}
        consortium = Consortium("small", self.key.public, public, quorum=2)
        self._desks = {
            site: SiteDesk(self._study(site), site=site, key=key, consortium=consortium, log=None)
            for site, key in keys.items()
        }
        return SignedTransport(self, key=self.key, consortium=consortium, log=self.log)

    @property
    def sites(self) -> tuple[str, ...]:
        return self.homes.sites

    def ask(self, data: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        return {site: self._desks[site].handle(data) for site in sites}

    def _study(self, site: str) -> Callable[[bytes], bytes]:
        return lambda payload: self.homes.ask(payload, (site,))[site]


@pytest.mark.parametrize("more", [40, 700], ids=["asking", "hearing"])
@pytest.mark.parametrize("state", ["describe", "keys", "encoder fit", "baseline", "evaluation"])
def test_a_coordinator_whose_log_cannot_grow_ends_in_a_sentence_and_then_at_the_same_model(
    state: str, more: int, homes: Homes, undisturbed: tuple[Fitted, dict[str, int]], tmp_path: Path
) -> None:
    path = tmp_path / COORDINATOR / LOG_FILE
    desks = Desks(homes, AuditLog(path, party=COORDINATOR, key=SigningKey(bytes(32))))
    with desks.log.held():
        for _ in range(120):  # so that this file is the first that cannot grow
            desks.log.append("waited")
    with _full_disk() as let_no_file_grow_beyond:
        full = [(state, lambda: let_no_file_grow_beyond(path.stat().st_size + more))]
        with pytest.raises(AuditError) as error:
            run_federation(PLAN, Faults(desks.transport(), full))
    assert str(error.value) == (
        "audit log: found that no entry can be added (No space left on device), needed room on the "
        "coordinator's disk; free some and run the study again"
    )
    assert not homes.errors
    homes.begin(*homes.sites)
    assert_same(run_federation(PLAN, desks.transport()), undisturbed[0])
    assert homes.charged() == undisturbed[1]
    assert verify_log(path, public=desks.key.public) is None


def test_a_ledger_that_found_the_disk_full_reads_on_once_there_is_room(tmp_path: Path) -> None:
    ledger = AnswerLedger(tmp_path / "ledger.jsonl")
    book = ledger.open("rows")
    assert book.spend([("sums", "first", 9)])
    with _full_disk() as let_no_file_grow_beyond:
        let_no_file_grow_beyond((tmp_path / "ledger.jsonl").stat().st_size + 40)
        with pytest.raises(OSError, match=r"File too large|No space"):
            book.spend([("sums", "second", 9)])
    assert book.spend([("sums", "third", 9)])
    ledger.close()
    again = AnswerLedger(tmp_path / "ledger.jsonl")
    assert again.open("rows").spent == {"sums": {"first", "third"}}
    again.close()


def test_moments_are_told_to_a_few_rosters_and_no_more() -> None:
    studies = studies_of(small(210, 160, 140, 170), PLAN)
    ask = InProcess(studies).ask

    def answered(number: int, roster: tuple[str, ...], request: m.Message) -> set[str]:
        for _ in _keys(ask, number, roster):
            pass
        replies = {s: m.decode(r) for s, r in ask(m.encode(request), roster).items()}
        refused = {s for s, r in replies.items() if r == m.Refused("roster_changed")}
        assert all(isinstance(r, m.Masked) for s, r in replies.items() if s not in refused)
        return set(replies) - refused

    everyone = tuple(studies)
    rosters = [everyone, *(tuple(s for s in everyone if s != x) for x in everyone[1:])]
    told = [
        answered(at, roster, m.AskMoments(PLAN.run, at, tuple(PLAN.sums)))
        for at, roster in enumerate(rosters, 1)
    ]
    assert told[:MAX_ROSTERS] == [set(x) for x in rosters[:MAX_ROSTERS]]
    assert everyone[0] not in told[MAX_ROSTERS]


def _keys(
    ask: Callable[[bytes, Sequence[str]], dict[str, bytes]], attempt: int, roster: tuple[str, ...]
) -> list[dict[str, m.Message]]:
    key = m.encode(m.AskKey(PLAN.run, attempt, roster))
    keys = {s: m.decode(r) for s, r in ask(key, roster).items()}
    told = m.SetKeys(
        PLAN.run, attempt, roster,
        np.array([keys[s].public for s in roster]),  # type: ignore[union-attr]
        np.array([keys[s].signature for s in roster]),  # type: ignore[union-attr]
    )  # fmt: skip
    done = {s: m.decode(r) for s, r in ask(m.encode(told), roster).items()}
    assert set(done.values()) == {m.Done()}
    return [keys, done]


@pytest.fixture(scope="module")
def parties(request: pytest.FixtureRequest) -> Loopback:
    return federated.shared(request.config, "parties", federated.running)


@pytest.fixture(scope="module")
def clean(request: pytest.FixtureRequest, parties: Loopback) -> Clean:
    return federated.shared(request.config, "clean", lambda: federated.undisturbed(parties))


@pytest.fixture(scope="module")
def masks(clean: Clean) -> Masks:
    """Every masked reply that these tests heard."""
    found = Masks()
    found.take_all(clean.overheard)
    return found


@pytest.fixture(scope="module")
def federate() -> Iterator[Callable[..., Fitted]]:
    """Go through a study as its flow does, without Prefect's server."""
    from flows import study

    class Silent:
        def advance(self, record: object) -> None:
            return None

    with pytest.MonkeyPatch.context() as patch, federated.plain_folder() as folder:
        for name in ("describe_sites", "fit_encoders", "fit_fusion", "evaluate_models"):
            patch.setattr(study, name, getattr(study, name).fn)
        patch.setattr(study, "LOSSES", len(STATES))

        def run(parties: Loopback, faults: Faults) -> Fitted:
            plan = parties.protocol.plan(faults.run_key())
            faults.open(plan)
            return study._federate(plan, faults, Silent(), folder)

        yield run


def kill(process: Callable[[str], int], party: str) -> Callable[[], None]:
    return lambda: os.kill(process(party), signal.SIGKILL)


def sentence(error: pytest.ExceptionInfo[SiteError]) -> str:
    """What the command line says, in full."""
    cause = error.value.cause
    assert isinstance(cause, QuorumNotMet | FederationLost)
    assert SENTENCE.fullmatch(str(cause))
    return str(cause)


# Each costs a job of the engine, which takes longer to begin than the study; SECURITY.md says at
# which states the tests below kill processes. All states are tried within this one, above.
KILLED_AT = ("keys", "encoder fit", "evaluation")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_server_killed_at_one_state_after_another_is_a_sentence_and_then_the_same_model(
    parties: Loopback, clean: Clean, federate: Callable[..., Fitted], masks: Masks
) -> None:
    victims = {"encoder fit": parties.service}  # the server itself, not its job's process alone
    kills = [(s, kill(victims.get(s, parties.job), COORDINATOR)) for s in KILLED_AT]
    with parties.link() as link:
        kill(parties.job, COORDINATOR)()  # before the sites are introduced to the run
        with pytest.raises(FederationLost, match=SENTENCE):
            link.run_key()
        link.again(clean.run)
        carried = Faults(link, list(kills))
        fitted = federate(parties, carried)
    assert not carried.planned
    assert len(carried.heard) == 1 + len(kills)
    assert_same(fitted, clean.in_process)
    masks.take_all(carried.heard)
    assert parties.charged() == clean.charged


def is_short_of(
    parties: Loopback,
    federate: Callable[..., Fitted],
    masks: Masks,
    *faults: Any,
    left: int = 2,
) -> bool:
    """Disturb a run, and say whether that ends it, in a sentence, for want of sites."""
    with parties.link() as link:
        carried = Faults(link, [("describe", lambda: hurry(link)), *faults])
        with pytest.raises(SiteError) as error:
            federate(parties, carried)
    masks.take_all(carried.heard)
    return sentence(error) == short_of(left)


def hurry(link: OverEngine) -> None:
    """Wait for a site less long, now that all have their rows."""
    link._engine.engine._timeout_s = 5.0


@pytest.mark.slow
def test_a_sites_process_that_is_killed_leaves_too_few_and_a_sentence(
    parties: Loopback, clean: Clean, federate: Callable[..., Fitted], masks: Masks
) -> None:
    fault = ("encoder fit", kill(parties.job, "site-02"))
    assert is_short_of(parties, federate, masks, fault)


@pytest.mark.slow
def test_a_sites_service_that_is_killed_leaves_too_few_and_a_sentence_and_comes_back(
    parties: Loopback, clean: Clean, federate: Callable[..., Fitted], masks: Masks
) -> None:
    before = parties.service("site-01")
    assert is_short_of(parties, federate, masks, ("fusion fit", kill(parties.service, "site-01")))
    assert parties.service("site-01") != before


@pytest.mark.slow
def test_a_site_that_hangs_for_good_leaves_too_few_and_a_sentence(
    parties: Loopback, clean: Clean, federate: Callable[..., Fitted], masks: Masks
) -> None:
    def hang() -> None:
        os.kill(parties.job("site-03"), signal.SIGSTOP)

    assert is_short_of(parties, federate, masks, ("baseline", hang))


@pytest.mark.slow
def test_a_network_that_is_cut_and_a_site_that_hangs_leave_the_same_model_or_a_sentence(
    parties: Loopback, clean: Clean, federate: Callable[..., Fitted], masks: Masks
) -> None:
    """Whether a few seconds are too long is the engine's to say; never that nobody noticed."""

    def cut() -> None:
        parties.wire.cut()
        threading.Timer(3.0, parties.wire.mend).start()

    def pause() -> None:
        hurry(link)
        process = parties.job("site-03")
        os.kill(process, signal.SIGSTOP)
        threading.Timer(7.0, os.kill, (process, signal.SIGCONT)).start()

    for fault in (("fusion moments", cut), ("fusion fit", pause)):
        with parties.link() as link:
            carried, fitted, why = Faults(link, [fault]), None, ""
            try:
                fitted = federate(parties, carried)
            except SiteError as error:
                why = str(error.cause)
        if fitted is None:  # on a busy machine one more may be too late
            assert why in {short_of(n) for n in (0, 1, 2)}, why
        else:
            assert_same(fitted, clean.in_process)
        masks.take_all(carried.heard)


@pytest.mark.slow
def test_a_network_that_stays_cut_from_one_site_or_from_all_is_a_sentence(
    parties: Loopback, clean: Clean, federate: Callable[..., Fitted], masks: Masks
) -> None:
    for cut, left in ((("site-02",), 2), (parties.sites, 0)):
        fault = ("encoder fit", partial(parties.wire.cut, *cut))
        try:
            assert is_short_of(parties, federate, masks, fault, left=left)
        finally:
            parties.wire.mend()


@pytest.mark.slow
def test_a_site_that_dies_after_the_fit_is_not_missed_in_the_model(
    parties: Loopback, clean: Clean, federate: Callable[..., Fitted], masks: Masks
) -> None:
    with parties.link() as link:
        carried = Faults(link, [("evaluation", kill(parties.job, "site-01"))])
        fitted = federate(parties, carried)
    assert_same(fitted, clean.in_process)
    assert set(fitted.evaluations) == {"site-02", "site-03"}
    masks.take_all(carried.heard)


@pytest.mark.slow
def test_a_full_disk_at_a_site_is_a_sentence_and_its_log_stays_whole(
    parties: Loopback, clean: Clean, federate: Callable[..., Fitted], masks: Masks
) -> None:
    log = parties.root / "site-02" / LOG_FILE

    def fill() -> None:
        size = log.stat().st_size + 200  # no whole entry
        resource.prlimit(parties.job("site-02"), resource.RLIMIT_FSIZE, (size, size))

    assert is_short_of(parties, federate, masks, ("fusion fit", fill))
    public = (parties.root / "site-02" / "identity.pub").read_text().strip()
    assert verify_log(log, public=public) is None


_DIES = """
import os, signal, sys
from pathlib import Path
from fusion.keys import SigningKey
from fusion.late.gated import initial_gated_weights
from tests import federated
from flows.protocol import load_protocol
from fusion.federation import run_federation
root, state = Path(sys.argv[1]), sys.argv[2]
parties = federated.Loopback(root, load_protocol(root / "study.toml"), {}, {}, None)
with parties.link() as link:
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    faults = federated.Faults(link, [(state, die)])
    run_federation(parties.protocol.plan(link.run_key()), faults)
"""


@pytest.mark.slow
def test_the_process_of_a_study_and_then_a_party_killed_leave_the_same_model(
    parties: Loopback, clean: Clean, federate: Callable[..., Fitted], masks: Masks
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _DIES, str(parties.root), "fusion fit"],
        cwd=Path(__file__).parents[1],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    with parties.link() as link:
        carried = Faults(link, [("fusion fit", lambda: os.kill(parties.pids["site-01"], 9))])
        assert_same(federate(parties, carried), clean.in_process)
    masks.take_all(carried.heard)


@pytest.mark.slow
def test_a_party_that_was_killed_starts_anew_beside_no_other_and_takes_part(
    parties: Loopback, clean: Clean, federate: Callable[..., Fitted], masks: Masks
) -> None:
    parties.start("site-01")
    assert parties.services("site-01") == [parties.service("site-01")]
    with parties.link() as link:
        carried = Faults(link)
        assert_same(federate(parties, carried), clean.in_process)
    masks.take_all(carried.heard)


@pytest.mark.slow
def test_after_all_of_that_no_mask_served_twice_no_budget_was_charged_twice_and_no_log_is_broken(
    parties: Loopback, clean: Clean, masks: Masks
) -> None:
    masks.require_fresh()
    assert parties.charged() == clean.charged
    logs = {p: parties.root / p / LOG_FILE for p in (*parties.sites, COORDINATOR)}
    for party, log in logs.items():
        public = (log.parent / "identity.pub").read_text().strip()
        seen = joined_witnesses(witnesses_of(other, party) for other in logs.values())
        assert verify_log(log, public=public, witnesses=seen) is None
