from __future__ import annotations

import json
import os
import struct
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion import messages as m
from fusion.audit import HEAD_SEEN, LOG_FILE, NOTHING, AuditLog, verify_log, witnesses_of
from fusion.federation import envelope as envelope_module
from fusion.federation.consortium import COORDINATOR, Consortium
from fusion.federation.envelope import (
    MAX_ENVELOPE_BYTES,
    Envelope,
    EnvelopeError,
    SignedTransport,
    SiteDesk,
    envelope_id,
    seal,
    unseal,
)
from fusion.keys import SigningKey, canonical_json, digest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

pytestmark = pytest.mark.border

RUN = "1" * 64
SITES = ("site-01", "site-02", "site-03")
KEYS = {
    name: SigningKey(bytes([at]) * 32)
    for at, name in enumerate((COORDINATOR, *SITES, "site-04", "thief"), 1)
}
CONSORTIUM = Consortium(
    study="lung-os",
    coordinator=KEYS[COORDINATOR].public,
    sites={site: KEYS[site].public for site in SITES},
    quorum=2,
)
PAYLOAD = m.encode(m.AskEdges(RUN, 7, np.array([1.0, 2.0])))
REPLY = m.encode(m.Edges(np.array([True])))


def request(**changes: Any) -> Envelope:
    values = {
        "study": "lung-os", "session": 10, "number": 1, "sender": COORDINATOR, "receivers": SITES,
        "in_reply_to": "", "audit": (0, NOTHING), "payload": PAYLOAD,
    }  # fmt: skip
    return Envelope(**{**values, **changes})


def sealed(key: str = COORDINATOR, **changes: Any) -> bytes:
    return seal(request(**changes), key=KEYS[key])


@dataclass
class Site:
    """One site's desk, and what was asked of the study behind it."""

    log: AuditLog | None = None
    name: str = "site-01"
    consortium: Consortium = CONSORTIUM
    asked: list[bytes] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    answer: Callable[[bytes], bytes] = lambda _: REPLY

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.desk = SiteDesk(
            self._answered, site=self.name, key=KEYS[self.name], consortium=self.consortium,
            log=self.log, on_error=self.errors.append,
        )  # fmt: skip

    def _answered(self, payload: bytes) -> bytes:
        self.asked.append(payload)
        return self.answer(payload)

    def says(self, data: bytes) -> m.Message:
        """Message in the envelope that comes back, which this site must have signed."""
        raw = self.desk.handle(data)
        reply = unseal(raw, consortium=CONSORTIUM)
        assert (reply.sender, reply.receivers) == (self.name, (COORDINATOR,))
        assert reply.in_reply_to == envelope_id(data)
        return m.decode(reply.payload)

    def refuses(self, data: bytes) -> str:
        """Code of a refusal; the study behind the desk was not asked."""
        before = len(self.asked)
        found = self.says(data)
        assert isinstance(found, m.Refused)
        assert len(self.asked) == before
        if self.log is not None:
            assert [e.about.get("code") for e in self.log.entries()][-1] == found.code
        return found.code


def log_of(folder: Path, party: str = "site-01") -> AuditLog:
    return AuditLog(folder / party / LOG_FILE, party=party, key=KEYS[party])


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(log_of(tmp_path))


def test_what_is_sealed_is_opened() -> None:
    data = sealed(audit=(3, "a" * 64))
    assert unseal(data, consortium=CONSORTIUM) == request(audit=(3, "a" * 64))
    size = struct.unpack_from("<5sI", data)[1]
    header = json.loads(data[9 : 9 + size])
    assert header == {
        "study": "lung-os", "session": 10, "number": 1, "sender": COORDINATOR,
        "receivers": list(SITES), "in_reply_to": "", "audit": [3, "a" * 64],
        "payload": digest(PAYLOAD),
    }  # fmt: skip
    assert data[9 + size : -64] == PAYLOAD


