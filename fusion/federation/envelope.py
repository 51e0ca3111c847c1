"""Signed, numbered envelopes around messages: who says what to whom, and each but once."""

from __future__ import annotations

import json
import re
import struct
import threading
import time as clock
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from fusion import messages as m
from fusion.audit import HEAD_SEEN, NOTHING, AuditError
from fusion.federation.consortium import COORDINATOR, HEX_DIGEST, PARTY_NAME, matches
from fusion.keys import SIGNATURE_BYTES, canonical_json, digest, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from fusion.audit import AuditLog
    from fusion.federation.consortium import Consortium
    from fusion.federation.transport import Transport
    from fusion.keys import SigningKey
    from fusion.privacy import Refusal

    Plain = str | int | bool

_MAGIC: Final = b"CNSE1"
_PREFIX: Final = struct.Struct("<5sI")
_ROOM_BYTES: Final = 64 * 1024
MAX_ENVELOPE_BYTES: Final = m.MAX_BYTES + _ROOM_BYTES
_MAX_HEADER_BYTES: Final = _ROOM_BYTES - _PREFIX.size - SIGNATURE_BYTES
_MAX_NUMBER: Final = 2**63


class EnvelopeError(ValueError):
    """Bytes that are no envelope for this reader; ``code`` is what may be told of it."""

    def __init__(self, code: Refusal, sentence: str) -> None:
        super().__init__(f"envelope: {sentence}")
        self.code: Refusal = code


@dataclass(frozen=True)
class Envelope:
    """A message with its sender, its readers and its place in a conversation.

    Parameters
    ----------
    study
        Name of the study.
    session
        Nanoseconds at which the coordinator began, higher is later.
    number
        Of the request in its session, from 1; a reply has its request's.
    sender, receivers
        Names of parties.
    in_reply_to
        :func:`envelope_id` of the request, empty in a request.
    audit
        Number and head of the last entry of the sender's audit log.
    payload
        The message.
    """

    study: str
    session: int
    number: int
    sender: str
    receivers: tuple[str, ...]
    in_reply_to: str
    audit: tuple[int, str]
    payload: bytes


_HEADER_FIELDS: Final = {f.name for f in fields(Envelope)}


def seal(envelope: Envelope, *, key: SigningKey) -> bytes:
    """Write an envelope to bytes: prefix, header, payload, signature over prefix and header.

    Raises
    ------
    EnvelopeError
        If a field is impossible, or the payload too large.
    """
    values = {name: getattr(envelope, name) for name in _HEADER_FIELDS}
    values |= {
        "receivers": list(envelope.receivers),
        "audit": list(envelope.audit),
        "payload": digest(envelope.payload),
    }
    _check_header(values)
    if len(envelope.payload) > m.MAX_BYTES:
        raise EnvelopeError("malformed_request", f"needed at most {m.MAX_BYTES} bytes inside")
    header = canonical_json(values)
    signed = _PREFIX.pack(_MAGIC, len(header)) + header
    return b"".join([signed, envelope.payload, key.sign(signed)])


def unseal(data: bytes, *, consortium: Consortium) -> Envelope:
    """Read an envelope from bytes that may come from anyone.

    Raises
    ------
    EnvelopeError
        ``malformed_request`` for bytes that are no envelope of this study, ``unknown_sender`` for
        one of nobody in the consortium or of a revoked key, ``bad_signature`` if its sender did
        not sign exactly this.
    """
    signed, rest = _split(data)
    values = _read_header(signed[_PREFIX.size :])
    try:
        public = consortium.public(values["sender"])
    except ValueError as error:
        raise EnvelopeError("unknown_sender", str(error)) from None
    if not verify(public, rest[-SIGNATURE_BYTES:], signed):
        raise EnvelopeError("bad_signature", "found one that its sender did not sign")
    payload = rest[:-SIGNATURE_BYTES]
    if digest(payload) != values["payload"]:
        raise EnvelopeError("bad_signature", "found another message than its sender signed")
    if values["study"] != consortium.study:
        raise EnvelopeError("malformed_request", "found one of another study")
    values |= {
        "receivers": tuple(values["receivers"]),
        "audit": tuple(values["audit"]),
        "payload": payload,
    }
    return Envelope(**values)


