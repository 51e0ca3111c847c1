"""A site's end of a run from its own disk: its approval, its limits, its released cohort."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flows.approvals import FOLDER, approval_fields, approve, read_approvals, write_approval
from flows.approvals import statement_of as stated
from flows.gate import (
    ANSWERED,
    PRIVACY,
    SitePart,
    approve_at,
    open_site,
    own_limits,
    settings_digest,
)
from flows.identity import identity
from flows.membership import write_results
from flows.sealed import log_to, note
from flows.snapshots import COHORT, withdraw
from fusion import messages as m
from fusion.differential_privacy import PrivacyLedger
from fusion.federation import PROTOCOL
from fusion.federation.consortium import COORDINATOR, Consortium
from fusion.federation.envelope import Envelope, seal, unseal
from fusion.federation.gate import SiteGate
from fusion.federation.private_fitting import OPENING
from fusion.keys import SigningKey
from fusion.membership import MIN_MODELS, MembershipResult
from fusion.privacy import MinimumCounts
from tests.hospitals import leave_draft, patients, protocol, settings_at

if TYPE_CHECKING:
    from collections.abc import Callable

    from flows.protocol import StudyProtocol
    from fusion.federation.site import SiteStudy
    from infra.settings import SiteSettings

pytestmark = pytest.mark.border

SITES = ("site-01", "site-02", "site-03")
SITE = SITES[0]
RUN = "1" * 64
KEYS = {name: SigningKey(name.encode().ljust(32, b".")) for name in (COORDINATOR, *SITES[1:])}
STUDY = protocol()


@dataclass
class Site:
    """A site of three, with its cohort, and what the other two have approved."""

    settings: SiteSettings
    study: StudyProtocol
    consortium: Consortium
    opened: list[SiteStudy] = field(default_factory=list)

    def part(self, study: StudyProtocol | None = None) -> SitePart:
        return SitePart(self.settings, study or self.study, self.consortium)

    def gate(self, part: SitePart | None = None) -> Callable[[m.Message], m.Message]:
        part = part or self.part()

        def open_study(run: str) -> SiteStudy:
            self.opened.append(part.open_study(run))
            return self.opened[-1]

        gate = SiteGate(
            permits=part.permits, cohort=part.cohort, open_study=open_study, on_error=note
        )
        return lambda request: m.decode(gate.answer(m.encode(request)))

    def approve(self, study: StudyProtocol | None = None) -> None:
        """Sign a study in this site's name, with the limits that it has now."""
        study = study or self.study
        limits = settings_digest(own_limits(self.settings, study))
        statement = stated(study, self.consortium, settings=limits)
        approval = approve(statement, SITE, identity(self.settings.home))
        write_approval(approval, self.settings.path(FOLDER))

    def introduction(self, *others: str, **change: Any) -> m.Introduce:
        statement = stated(self.study, self.consortium, settings="5" * 64)
        brought = [approve(statement, site, KEYS[site]) for site in others]
        request = m.Introduce(
            statement.protocol, statement.code, statement.consortium, *approval_fields(brought)
        )
        return replace(request, **change)

    def describe(self, run: str = RUN) -> m.Describe:
        return m.Describe(run, self.study.fingerprint(), self.study.modalities, True)


@cache
def draft_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_at(Path(folder), SITE)
        leave_draft(settings, patients(160, 1), STUDY)
        return settings.path(COHORT).read_bytes()


def site_at(root: Path, *, draft: bool = True, **limits: int) -> Site:
    settings = settings_at(root, SITE, **limits)
    if draft:
        settings.home.mkdir(parents=True)
        settings.path(COHORT).write_bytes(draft_bytes())
    keys = {SITE: identity(settings.home).public} | {x: KEYS[x].public for x in SITES[1:]}
    return Site(settings, STUDY, Consortium("small", KEYS[COORDINATOR].public, keys, quorum=2))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    found = site_at(tmp_path)
    found.approve()
    return found


def code(reply: m.Message) -> str:
    assert isinstance(reply, m.Refused), reply
    return reply.code


def test_an_approved_run_is_let_in_described_and_answered(site: Site) -> None:
    ask = site.gate()
    assert ask(site.introduction("site-02")) == m.Introduced(site.part().cohort())
    found = ask(site.describe())
    assert isinstance(found, m.Description)
    assert found.trains
    assert found.n_train == 120
    assert isinstance(ask(m.AskMoments(RUN, 1, ("clinical",))), m.DesignMoments)
    assert site.settings.path(ANSWERED).is_file()


