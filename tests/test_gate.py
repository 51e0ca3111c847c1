"""The door of a site: nothing before an introduction that it permits, and codes only."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from fusion import messages as m
from fusion.federation import SiteStudy
from fusion.federation.gate import SiteGate
from tests.consortium import PLAN, RUN, site_rows

if TYPE_CHECKING:
    from fusion.privacy import Refusal

ROWS = site_rows(300, 1)
INTRODUCE = m.Introduce(
    "2" * 64, "3" * 64, "4" * 64, ("site-01",), ("5" * 64,), np.zeros((1, 64), np.uint8)
)
DESCRIBE = m.Describe(RUN, PLAN.protocol, PLAN.modalities, True)
MOMENTS = m.AskMoments(RUN, 1, ("radiology",))


class Door:
    """A gate whose site counts what it was asked to do."""

    def __init__(self, refusal: Refusal | None = None) -> None:
        self.refusal = refusal
        self.opened: list[str] = []
        self.errors: list[Exception] = []
        self.n_cohorts = 0
        self.gate = SiteGate(
            permits=lambda _: self.refusal,
            cohort=self.cohort,
            open_study=self.open_study,
            on_error=self.errors.append,
        )

    def cohort(self) -> str:
        self.n_cohorts += 1
        return ROWS.cohort

    def open_study(self, run: str) -> SiteStudy:
        self.opened.append(run)
        return SiteStudy(replace(PLAN, run=run), ROWS, on_error=self.errors.append)

    def __call__(self, request: m.Message) -> m.Message:
        return m.decode(self.gate.answer(m.encode(request)))


def code(reply: m.Message) -> str:
    assert isinstance(reply, m.Refused), reply
    return reply.code


def test_who_is_let_in_is_described_first_and_answered_then() -> None:
    door = Door()
    assert door(INTRODUCE) == m.Introduced(ROWS.cohort)
    assert door.opened == []
    assert isinstance(door(DESCRIBE), m.Description)
    assert isinstance(door(MOMENTS), m.DesignMoments)
    assert door(INTRODUCE) == m.Introduced(ROWS.cohort)
    assert isinstance(door(MOMENTS), m.DesignMoments)
    assert door.opened == [RUN]
    assert door.errors == []


@pytest.mark.border
@pytest.mark.parametrize("request_", [DESCRIBE, MOMENTS, m.Done()], ids=lambda x: type(x).__name__)
def test_nothing_is_answered_before_an_introduction(request_: m.Message) -> None:
    door = Door()
    assert code(door(request_)) == "not_approved"
    assert (door.opened, door.n_cohorts) == ([], 0)


@pytest.mark.border
@pytest.mark.parametrize("refusal", ["not_approved", "wrong_protocol"])
def test_who_is_turned_away_learns_nothing_of_the_cohort(refusal: Refusal) -> None:
    door = Door(refusal)
    assert code(door(INTRODUCE)) == refusal
    assert code(door(DESCRIBE)) == "not_approved"
    assert (door.opened, door.n_cohorts) == ([], 0)
    door.refusal = None  # approved in the meantime
    assert door(INTRODUCE) == m.Introduced(ROWS.cohort)


@pytest.mark.border
@pytest.mark.parametrize("request_", [MOMENTS, m.Done()], ids=lambda x: type(x).__name__)
def test_a_run_begins_with_its_description(request_: m.Message) -> None:
    door = Door()
    door(INTRODUCE)
    assert code(door(request_)) == "malformed_request"
    assert door.opened == []


@pytest.mark.border
def test_one_run_is_let_in_at_a_time() -> None:
    door = Door()
    door(INTRODUCE)
    door(DESCRIBE)
    assert code(door(replace(DESCRIBE, run="9" * 64))) == "wrong_run"
    assert door.opened == [RUN]


@pytest.mark.border
@pytest.mark.parametrize("payload", [b"", b"CNSL1", b"\x80\x04N.", m.encode(DESCRIBE)[:-1]])
def test_bytes_that_are_no_message_are_a_code(payload: bytes) -> None:
    door = Door()
    door(INTRODUCE)
    assert code(m.decode(door.gate.answer(payload))) == "malformed_request"
    assert len(door.errors) == 1


@pytest.mark.border
def test_whatever_goes_wrong_leaves_as_a_code_and_stays_in_the_sites_log() -> None:
    door = Door()
    text = "/srv/hospital/patient-007.csv: not found"

    def fails(*_: object) -> str:
        raise FileNotFoundError(text)

    door.gate._cohort = fails
    payload = door.gate.answer(m.encode(INTRODUCE))
    assert code(m.decode(payload)) == "site_error"
    assert b"patient-007" not in payload
    # Not introduced: it could not say with which cohort.
    assert code(door(DESCRIBE)) == "not_approved"
    door.gate._cohort = door.cohort
    door(INTRODUCE)
    door.gate._open_study = fails  # type: ignore[assignment]
    payload = door.gate.answer(m.encode(DESCRIBE))
    assert code(m.decode(payload)) == "site_error"
    assert b"patient-007" not in payload
    assert [str(x) for x in door.errors] == [text, text]
    door.gate._open_study = door.open_study
    assert isinstance(door(DESCRIBE), m.Description)


@pytest.mark.border
def test_a_reply_is_no_request() -> None:
    door = Door()
    door(INTRODUCE)
    door(DESCRIBE)
    for reply in (m.Done(), m.Refused("small_cell"), m.Introduced(ROWS.cohort)):
        assert code(door(reply)) == "malformed_request"