def envelope_id(data: bytes) -> str:
    """Digest of what is signed of an envelope, by which a reply names its request."""
    try:
        return digest(_split(data)[0])
    except EnvelopeError:
        return digest(data)


def _split(data: bytes) -> tuple[bytes, bytes]:
    """Separate prefix and header from payload and signature."""
    if not _PREFIX.size + SIGNATURE_BYTES <= len(data) <= MAX_ENVELOPE_BYTES:
        raise EnvelopeError("malformed_request", f"found {len(data)} bytes")
    magic, size = _PREFIX.unpack_from(data)
    end = _PREFIX.size + size
    if magic != _MAGIC or size > _MAX_HEADER_BYTES or end + SIGNATURE_BYTES > len(data):
        raise EnvelopeError("malformed_request", "does not begin as one")
    return data[:end], data[end:]


def _read_header(header: bytes) -> dict[str, Any]:
    try:
        values = json.loads(header)
        if not isinstance(values, dict) or canonical_json(values) != header:
            raise ValueError("header: needed canonical JSON")
    except (ValueError, RecursionError):
        raise EnvelopeError("malformed_request", "found a header that is none") from None
    _check_header(values)
    return values


def _check_header(values: dict[str, Any]) -> None:
    if set(values) != _HEADER_FIELDS:
        raise EnvelopeError("malformed_request", "found other fields than it has")
    receivers, audit = values["receivers"], values["audit"]
    right = (
        matches(PARTY_NAME, values["study"])
        and matches(PARTY_NAME, values["sender"])
        and _is_number(values["session"])
        and _is_number(values["number"])
        and _are_names(receivers)
        and (values["in_reply_to"] == "" or matches(HEX_DIGEST, values["in_reply_to"]))
        and _is_position(audit)
        and (isinstance(values["payload"], bytes) or matches(HEX_DIGEST, values["payload"]))
    )
    if not right:
        raise EnvelopeError("malformed_request", "found a field of another kind than it has")


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_NUMBER


def _are_names(value: object) -> bool:
    if not isinstance(value, list) or not all(matches(PARTY_NAME, name) for name in value):
        return False
    return 0 < len(value) == len(set(value))