def test_what_a_site_is_warned_of_stands_in_its_own_log(site: Site) -> None:
    log_to(site.settings.home)
    warn = site.part().open_study(RUN)._on_warning
    assert warn is not None
    warn("held-out patients: found that nothing fits")
    log = (site.settings.home / "logs" / "consilium.log").read_text()
    assert "WARNING held-out patients: found that nothing fits" in log


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"protocol": "a" * 64}, "wrong_protocol"),
        ({"code": "a" * 64}, "not_approved"),
        ({"consortium": "a" * 64}, "not_approved"),
        ({"signatures": np.zeros((1, 64), np.uint8)}, "not_approved"),
        ({"settings": ("6" * 64,)}, "not_approved"),
        ({"sites": ("site-03",)}, "not_approved"),
        ({"sites": (SITE,)}, "not_approved"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else x,
)
def test_a_run_of_anything_else_is_turned_away(
    site: Site, change: dict[str, Any], expected: str
) -> None:
    ask = site.gate()
    assert code(ask(site.introduction("site-02", **change))) == expected
    assert code(ask(site.describe())) == "not_approved"
    assert not site.settings.path(ANSWERED).exists()


def test_without_its_quorum_or_its_own_approval_a_site_does_not_run(site: Site) -> None:
    site.consortium = replace(site.consortium, quorum=3)
    assert code(site.gate()(site.introduction("site-02", "site-03"))) == "not_approved"
    site.approve()  # in this consortium
    assert code(site.gate()(site.introduction("site-02"))) == "not_approved"
    assert isinstance(site.gate()(site.introduction("site-02", "site-03")), m.Introduced)
    site.settings.path(FOLDER, f"{SITE}.json").unlink()
    assert code(site.gate()(site.introduction("site-02", "site-03"))) == "not_approved"


def test_a_changed_protocol_at_the_site_needs_another_approval(site: Site) -> None:
    part = site.part(protocol(fusion={"ridge": 0.02}))
    assert code(site.gate(part)(site.introduction("site-02"))) == "wrong_protocol"


def test_another_sites_approval_is_not_its_own(site: Site) -> None:
    path = site.settings.path(FOLDER, f"{SITE}.json")
    statement = read_approvals(path.parent)[0].statement
    write_approval(approve(statement, SITE, KEYS["site-02"]), path.parent)  # signed by another
    assert code(site.gate()(site.introduction("site-02", "site-03"))) == "not_approved"


def test_limits_that_a_site_changed_are_approved_anew(site: Site) -> None:
    site.settings = site.settings.model_copy(update={"limits": {"cell": 12}})
    assert code(site.gate()(site.introduction("site-02"))) == "not_approved"
    site.approve()
    assert isinstance(site.gate()(site.introduction("site-02")), m.Introduced)


NETWORK = {"blood": {"model": "mlp", "sharing": "weights", "hidden": 2, "rounds": 3}}
PASSING = MembershipResult(
    "blood", 300, 150, MIN_MODELS, 0.55, 0.52, 0.58, 0.06, 0.05, 0.07, 0.51, 0.5, 0.52
)


@pytest.mark.parametrize(
    ("shared", "audited"),
    [
        ({"encoder": NETWORK}, ("blood",)),
        ({"fusion": {"model": "gated"}}, ("fusion",)),
        ({"encoder": NETWORK, "fusion": {"model": "gated"}}, ("blood", "fusion")),
    ],
    ids=["weights", "gated", "both"],
)
def test_networks_of_patients_leave_only_after_a_passed_audit_of_each(
    tmp_path: Path, shared: dict[str, Any], audited: tuple[str, ...]
) -> None:
    section = {**STUDY.study.model_dump(mode="json"), "data": "patients"}
    secure = {"sums": "secure_sum"}
    study = protocol(study=section, federation=secure, privacy={}, **shared)
    site = replace(site_at(tmp_path, draft=False), study=study)
    leave_draft(site.settings, patients(160, 1), study)
    site.approve()

    def reply(*results: MembershipResult) -> m.Message:
        if results:
            cohort = site.part().cohort()
            write_results(site.settings, study, list(results), cohort=cohort)
        return site.gate()(site.introduction("site-02"))

    passing = [replace(PASSING, name=name) for name in audited]
    assert code(reply()) == "not_approved"
    for one in range(len(passing)):
        failing = replace(passing[one], auc=0.61)
        assert code(reply(*passing[:one], failing, *passing[one + 1 :])) == "not_approved"
    assert code(reply(replace(PASSING, name="clinical"))) == "not_approved"
    assert isinstance(reply(*passing), m.Introduced)


def test_a_damaged_approval_is_a_code(site: Site) -> None:
    path = site.settings.path(FOLDER, f"{SITE}.json")
    path.write_bytes(path.read_bytes()[:-20])
    assert code(site.gate()(site.introduction("site-02"))) == "site_error"
    assert code(site.gate()(site.describe())) == "not_approved"


def test_a_site_without_a_cohort_says_so_as_a_code(tmp_path: Path) -> None:
    site = site_at(tmp_path, draft=False)
    site.approve()
    ask = site.gate()
    assert code(ask(site.introduction("site-02"))) == "site_error"
    assert code(ask(site.describe())) == "not_approved"