@pytest.mark.parametrize(
    "changes",
    [
        {"study": "Lung"}, {"session": -1}, {"session": 2**63}, {"number": 1.0}, {"number": True},
        {"sender": "a b"}, {"receivers": ()}, {"receivers": ("site-01", "site-01")},
        {"receivers": ("A",)}, {"in_reply_to": "a"}, {"audit": (0, "")}, {"audit": (-1, NOTHING)},
        {"audit": (0,)}, {"payload": bytes(m.MAX_BYTES + 1)},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_an_impossible_envelope_is_not_sealed(changes: dict[str, Any]) -> None:
    with pytest.raises(EnvelopeError, match="envelope: ") as found:
        sealed(**changes)
    assert found.value.code == "malformed_request"


def resealed(header: bytes, payload: bytes = PAYLOAD) -> bytes:
    signed = b"CNSE1" + struct.pack("<I", len(header)) + header
    return signed + payload + KEYS[COORDINATOR].sign(signed)


def header_with(**changes: Any) -> bytes:
    data = sealed()
    size = struct.unpack_from("<5sI", data)[1]
    values = json.loads(data[9 : 9 + size]) | changes
    return canonical_json({name: value for name, value in values.items() if value is not None})


@pytest.mark.border
@pytest.mark.parametrize(
    "data",
    [
        b"", b"CNSE1", bytes(200), sealed()[:-1], sealed() + b"x", bytes(MAX_ENVELOPE_BYTES + 1),
        resealed(b"{}"), resealed(b"[]"), resealed(b"[" * 50_000), resealed(b"\xff"),
        resealed(header_with(more=1)), resealed(header_with(audit=None)),
        resealed(header_with(session="10")), resealed(header_with(number=float(2))),
        resealed(header_with(receivers="site-01")), resealed(header_with(receivers=[])),
        resealed(header_with(receivers=[["site-01"]])), resealed(header_with(payload="")),
        resealed(header_with(audit={"0": 1, "1": 2})), resealed(header_with(sender=3)),
        resealed(header_with() + b" "), resealed(b" " * 70_000),
        resealed(header_with(), b"another"), b"CNSE1" + b"\xff" * 4 + bytes(100),
    ],
    ids=range(24),
)  # fmt: skip
def test_bytes_that_are_no_envelope_are_refused_by_code(site: Site, data: bytes) -> None:
    assert site.refuses(data) in ("malformed_request", "bad_signature")


@pytest.mark.border
@given(at=st.integers(0, len(sealed()) - 1), mask=st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_a_request_with_any_flipped_byte_is_refused(at: int, mask: int) -> None:
    data = bytearray(sealed())
    data[at] ^= mask
    code = Site().refuses(bytes(data))
    assert code in ("malformed_request", "bad_signature", "unknown_sender")


def test_a_request_is_answered_and_both_are_logged(site: Site) -> None:
    assert site.says(sealed(audit=(4, "a" * 64))) == m.decode(REPLY)
    assert site.asked == [PAYLOAD]
    assert site.log is not None
    head, asked, replied = site.log.entries()
    assert (head.kind, head.about) == (
        HEAD_SEEN, {"party": COORDINATOR, "number": 4, "head": "a" * 64},
    )  # fmt: skip
    assert (asked.kind, asked.about) == (
        "request",
        {
            "study": "lung-os", "coordinator": KEYS[COORDINATOR].public, "session": 10,
            "number": 1, "message": "ask_edges", "round": 7, "digest": digest(PAYLOAD),
        },
    )  # fmt: skip
    assert (replied.kind, replied.about) == (
        "reply", {"session": 10, "number": 1, "message": "edges", "digest": digest(REPLY)},
    )  # fmt: skip


def test_the_study_s_own_refusal_is_logged_with_its_code(site: Site) -> None:
    site.answer = lambda _: m.encode(m.Refused("small_cell"))
    assert site.says(sealed()) == m.Refused("small_cell")
    assert site.log is not None
    assert site.log.entries()[-1].about["code"] == "small_cell"


def test_bytes_that_are_no_message_are_the_study_s_to_refuse(site: Site) -> None:
    site.answer = lambda _: m.encode(m.Refused("malformed_request"))
    assert site.says(sealed(payload=b"nonsense")) == m.Refused("malformed_request")
    assert site.log is not None
    assert site.log.entries()[0].about["message"] == "unreadable"


@pytest.mark.border
def test_a_replayed_request_is_refused(site: Site) -> None:
    data = sealed()
    assert site.says(data) == m.decode(REPLY)
    assert site.refuses(data) == "replayed"
    assert site.refuses(data) == "replayed"
    assert len(site.asked) == 1


@pytest.mark.border
def test_a_reordered_request_is_refused(site: Site) -> None:
    assert site.says(sealed(number=5)) == m.decode(REPLY)  # 2 to 4 were for other sites
    assert site.refuses(sealed(number=4)) == "replayed"
    assert site.refuses(sealed(number=5)) == "replayed"
    assert site.says(sealed(number=6)) == m.decode(REPLY)


@pytest.mark.border
def test_a_request_of_an_older_session_is_refused(site: Site) -> None:
    assert site.says(sealed(session=20)) == m.decode(REPLY)
    assert site.refuses(sealed(session=19, number=99)) == "replayed"
    assert site.says(sealed(session=21)) == m.decode(REPLY)
    assert site.refuses(sealed(session=20, number=2)) == "replayed"


@pytest.mark.border
def test_a_site_that_starts_again_refuses_what_it_answered_before(site: Site) -> None:
    assert site.says(sealed(session=20, number=3)) == m.decode(REPLY)
    site.start()
    assert site.refuses(sealed(session=20, number=3)) == "replayed"
    assert site.refuses(sealed(session=19, number=4)) == "replayed"
    assert site.says(sealed(session=20, number=4)) == m.decode(REPLY)


@pytest.mark.border
def test_a_site_killed_while_answering_refuses_the_same_request_afterwards(site: Site) -> None:
    def killed(_: bytes) -> bytes:
        raise KeyboardInterrupt

    site.answer = killed
    with pytest.raises(KeyboardInterrupt):
        site.desk.handle(sealed())
    site.answer = lambda _: REPLY
    site.start()
    assert site.refuses(sealed()) == "replayed"
    assert site.says(sealed(number=2)) == m.decode(REPLY)


@pytest.mark.border
def test_two_desks_of_a_site_answer_a_request_once(tmp_path: Path) -> None:
    both = Site(log_of(tmp_path)), Site(log_of(tmp_path))
    replies: list[m.Message] = []
    data = [sealed(number=number) for number in range(1, 11)]

    def ask(site: Site) -> None:
        replies.extend(site.says(one) for one in data)

    threads = [threading.Thread(target=ask, args=(site,)) for site in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = len(both[0].asked) + len(both[1].asked)
    assert asked <= 10
    assert replies.count(m.Refused("replayed")) == 20 - asked
    assert both[0].refuses(sealed(number=10)) == both[1].refuses(sealed(number=10)) == "replayed"


@pytest.mark.border
def test_another_study_s_numbers_do_not_count(site: Site) -> None:
    assert site.says(sealed(session=20)) == m.decode(REPLY)
    other = replace(CONSORTIUM, study="breast-os")
    desk = SiteDesk(lambda _: REPLY, site="site-01", key=KEYS["site-01"], consortium=other,
                    log=site.log)  # fmt: skip
    reply = unseal(desk.handle(sealed(study="breast-os")), consortium=other)
    assert reply.payload == REPLY
    assert site.refuses(sealed(study="breast-os", session=30)) == "malformed_request"


@pytest.mark.border
@pytest.mark.parametrize(
    ("key", "changes", "code"),
    [
        ("thief", {}, "bad_signature"),
        ("site-02", {}, "bad_signature"),
        ("thief", {"sender": "thief"}, "unknown_sender"),
        ("site-04", {"sender": "site-04"}, "unknown_sender"),
        ("site-02", {"sender": "site-02"}, "unknown_sender"),
        ("site-01", {"sender": "site-01"}, "unknown_sender"),
        (COORDINATOR, {"receivers": ("site-02", "site-03")}, "malformed_request"),
        (COORDINATOR, {"in_reply_to": "a" * 64}, "malformed_request"),
        (COORDINATOR, {"number": 0}, "malformed_request"),
    ],
)
def test_a_request_of_anyone_else_or_for_someone_else_is_refused(
    site: Site, key: str, changes: dict[str, Any], code: str
) -> None:
    assert site.refuses(sealed(key, **changes)) == code
    assert site.says(sealed()) == m.decode(REPLY)  # and no number is lost by it


@pytest.mark.border
def test_a_revoked_coordinator_is_refused(tmp_path: Path) -> None:
    revoked = replace(CONSORTIUM, revoked=(KEYS[COORDINATOR].public,))
    assert Site(log_of(tmp_path), consortium=revoked).refuses(sealed()) == "unknown_sender"


@pytest.mark.border
def test_a_site_s_reply_is_no_request(site: Site) -> None:
    reply = site.desk.handle(sealed())
    assert Site(name="site-02").refuses(reply) == "unknown_sender"


@pytest.mark.border
def test_what_goes_wrong_leaves_as_a_code(site: Site) -> None:
    def broken(_: bytes) -> bytes:
        raise RuntimeError("patient 17")

    site.answer = broken
    raw = site.desk.handle(sealed())
    assert b"patient" not in raw
    assert m.decode(unseal(raw, consortium=CONSORTIUM).payload) == m.Refused("site_error")
    assert list(map(str, site.errors)) == ["patient 17"]


@pytest.mark.border
def test_a_site_that_cannot_log_a_request_does_not_answer_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", _full)
    assert site.says(sealed()) == m.Refused("site_error")
    assert site.asked == []
    assert len(site.errors) == 2
    monkeypatch.undo()
    assert site.refuses(sealed()) == "replayed"
    assert site.says(sealed(number=2)) == m.decode(REPLY)


@pytest.mark.border
def test_a_reply_that_cannot_be_logged_does_not_leave(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def filled(_: bytes) -> bytes:
        monkeypatch.setattr(os, "write", _full)
        return REPLY

    site.answer = filled
    assert site.says(sealed()) == m.Refused("site_error")


def _full(*_: Any) -> int:
    raise OSError(28, "No space left on device")


def test_a_desk_needs_the_key_that_the_consortium_lists() -> None:
    for name, text in (("site-01", "found another key"), ("site-04", "does not list")):
        with pytest.raises(ValueError, match=text):
            SiteDesk(lambda _: REPLY, site=name, key=KEYS["thief"], consortium=CONSORTIUM, log=None)
    with pytest.raises(ValueError, match="coordinator: found another key"):
        SignedTransport(Carried({}), consortium=CONSORTIUM, key=KEYS["thief"])


class Carried:
    """Carries envelopes to desks in this process; what comes back can be spoiled."""

    def __init__(self, sites: dict[str, Site]) -> None:
        self.places = sites
        self.spoil: Callable[[str, bytes], bytes | None] = lambda _, raw: raw
        self.sent: list[bytes] = []
        self.replies: dict[str, list[bytes]] = {site: [] for site in sites}

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.places)

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        self.sent.append(payload)
        found = {}
        for site in sites:
            raw = self.spoil(site, self.places[site].desk.handle(payload))
            if raw is not None:
                found[site] = raw
                self.replies[site].append(raw)
        return found


@dataclass
class Federation:
    """A coordinator and three sites, each with its log."""

    folder: Path

    def __post_init__(self) -> None:
        self.logs = {name: log_of(self.folder, name) for name in (COORDINATOR, *SITES)}
        self.places = {name: Site(self.logs[name], name) for name in SITES}
        self.carried = Carried(self.places)
        self.transport = self.started(session=10)

    def started(self, **options: Any) -> SignedTransport:
        options = {"consortium": CONSORTIUM, "log": self.logs[COORDINATOR], **options}
        return SignedTransport(self.carried, key=KEYS[COORDINATOR], **options)

    def ask(self, *sites: str) -> dict[str, m.Message]:
        replies = self.transport.ask(PAYLOAD, sites or SITES)
        return {site: m.decode(raw) for site, raw in replies.items()}

    def code_of_first(self, spoil: Callable[[bytes], bytes | None]) -> str:
        """Code for a spoiled reply of the first site; the others' are as they were."""
        self.carried.spoil = lambda site, raw: spoil(raw) if site == "site-01" else raw
        found = self.ask()
        assert [found[site] for site in SITES[1:]] == [m.decode(REPLY)] * 2
        first = found["site-01"]
        assert isinstance(first, m.Refused)
        entries = [e.about for e in self.logs[COORDINATOR].entries() if e.kind == "reply_refused"]
        assert (entries[-1]["site"], entries[-1]["code"]) == ("site-01", first.code)
        return first.code


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


def test_a_message_reaches_the_sites_and_their_replies_the_coordinator(
    federation: Federation,
) -> None:
    assert federation.transport.sites == SITES
    for _ in range(3):
        assert federation.ask() == dict.fromkeys(SITES, m.decode(REPLY))
    assert federation.ask("site-02") == {"site-02": m.decode(REPLY)}
    assert federation.ask() == dict.fromkeys(SITES, m.decode(REPLY))
    numbers = [unseal(data, consortium=CONSORTIUM).number for data in federation.carried.sent]
    assert numbers == [1, 2, 3, 4, 5]
    kinds = [e.kind for e in federation.logs[COORDINATOR].entries()]
    assert kinds[:7] == ["asked", *[HEAD_SEEN, "heard"] * 3]
    asked = federation.logs[COORDINATOR].entries()[0].about
    assert asked == {
        "study": "lung-os", "session": 10, "number": 1, "sites": list(SITES),
        "message": "ask_edges", "round": 7, "digest": digest(PAYLOAD),
    }  # fmt: skip


def test_parties_without_a_log_talk_too() -> None:
    carried = Carried({name: Site(None, name) for name in SITES})
    transport = SignedTransport(carried, consortium=CONSORTIUM, key=KEYS[COORDINATOR])
    for _ in range(2):
        assert transport.ask(PAYLOAD, SITES) == dict.fromkeys(SITES, REPLY)


@pytest.mark.border
def test_each_party_s_log_holds_the_heads_of_the_others(federation: Federation) -> None:
    for _ in range(3):
        federation.ask()
    files = {name: federation.folder / name / LOG_FILE for name in (COORDINATOR, *SITES)}
    for name in files:
        others = SITES if name == COORDINATOR else (COORDINATOR,)
        for other in others:
            seen = witnesses_of(files[other], name)
            assert len(seen) == 3
            assert verify_log(files[name], public=KEYS[name].public, witnesses=seen) is None
    lines = files["site-02"].read_bytes().splitlines(keepends=True)
    files["site-02"].write_bytes(b"".join(lines[:-1]))
    seen = witnesses_of(files[COORDINATOR], "site-02")
    found = verify_log(files["site-02"], public=KEYS["site-02"].public, witnesses=seen)
    assert found is not None
    assert (found.fault, found.number) == ("truncated", len(lines))


@pytest.mark.border
@given(at=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
@settings(max_examples=100, deadline=None)
def test_a_reply_with_any_flipped_byte_is_refused(at: float, mask: int) -> None:
    def flipped(site: str, raw: bytes) -> bytes:
        data = bytearray(raw)
        data[int(at * len(data))] ^= mask
        return bytes(data) if site == "site-01" else raw

    carried = Carried({name: Site(None, name) for name in SITES})
    carried.spoil = flipped
    transport = SignedTransport(carried, consortium=CONSORTIUM, key=KEYS[COORDINATOR], session=1)
    found = transport.ask(PAYLOAD, SITES)
    assert isinstance(m.decode(found["site-01"]), m.Refused)
    assert found["site-02"] == REPLY


@pytest.mark.border
def test_a_reply_of_another_site_is_refused(federation: Federation) -> None:
    other = Site(None, "site-02").desk
    assert federation.code_of_first(
        lambda _: other.handle(federation.carried.sent[-1])
    ) == "unknown_sender"  # fmt: skip


@pytest.mark.border
def test_a_reply_to_an_earlier_request_is_refused(federation: Federation) -> None:
    federation.ask()
    earlier = federation.carried.replies["site-01"][0]
    assert federation.code_of_first(lambda _: earlier) == "bad_signature"


@pytest.mark.border
@pytest.mark.parametrize(
    ("key", "changes", "code"),
    [
        ("thief", {}, "bad_signature"),
        ("thief", {"sender": "thief"}, "unknown_sender"),
        ("site-02", {"sender": "site-02"}, "unknown_sender"),
        (COORDINATOR, {"sender": COORDINATOR}, "unknown_sender"),
        ("site-01", {"session": 9}, "bad_signature"),
        ("site-01", {"number": 2}, "bad_signature"),
        ("site-01", {"in_reply_to": ""}, "bad_signature"),
        ("site-01", {"receivers": ("site-02",)}, "malformed_request"),
    ],
)
def test_a_reply_that_is_not_this_site_s_to_this_request_is_refused(
    federation: Federation, key: str, changes: dict[str, Any], code: str
) -> None:
    def forged(raw: bytes) -> bytes:
        reply = replace(unseal(raw, consortium=CONSORTIUM), **changes)
        return seal(reply, key=KEYS[key])

    assert federation.code_of_first(forged) == code
    assert federation.code_of_first(lambda _: b"nonsense") == "malformed_request"


@pytest.mark.border
def test_a_site_that_is_silent_is_absent(federation: Federation) -> None:
    federation.carried.spoil = lambda site, raw: None if site == "site-02" else raw
    assert list(federation.ask()) == ["site-01", "site-03"]


@pytest.mark.border
def test_a_revoked_or_unknown_site_is_not_asked(federation: Federation) -> None:
    revoked = replace(CONSORTIUM, revoked=(KEYS["site-02"].public,))
    federation.transport = federation.started(consortium=revoked, session=20)
    found = federation.ask("site-01", "site-02", "site-04")
    assert found == {
        "site-01": m.decode(REPLY), "site-02": m.Refused("unknown_sender"),
        "site-04": m.Refused("unknown_sender"),
    }  # fmt: skip
    assert unseal(federation.carried.sent[0], consortium=CONSORTIUM).receivers == ("site-01",)
    assert federation.ask("site-02") == {"site-02": m.Refused("unknown_sender")}
    assert len(federation.carried.sent) == 1


@pytest.mark.border
def test_a_site_revoked_meanwhile_is_refused(federation: Federation) -> None:
    federation.ask()
    revoked = replace(CONSORTIUM, revoked=(KEYS["site-01"].public,))
    with pytest.raises(EnvelopeError) as found:
        unseal(federation.carried.replies["site-01"][0], consortium=revoked)
    assert found.value.code == "unknown_sender"


def with_audit(change: Callable[[int, str], tuple[int, str]]) -> Callable[[bytes], bytes]:
    def changed(raw: bytes) -> bytes:
        reply = unseal(raw, consortium=CONSORTIUM)
        return seal(replace(reply, audit=change(*reply.audit)), key=KEYS["site-01"])

    return changed


@pytest.mark.border
@pytest.mark.parametrize(
    "change", [lambda number, head: (number - 4, head), lambda *_: (0, NOTHING)]
)
def test_a_site_whose_log_went_back_is_refused(
    federation: Federation, change: Callable[[int, str], tuple[int, str]]
) -> None:
    federation.ask()
    assert federation.code_of_first(with_audit(change)) == "replayed"


@pytest.mark.border
def test_a_site_whose_log_forked_is_refused_and_the_fork_is_kept(federation: Federation) -> None:
    federation.ask()
    seen = unseal(federation.carried.replies["site-01"][0], consortium=CONSORTIUM).audit
    assert federation.code_of_first(with_audit(lambda *_: (seen[0], "f" * 64))) == "replayed"
    witnesses = witnesses_of(federation.folder / COORDINATOR / LOG_FILE, "site-01")
    found = verify_log(
        federation.folder / "site-01" / LOG_FILE,
        public=KEYS["site-01"].public,
        witnesses=witnesses,
    )
    assert found is not None
    assert (found.number, found.fault) == (seen[0], "forked")


@pytest.mark.border
def test_a_site_set_back_to_an_older_copy_is_noticed_by_the_next_coordinator(
    federation: Federation,
) -> None:
    file = federation.folder / "site-01" / LOG_FILE
    federation.ask()
    copy = file.read_bytes()
    for _ in range(3):
        federation.ask()
    file.write_bytes(copy)
    federation.places["site-01"].log = log_of(federation.folder)
    federation.places["site-01"].start()
    federation.transport = federation.started(session=20)
    assert federation.code_of_first(lambda raw: raw) == "replayed"


@pytest.mark.border
def test_a_coordinator_that_starts_again_begins_a_later_session(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.ask()
    monkeypatch.setattr(envelope_module.clock, "time_ns", lambda: 5)  # a clock that went back
    federation.transport = federation.started(session=None)
    assert federation.ask() == dict.fromkeys(SITES, m.decode(REPLY))
    sessions = [unseal(data, consortium=CONSORTIUM).session for data in federation.carried.sent]
    assert sessions == [10, 11]