def _is_position(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return _is_number(value[0]) and matches(HEX_DIGEST, value[1])


class SiteDesk:
    """A site's end: opens what comes, has it answered once, and signs what goes.

    Parameters
    ----------
    answer
        Turns a request into a reply; never called for an envelope that is refused.
    site
        Name of this site.
    key
        The site's own.
    consortium
        Who may ask, and who this site is.
    log
        The site's audit log. It also remembers, over restarts, which requests came; without one
        that is kept in memory.
    on_error
        Called with any unexpected exception, for the site's own log; only a code leaves.

    Raises
    ------
    ValueError
        If the consortium does not list this site with this key.

    Notes
    -----
    A request is logged before it is answered, and its reply before it leaves. A site killed in
    between refuses the same request afterwards, and one that cannot write its log answers nothing.
    """

    def __init__(
        self,
        answer: Callable[[bytes], bytes],
        *,
        site: str,
        key: SigningKey,
        consortium: Consortium,
        log: AuditLog | None,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        _require_own_key(site, key, consortium)
        self._answer, self._site, self._key = answer, site, key
        self._consortium, self._log, self._on_error = consortium, log, on_error
        self._lock = threading.Lock()
        self._last, self._read_to = (0, 0), 0

    def handle(self, data: bytes) -> bytes:
        """Answer one envelope with another; whatever goes wrong leaves as a code, signed too."""
        with self._lock:
            try:
                return self._answered(data)
            except EnvelopeError as refusal:
                code = refusal.code
            except Exception as error:  # noqa: BLE001
                self._tell(error)
                code = "site_error"
            return self._refused(data, code)

    def _answered(self, data: bytes) -> bytes:
        request = unseal(data, consortium=self._consortium)
        self._require_for_us(request)
        with self._held():
            self._require_new(request)
            self._note_request(request)
        reply = self._answer(request.payload)
        place = request.session, request.number
        if self._log is not None:
            self._log.append("reply", session=place[0], number=place[1], **_described(reply))
        return self._sealed(place, envelope_id(data), reply)

    def _require_for_us(self, request: Envelope) -> None:
        if request.sender != COORDINATOR:
            raise EnvelopeError("unknown_sender", "found one that the coordinator did not send")
        if self._site not in request.receivers or request.in_reply_to or not request.number:
            raise EnvelopeError("malformed_request", "found one that is no request to this site")

    def _require_new(self, request: Envelope) -> None:
        if self._log is not None:
            for entry in self._log.entries(after=self._read_to):
                self._read_to = entry.number
                if entry.kind == "request" and self._is_ours(entry.about):
                    place = entry.about["session"], entry.about["number"]
                    self._last = max(self._last, place)
        if (request.session, request.number) <= self._last:
            raise EnvelopeError("replayed", "found one that came before, or is late")

    def _is_ours(self, about: Any) -> bool:
        ours = (self._consortium.study, self._consortium.coordinator)
        return (about.get("study"), about.get("coordinator")) == ours

    def _note_request(self, request: Envelope) -> None:
        self._last = (request.session, request.number)
        if self._log is None:
            return
        _note_head(self._log, COORDINATOR, request.audit)
        self._log.append(
            "request",
            study=request.study,
            coordinator=self._consortium.coordinator,
            session=request.session,
            number=request.number,
            **_described(request.payload),
        )

    def _refused(self, data: bytes, code: Refusal) -> bytes:
        if self._log is not None:
            try:
                self._log.append("refused", code=code, digest=envelope_id(data))
            except (OSError, AuditError) as error:
                self._tell(error)
        try:
            values = _read_header(_split(data)[0][_PREFIX.size :])
            place = values["session"], values["number"]
        except EnvelopeError:
            place = 0, 0
        return self._sealed(place, envelope_id(data), m.encode(m.Refused(code)))

    def _sealed(self, place: tuple[int, int], request_id: str, payload: bytes) -> bytes:
        reply = Envelope(
            study=self._consortium.study,
            session=place[0],
            number=place[1],
            sender=self._site,
            receivers=(COORDINATOR,),
            in_reply_to=request_id,
            audit=_position(self._log),
            payload=payload,
        )
        return seal(reply, key=self._key)

    def _held(self) -> AbstractContextManager[None]:
        return nullcontext() if self._log is None else self._log.held()

    def _tell(self, error: Exception) -> None:
        if self._on_error is not None:
            self._on_error(error)


class SignedTransport:
    """The coordinator's end: signs what goes to the sites, and opens what comes from them.

    Parameters
    ----------
    inner
        Carries envelopes to the sites.
    consortium
        Who the sites are.
    key
        The coordinator's own.
    log
        The coordinator's audit log. It also remembers, over restarts, how far each site's log was.
    session
        Nanoseconds at which this session begins; now by default.

    Raises
    ------
    ValueError
        If the consortium lists the coordinator with another key.

    Notes
    -----
    A site whose envelope is refused answers, as far as the caller can see, with that refusal. So
    does one whose audit log went back behind what it showed before, or shows another entry of the
    same number: it was set back to an older copy, or has two continuations. A site that lost its
    log hence takes part again under another name only. A revoked site is not asked.
    """

    def __init__(
        self,
        inner: Transport,
        *,
        consortium: Consortium,
        key: SigningKey,
        log: AuditLog | None = None,
        session: int | None = None,
    ) -> None:
        _require_own_key(COORDINATOR, key, consortium)
        self._inner, self._consortium, self._key, self._log = inner, consortium, key, log
        self._heads: dict[str, tuple[int, str]] = {}
        latest = self._remember()
        self._session = max(clock.time_ns(), latest + 1) if session is None else session
        self._number = 0

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that can be asked."""
        return self._inner.sites

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        """Send one signed request to these sites, and give what each of them signed in reply.

        Raises
        ------
        fusion.audit.AuditError
            If the log cannot be added to: what it does not hold is neither asked nor heard.
        """
        known = [site for site in sites if self._consortium.knows(site)]
        found = {s: m.encode(m.Refused("unknown_sender")) for s in sites if s not in known}
        if not known:
            return found
        with _with_room():
            data = self._sealed(payload, known)
        replies = self._inner.ask(data, known)
        with _with_room(), nullcontext() if self._log is None else self._log.held():
            for site in known:
                if site in replies:
                    found[site] = self._opened(site, replies[site], envelope_id(data))
        return {site: found[site] for site in sites if site in found}

    def _sealed(self, payload: bytes, sites: Sequence[str]) -> bytes:
        self._number += 1
        if self._log is not None:
            self._log.append(
                "asked",
                study=self._consortium.study,
                session=self._session,
                number=self._number,
                sites=list(sites),
                **_described(payload),
            )
        request = Envelope(
            study=self._consortium.study,
            session=self._session,
            number=self._number,
            sender=COORDINATOR,
            receivers=tuple(sites),
            in_reply_to="",
            audit=_position(self._log),
            payload=payload,
        )
        return seal(request, key=self._key)

    def _opened(self, site: str, data: bytes, request_id: str) -> bytes:
        try:
            reply = unseal(data, consortium=self._consortium)
            self._require_from(site, reply, request_id)
            self._require_growing(site, reply.audit)
        except EnvelopeError as refusal:
            if self._log is not None:
                self._log.append(
                    "reply_refused", site=site, code=refusal.code, digest=envelope_id(data)
                )
            return m.encode(m.Refused(refusal.code))
        if self._log is not None:
            self._log.append("heard", site=site, **_described(reply.payload))
        return reply.payload

    def _require_from(self, site: str, reply: Envelope, request_id: str) -> None:
        if reply.sender != site:
            raise EnvelopeError("unknown_sender", "found one of another site than was asked")
        if reply.in_reply_to != request_id:
            raise EnvelopeError("bad_signature", "found a reply to another request")
        if (reply.session, reply.number) != (self._session, self._number):
            raise EnvelopeError("bad_signature", "found a reply of another session or number")
        if reply.receivers != (COORDINATOR,):
            raise EnvelopeError("malformed_request", "found a reply to another party")

    def _require_growing(self, site: str, position: tuple[int, str]) -> None:
        number, head = self._heads.get(site, (0, NOTHING))
        if self._log is not None:
            _note_head(self._log, site, position)
        if position[0] < number or (position[0] == number and position[1] != head):
            raise EnvelopeError("replayed", "found an audit log that went back or forked")
        self._heads[site] = position

    def _remember(self) -> int:
        """Read how far each site's log was, and give the latest session, from our own log."""
        latest = 0
        for entry in self._log.entries() if self._log is not None else ():
            about = entry.about
            if entry.kind == "asked":
                latest = max(latest, about["session"])
            elif entry.kind == HEAD_SEEN:
                seen = about["number"], about["head"]
                self._heads[about["party"]] = max(self._heads.get(about["party"], seen), seen)
        return latest


def _require_own_key(party: str, key: SigningKey, consortium: Consortium) -> None:
    if consortium.public(party) != key.public:
        raise ValueError(
            f"{party}: found another key than the consortium lists; restore it, or have the "
            "consortium's file issued anew"
        )


@contextmanager
def _with_room() -> Iterator[None]:
    """Say in a sentence that the coordinator's log cannot be added to."""
    try:
        yield
    except OSError as error:
        raise AuditError(
            f"audit log: found that no entry can be added ({error.strerror}), needed room on the "
            "coordinator's disk; free some and run the study again"
        ) from error


def _position(log: AuditLog | None) -> tuple[int, str]:
    """Give what the sender shows of its log; one that cannot be read is shown as none."""
    with suppress(OSError, AuditError):
        return (0, NOTHING) if log is None else log.position
    return 0, NOTHING


def _note_head(log: AuditLog, party: str, position: tuple[int, str]) -> None:
    if position[0]:
        log.append(HEAD_SEEN, party=party, number=position[0], head=position[1])


def _described(payload: bytes) -> dict[str, Plain]:
    """Name a message as the log does: its kind, its round if it has one, its code if refused."""
    found: dict[str, Plain] = {"message": "unreadable", "digest": digest(payload)}
    try:
        message = m.decode(payload)
    except m.MessageError:
        return found
    found["message"] = re.sub(r"(?<!^)(?=[A-Z])", "_", type(message).__name__).lower()
    if isinstance(message, m.Refused):
        found["code"] = message.code
    elif hasattr(message, "round"):
        found["round"] = message.round
    return found