def test_after_a_withdrawal_a_site_takes_no_part(site: Site) -> None:
    site.gate()(site.introduction("site-02"))
    table = patients(160, 1)
    withdraw(site.settings, table.index[7])
    leave_draft(site.settings, table.drop(index=table.index[7]), STUDY)
    ask = site.gate()
    assert isinstance(ask(site.introduction("site-02")), m.Refused)
    assert code(ask(site.describe())) == "not_approved"


def test_a_withdrawal_names_the_runs_that_its_gate_let_in(site: Site) -> None:
    for run in ("2" * 64, RUN):
        ask = site.gate()
        ask(site.introduction("site-02"))
        assert isinstance(ask(site.describe(run)), m.Description)
        _close(site.opened.pop())
    assert withdraw(site.settings, patients(160, 1).index[7]).runs == (RUN, "2" * 64)


def test_a_run_is_noted_beside_the_snapshot_that_it_reads(site: Site) -> None:
    ask, table = site.gate(), patients(180, 1)
    ask(site.introduction("site-02"))
    leave_draft(site.settings, table.iloc[20:], STUDY)  # a night goes by
    ask(site.describe())
    assert withdraw(site.settings, table.index[7]).runs == (RUN,)


def test_a_restarted_site_remembers_what_it_told(site: Site) -> None:
    def asked(value: float, run: int) -> m.Message:
        part = site.part()
        study = part.open_study(f"{run:064x}")
        request = m.AskSums(study.plan.run, 1, ("clinical",), np.full((1, 2), value))
        ones = np.ones((1, 2))
        study.answer(m.encode(m.SetScaling(study.plan.run, 1, ("clinical",), 50 * ones, ones)))
        reply = m.decode(study.answer(m.encode(request)))
        _close(study)
        return reply

    first, size = asked(0.1, 1), site.settings.path(ANSWERED).stat().st_size
    assert isinstance(first, m.Sums)
    again = asked(0.1, 2)
    assert isinstance(again, m.Sums)
    np.testing.assert_array_equal(again.information, first.information)
    assert site.settings.path(ANSWERED).stat().st_size == size
    asked(0.2, 3)
    assert site.settings.path(ANSWERED).stat().st_size > size


def noisy_release(site: Site, run: str) -> bytes:
    """What leaves a site in a run that it takes part in, as a process of its own would answer."""
    ask = site.gate()
    assert isinstance(ask(site.introduction("site-02")), m.Introduced)
    assert isinstance(ask(site.describe(run)), m.Description)
    reply = ask(m.AskPrivateSteps(run, 1, OPENING, (PROTOCOL,), np.zeros((1, 4))))
    _close(site.opened.pop())  # it lets go of its files, as a process that ends does
    return m.encode(reply)


def noisy_releases(site: Site) -> list[bytes]:
    """What leaves run after run, until nothing does; noise is drawn anew for each, so all cost."""
    found: list[bytes] = []
    while len(found) < 40:
        reply = noisy_release(site, f"{len(found):064x}")
        if m.decode(reply) == m.Refused("budget_spent"):
            break
        assert isinstance(m.decode(reply), m.PrivateSteps)
        found.append(reply)
    return found


def test_a_budget_is_spent_over_runs_and_restarts_and_a_sites_own_smaller_one_holds(
    tmp_path: Path,
) -> None:
    study = protocol(differential_privacy={"epsilon": 1.0})
    answered = {}
    for own in (None, 0.6):
        site = replace(site_at(tmp_path / str(own), draft=False), study=study)
        site.settings = site.settings.model_copy(update={"epsilon": own})
        leave_draft(site.settings, patients(160, 1), study)
        site.approve()
        answered[own] = noisy_releases(site)
        again = noisy_releases(site)  # the very same runs cost nothing, and get the same noise
        assert again == answered[own]
        allowed = own or 1.0
        ledger = PrivacyLedger(site.settings.path(PRIVACY), epsilon=allowed, delta=1e-5)
        assert 0.5 * allowed < ledger.spent() <= allowed
    assert 0 < len(answered[0.6]) < len(answered[None]) < 40


def _close(study: SiteStudy) -> None:
    study._book.ledger.close()


LIMITS = st.fixed_dictionaries(
    {},
    optional={
        name: st.integers(2, 12) if name == "intervals" else st.integers(1, 200)
        for name in MinimumCounts.model_fields
    },
)


@given(own=LIMITS, asked=LIMITS)
def test_of_its_own_limits_and_the_studys_those_hold_that_protect_more(
    own: dict[str, int], asked: dict[str, int]
) -> None:
    settings = settings_at_nowhere(own)
    study = protocol(privacy={"intervals": 12} | asked)
    found = own_limits(settings, study).model_dump()
    for name, value in study.privacy.model_dump().items():
        protects_more = min if name == "intervals" else max
        assert found[name] == protects_more(value, own.get(name, value))


