"""A site's end of a federation between machines: from its own files to a function on bytes."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from flows.approvals import FOLDER as APPROVALS
from flows.approvals import approve_study, permit, read_approvals, statement_of
from flows.identity import identity
from flows.inputs import site_rows
from flows.loading import encoder_key, load_encoders, load_inputs
from flows.protocol import load_protocol
from flows.sealed import log_to, note, warn
from flows.snapshots import record_run, released
from fusion.audit import LOG_FILE, AuditLog
from fusion.differential_privacy import PrivacyLedger
from fusion.federation import SiteStudy
from fusion.federation.answered import AnswerLedger
from fusion.federation.envelope import SiteDesk
from fusion.federation.gate import SiteGate
from fusion.federation.masking import SiteIdentity
from fusion.keys import canonical_json, digest
from infra.settings import Workspace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flows.approvals import Approval
    from flows.protocol import StudyProtocol
    from flows.snapshots import Released
    from fusion import messages as m
    from fusion.federation import SiteRows
    from fusion.federation.consortium import Consortium
    from fusion.privacy import MinimumCounts, Refusal
    from infra.settings import SiteSettings

PRIVACY = "privacy.jsonl"
ANSWERED = "answered.jsonl"


def own_limits(settings: SiteSettings, protocol: StudyProtocol) -> MinimumCounts:
    """Limits that hold at a site: of the protocol's and its own, those that protect more.

    Raises
    ------
    pydantic.ValidationError
        If the site's own limits name one that there is not.
    """
    asked = protocol.privacy
    own = type(asked).model_validate(asked.model_dump() | dict(settings.limits))
    return asked.strictest(own)


def privacy_ledger(settings: SiteSettings, protocol: StudyProtocol) -> PrivacyLedger | None:
    """Give the site's only record of noisy releases, over all studies; None without a budget."""
    budget = protocol.differential_privacy
    if not budget.is_on:
        return None
    epsilon = budget.epsilon if settings.epsilon is None else settings.epsilon
    return PrivacyLedger(settings.path(PRIVACY), epsilon=epsilon, delta=budget.delta)


def settings_digest(limits: MinimumCounts) -> str:
    """Digest of the limits that hold at a site: what it approves beside the protocol."""
    return digest(canonical_json(limits.model_dump()))


def approve_at(
    root: Path, site: str, consortium: Consortium, *, say: Callable[[str], None]
) -> Approval:
    """Approve the study of a folder in the name of a site, after saying what is approved.

    Raises
    ------
    infra.settings.SettingsError, flows.protocol.ProtocolError, ValueError
        If a file cannot be read, or the consortium does not list this site with its key.
    """
    workspace = Workspace(root=root)
    settings, protocol = workspace.site(site), load_protocol(workspace.study_file)
    return approve_study(
        root,
        settings.home,
        site=site,
        key=identity(settings.home),
        consortium=consortium,
        settings=settings_digest(own_limits(settings, protocol)),
        say=say,
    )


class SitePart:
    """What one site brings to a run: its approval, its released cohort, its limits.

    Parameters
    ----------
    settings, protocol, consortium
        The site's own copies.
    """

    def __init__(
        self, settings: SiteSettings, protocol: StudyProtocol, consortium: Consortium
    ) -> None:
        self._settings, self._protocol, self._consortium = settings, protocol, consortium
        self._key = identity(settings.home)

    @property
    def roster(self) -> tuple[str, ...]:
        """Names of the consortium's sites, for the lock on cohorts."""
        return tuple(sorted(self._consortium.sites))

    @cached_property
    def snapshot(self) -> Released:
        """The cohort that is released to this run, whatever the nights bring meanwhile."""
        return released(self._settings, self._protocol, roster=self.roster)

    @cached_property
    def rows(self) -> SiteRows:
        """Rows of the released snapshot."""
        inputs = load_inputs(self._settings, self._protocol, snapshot=self.snapshot)
        local = load_encoders(self._settings, self._protocol, inputs, weights=False)
        return site_rows(inputs, local, self._protocol)

    def permits(self, request: m.Introduce) -> Refusal | None:
        """Why this run is turned away, or None: its own approval and the quorum's must stand."""
        limits = own_limits(self._settings, self._protocol)
        refusal = permit(
            request,
            statement=statement_of(
                self._protocol, self._consortium, settings=settings_digest(limits)
            ),
            approvals=read_approvals(self._settings.path(APPROVALS)),
            site=self._settings.name,
            consortium=self._consortium,
        )
        return refusal or self._unaudited()

    def _unaudited(self) -> Refusal | None:
        """Why networks do not leave this site, or None: each needs a passed membership audit."""
        audited = self._protocol.audited()
        if not audited:
            return None
        # Its imports would make every job begin later, and few studies share weights.
        from flows.membership import may_share_weights

        for name in audited:
            key = encoder_key(self.rows.cohort, self._protocol, name)
            if not may_share_weights(self._settings, self._protocol, name, key):
                return "not_approved"
        return None

    def cohort(self) -> str:
        """Digest, under the site's secret, of the cohort that takes part."""
        return self.rows.cohort

    def open_study(self, run: str) -> SiteStudy:
        """Take part in the run of this name."""
        settings, protocol = self._settings, self._protocol
        record_run(settings, self.snapshot.number, run)
        ledger = AnswerLedger(settings.path(ANSWERED))
        book = ledger.open(digest(canonical_json([protocol.fingerprint(), self.rows.cohort])))
        return SiteStudy(
            protocol.plan(run, minimum=own_limits(settings, protocol)),
            self.rows,
            identity=SiteIdentity(settings.name, self._key, self._consortium.sites),
            book=book,
            ledger=privacy_ledger(settings, protocol),
            on_error=note,
            on_warning=warn,
        )


def open_site(root: Path, site: str, consortium: Consortium) -> Callable[[bytes], bytes]:
    """Give the function that answers the coordinator's signed requests at a site.

    Parameters
    ----------
    root
        Folder with ``study.toml`` and the site.

    Raises
    ------
    infra.settings.SettingsError, flows.protocol.ProtocolError
        If either file cannot be read.
    """
    workspace = Workspace(root=root)
    settings, protocol = workspace.site(site), load_protocol(workspace.study_file)
    log_to(settings.home)
    part = SitePart(settings, protocol, consortium)
    gate = SiteGate(
        permits=part.permits, cohort=part.cohort, open_study=part.open_study, on_error=note
    )
    key = identity(settings.home)
    log = AuditLog(settings.path(LOG_FILE), party=settings.name, key=key)
    desk = SiteDesk(
        gate.answer, site=settings.name, key=key, consortium=consortium, log=log, on_error=note
    )
    return desk.handle