def settings_at_nowhere(limits: dict[str, int]) -> SiteSettings:
    return settings_at(Path("nowhere"), SITE, **limits)


def test_a_limit_that_there_is_not_is_an_error() -> None:
    with pytest.raises(ValidationError, match="patient"):
        own_limits(settings_at_nowhere({"patient": 80}), STUDY)


def test_the_digest_of_the_settings_tells_every_limit_apart() -> None:
    of = [settings_digest(own_limits(settings_at_nowhere({}), STUDY))]
    for name, value in STUDY.privacy.model_dump().items():
        more = value - 1 if name == "intervals" else value + 1
        less = value + 1 if name == "intervals" else value - 1
        of.append(settings_digest(own_limits(settings_at_nowhere({name: more}), STUDY)))
        # What protects less does not hold, and is not approved either.
        assert settings_digest(own_limits(settings_at_nowhere({name: less}), STUDY)) == of[0]
    assert len(set(of)) == len(of)


@pytest.mark.parametrize(
    ("limits", "shown"),
    [
        ({}, (120, True)),
        ({"patients": 40}, (120, True)),
        ({"patients": 121}, (0, False)),
        ({"events": 119}, (0, False)),
        ({"patients_per_input": 31}, (0, False)),
    ],
    ids=str,
)
def test_a_sites_own_limits_hold_in_a_run(
    tmp_path: Path, limits: dict[str, int], shown: tuple[int, bool]
) -> None:
    site = site_at(tmp_path, **limits)
    site.approve()
    ask = site.gate()
    ask(site.introduction("site-02"))
    found = ask(site.describe())
    assert isinstance(found, m.Description)
    assert (found.n_train, found.trains) == shown
    if not found.trains:
        assert code(ask(m.AskMoments(RUN, 1, ("protocol",)))) == "below_minimum_patients"


def test_a_sites_own_most_intervals_hold_in_a_run(tmp_path: Path) -> None:
    study = protocol(
        study={
            "name": "small", "data": "simulated", "horizon_days": 730,
            "grid_days": [200, 365, 730],
        }
    )  # fmt: skip
    site = site_at(tmp_path, draft=False, intervals=2)
    leave_draft(site.settings, patients(400, 1), study)
    ask = site.part(study).open_study(RUN)
    grid = m.SetGrid(RUN, 1, np.array([200.0, 365.0, 730.0]))
    reply = m.decode(ask.answer(m.encode(grid)))
    _close(ask)
    assert isinstance(reply, m.Refused)


def test_a_study_is_approved_from_its_folder_with_the_sites_limits(tmp_path: Path) -> None:
    site = site_at(tmp_path, draft=False)
    (tmp_path / "study.toml").write_text(
        '[study]\nname = "small"\ndata = "simulated"\nhorizon_days = 730\n'
        'grid_days = [365, 730]\n[modality.clinical]\nkind = "clinical"\nnumeric = ["age"]\n'
    )
    (site.settings.home / "site.toml").write_text(
        f'name = "{SITE}"\nsecret = "{"s" * 32}"\nlimits = {{patients = 70, cell = 2}}\n'
    )
    said: list[str] = []
    approval = approve_at(tmp_path, SITE, site.consortium, say=said.append)
    expected = settings_digest(MinimumCounts(patients=70))
    assert approval.statement.settings == expected
    assert any(expected in line for line in said)
    assert read_approvals(site.settings.path(FOLDER)) == [approval]


def test_a_site_from_its_disk_answers_signed_envelopes_only(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.gate.load_protocol", lambda _: STUDY)
    (site.settings.home / "site.toml").write_text(
        f'name = "{SITE}"\nsecret = "{SITE.ljust(32, ".")}"\n'
    )
    handle = open_site(tmp_path, SITE, site.consortium)

    def ask(request: m.Message, number: int, *, key: SigningKey = KEYS[COORDINATOR]) -> m.Message:
        envelope = Envelope(
            "small", 1, number, COORDINATOR, (SITE,), "", (0, "0" * 64), m.encode(request)
        )
        reply = unseal(handle(seal(envelope, key=key)), consortium=site.consortium)
        assert (reply.sender, reply.receivers) == (SITE, (COORDINATOR,))
        return m.decode(reply.payload)

    assert code(ask(site.describe(), 1)) == "not_approved"
    forged = ask(site.introduction("site-02"), 2, key=KEYS["site-02"])
    assert code(forged) == "bad_signature"
    assert isinstance(ask(site.introduction("site-02"), 3), m.Introduced)
    assert code(ask(site.describe(), 3)) == "replayed"
    assert isinstance(ask(site.describe(), 4), m.Description)
