from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows import versions
from flows.approvals import (
    FOLDER,
    Approval,
    Statement,
    approval_fields,
    approvals_of,
    approve,
    approve_study,
    check_approvals,
    permit,
    read_approvals,
    statement_of,
    write_approval,
)
from flows.protocol import ProtocolError, load_protocol, read_protocol_text
from flows.versions import CODE, source_digest
from fusion import messages as m
from fusion.federation.consortium import CONSORTIUM_FILE, Consortium, read_consortium
from fusion.keys import SigningKey, canonical_json

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

pytestmark = pytest.mark.border

SITES = ("site-01", "site-02", "site-03")
KEYS = {
    name: SigningKey(bytes([at]) * 32)
    for at, name in enumerate(("coordinator", *SITES, "site-04"), 1)
}
CONSORTIUM = Consortium(
    study="lung-os",
    coordinator=KEYS["coordinator"].public,
    sites={site: KEYS[site].public for site in SITES},
    quorum=2,
)
STUDY = """\
[study]
name = "lung-os"
endpoint = "overall survival"
data = "simulated"
horizon_days = 730
grid_days = [365, 730]
seed = 11

[modality.clinical]
kind = "clinical"
numeric = ["age"]
categorical = {sex = ["female", "male"]}

[federation]
sums = "secure_sum"

[privacy]
patients = 40
"""
OWN = Statement("lung-os", "1" * 64, "2" * 64, CONSORTIUM.digest(), "3" * 64)
OTHERS = {site: replace(OWN, settings=f"{at}" * 64) for at, site in enumerate(SITES, 3)}


def approved(*sites: str) -> list[Approval]:
    """Valid approvals, each with its site's own settings."""
    return [approve(OTHERS[site], site, KEYS[site]) for site in sites]


def refusal(
    approvals: Iterable[Approval],
    *,
    statement: Statement = OWN,
    site: str = "site-01",
    consortium: Consortium = CONSORTIUM,
) -> str | None:
    return check_approvals(statement, approvals, site=site, consortium=consortium)


def test_a_site_runs_what_it_and_a_quorum_approved() -> None:
    assert refusal(approved("site-01", "site-02")) is None
    assert refusal(approved("site-03", "site-01")) is None
    assert refusal(approved(*SITES)) is None
    alone = replace(CONSORTIUM, quorum=1)
    own = replace(OWN, consortium=alone.digest())
    first = approve(own, "site-01", KEYS["site-01"])
    assert refusal([first], statement=own, consortium=alone) is None


def test_a_site_runs_nothing_without_its_own_approval() -> None:
    assert refusal([]) == "not_approved"
    assert refusal(approved("site-02", "site-03")) == "not_approved"
    assert refusal(approved("site-02", "site-03"), site="site-04") == "not_approved"


def test_a_site_runs_nothing_without_the_quorum() -> None:
    assert refusal(approved("site-01")) == "not_approved"
    whole = replace(CONSORTIUM, quorum=3)
    own = replace(OWN, consortium=whole.digest())
    two = [approve(own, site, KEYS[site]) for site in SITES[:2]]
    assert refusal(two, statement=own, consortium=whole) == "not_approved"


def test_two_signatures_of_one_site_count_once() -> None:
    again = approve(replace(OWN, settings="9" * 64), "site-01", KEYS["site-01"])
    assert refusal([*approved("site-01"), *approved("site-01"), again]) == "not_approved"


def test_a_site_s_own_approval_holds_for_its_own_settings_only() -> None:
    changed = replace(OWN, settings="9" * 64)
    assert refusal(approved(*SITES), statement=changed) == "not_approved"
    assert refusal(approved(*SITES), site="site-02") == "not_approved"
    assert refusal(approved(*SITES), site="site-02", statement=OTHERS["site-02"]) is None


@pytest.mark.parametrize("name", ["study", "protocol", "code", "consortium"])
def test_an_approval_of_anything_else_counts_for_nothing(name: str) -> None:
    other = replace(OTHERS["site-02"], **{name: "breast-os" if name == "study" else "f" * 64})
    theirs = approve(other, "site-02", KEYS["site-02"])
    assert refusal([*approved("site-01"), theirs]) == "not_approved"
    assert refusal([*approved("site-01"), replace(theirs, statement=OTHERS["site-02"])]) == (
        "not_approved"
    )
    changed = replace(OWN, **{name: getattr(other, name)})
    assert refusal(approved(*SITES), statement=changed) == "not_approved"
    mine = approve(changed, "site-01", KEYS["site-01"])
    assert refusal([mine, *approved("site-02", "site-03")], statement=changed) == "not_approved"


def test_a_signature_by_a_revoked_or_unknown_key_counts_for_nothing() -> None:
    revoked = replace(CONSORTIUM, revoked=(KEYS["site-02"].public,))
    own = replace(OWN, consortium=revoked.digest())
    of = {site: approve(own, site, KEYS[site]) for site in (*SITES, "site-04")}
    assert refusal([of["site-01"], of["site-02"]], statement=own, consortium=revoked) == (
        "not_approved"
    )
    assert refusal([of["site-01"], of["site-04"]], statement=own, consortium=revoked) == (
        "not_approved"
    )
    assert refusal([of["site-01"], of["site-03"]], statement=own, consortium=revoked) is None
    assert refusal(of.values(), statement=own, consortium=revoked, site="site-02") == "not_approved"
    coordinator = approve(own, "coordinator", KEYS["coordinator"])
    assert refusal([of["site-01"], coordinator], statement=own, consortium=revoked) == (
        "not_approved"
    )


def test_nobody_signs_for_another_site() -> None:
    forged = approve(OTHERS["site-02"], "site-02", KEYS["site-03"])
    borrowed = replace(approved("site-03")[0], site="site-02")
    for fake in (forged, borrowed, replace(forged, signature="0" * 128)):
        assert refusal([*approved("site-01"), fake]) == "not_approved"


def test_an_approval_that_is_written_is_read(tmp_path: Path) -> None:
    for approval in reversed(approved(*SITES)):
        path = write_approval(approval, tmp_path / FOLDER)
        assert path == tmp_path / FOLDER / f"{approval.site}.json"
    assert read_approvals(tmp_path / FOLDER) == approved(*SITES)
    assert read_approvals(tmp_path / "nowhere") == []
    values = json.loads((tmp_path / FOLDER / "site-02.json").read_bytes())
    assert sorted(values) == ["signature", "site", "statement"]


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "site-03"}, {"site": "Site"}, {"signature": "0"}, {"signature": 3}, {"more": 1},
        {"statement": {}}, {"statement": []}, {"statement": {**vars(OWN), "more": "1" * 64}},
        {"statement": {**vars(OWN), "code": "1"}}, {"statement": {**vars(OWN), "code": 1}},
        {"statement": {**vars(OWN), "study": "Lung"}},
    ],
    ids=str,
)  # fmt: skip
def test_a_file_that_is_no_approval_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write_approval(approved("site-02")[0], tmp_path)
    path.write_bytes(canonical_json(json.loads(path.read_bytes()) | changes) + b"\n")
    with pytest.raises(ValueError, match=r"^site-02\.json: found .*ask the site for its file"):
        read_approvals(tmp_path)


@pytest.mark.parametrize("end", [b"", b" ", b"\n\n"])
def test_an_approval_is_written_in_one_way_only(tmp_path: Path, end: bytes) -> None:
    path = write_approval(approved("site-02")[0], tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + end)
    with pytest.raises(ValueError, match=r"^site-02\.json: found an approval in another form"):
        read_approvals(tmp_path)


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b"[" * 100_000, b"\xff"])
def test_bytes_that_are_no_approval_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "site-02.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"^site-02\.json: found no approval"):
        read_approvals(tmp_path)


def test_approvals_cross_as_plain_fields() -> None:
    sites, own, signatures = approval_fields(approved(*SITES))
    code = m.encode(m.Introduce("1" * 64, "2" * 64, "4" * 64, sites, own, signatures))
    read = m.decode(code)
    assert isinstance(read, m.Introduce)
    assert approvals_of(OWN, read.sites, read.settings, read.signatures) == approved(*SITES)
    assert approval_fields([])[2].shape == (0, 64)


def introduction(*sites: str, **changes: Any) -> m.Introduce:
    named, own, signatures = approval_fields(approved(*sites))
    request = m.Introduce(OWN.protocol, OWN.code, OWN.consortium, named, own, signatures)
    return replace(request, **changes)


def answer(request: m.Introduce, *own: str) -> str | None:
    return permit(
        request, statement=OWN, approvals=approved(*own), site="site-01", consortium=CONSORTIUM
    )


def test_the_coordinator_may_bring_the_approvals_of_others() -> None:
    assert answer(introduction("site-02", "site-03"), "site-01") is None
    assert answer(introduction("site-01", "site-03"), "site-01", "site-02") is None


def test_the_coordinator_cannot_bring_a_site_s_own_approval() -> None:
    assert answer(introduction(*SITES)) == "not_approved"
    assert answer(introduction(*SITES), "site-02", "site-03") == "not_approved"


def test_the_coordinator_cannot_make_up_approvals() -> None:
    fine = introduction("site-02")
    assert answer(fine, "site-01") is None
    signatures = fine.signatures.copy()
    signatures[0, 0] ^= 1
    for change in (
        {"signatures": signatures},
        {"signatures": np.zeros_like(signatures)},
        {"settings": ("9" * 64,)},
        {"sites": ("site-03",)},
        {"sites": ("site-04",)},
        {"code": "f" * 64},
        {"consortium": "f" * 64},
    ):
        assert answer(replace(fine, **change), "site-01") == "not_approved", change
    assert answer(replace(fine, protocol="f" * 64), "site-01") == "wrong_protocol"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a study, its consortium, and a first site where two have approved."""
    root = tmp_path_factory.mktemp("study")
    (root / "study.toml").write_text(STUDY)
    (root / CONSORTIUM_FILE).write_bytes(CONSORTIUM.to_bytes() + b"\n")
    for site in SITES[:2]:
        approve_here(root, root / site, site)
    shutil.copy(root / "site-02" / FOLDER / "site-02.json", root / "site-01" / FOLDER)
    return root


def approve_here(root: Path, home: Path, site: str, **changes: Any) -> list[str]:
    said: list[str] = []
    options: dict[str, Any] = {
        "site": site, "key": KEYS[site], "consortium": CONSORTIUM, "settings": "5" * 64,
        "say": said.append,
    }  # fmt: skip
    approve_study(root, home, **{**options, **changes})
    return said


def stands(root: Path, **changes: str) -> str | None:
    """What a first site says of the study as its files are now."""
    consortium = read_consortium(root / CONSORTIUM_FILE)
    statement = statement_of(
        load_protocol(root / "study.toml"), consortium, settings=changes.pop("settings", "5" * 64)
    )
    approvals = read_approvals(root / "site-01" / FOLDER)
    return refusal(approvals, statement=replace(statement, **changes), consortium=consortium)


def test_who_approves_is_shown_what(study: Path, tmp_path: Path) -> None:
    assert stands(study) is None
    protocol = read_protocol_text(STUDY, source="study.toml")
    said = approve_here(study, tmp_path, "site-03")
    assert said[:5] == [
        "study: lung-os",
        f"protocol: {protocol.fingerprint()}",
        f"code: {source_digest(*CODE)}",
        f"settings of this site: {'5' * 64}",
        "sums: secure_sum",
    ]
    assert said[5].startswith("minimum counts: patients 40, events 20, ")
    assert said[6:] == [
        "lowered: patients 40 (default 50)",
        "sites: site-01, site-02, site-03",
        "revoked keys: 0",
        "quorum: 2 of 3",
    ]
    (approval,) = read_approvals(tmp_path / FOLDER)
    assert approval.site == "site-03"


def test_a_site_approves_its_consortium_s_study_with_its_key(study: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"key": KEYS["site-02"]}, "site-01: found another key"),
        ({"site": "site-04"}, "does not list"),
        ({"consortium": replace(CONSORTIUM, study="breast-os")}, "found lung-os, needed breast-os"),
        ({"consortium": replace(CONSORTIUM, revoked=(KEYS["site-01"].public,))}, "revoked key"),
    ]
    for changes, text in cases:
        with pytest.raises(ValueError, match=text):
            approve_here(study, tmp_path, **{"site": "site-01", **changes})
    with pytest.raises(ProtocolError):
        approve_here(tmp_path, tmp_path, "site-01")
    assert list(tmp_path.iterdir()) == []


def test_changed_code_needs_a_new_approval(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CODE:
        shutil.copytree(versions._ROOT / name, tmp_path / name)
    monkeypatch.setattr(versions, "_ROOT", tmp_path)
    source_digest.cache_clear()
    assert stands(study) is None
    for name in (
        "fusion/privacy.py", "modalities/cohort.py", "flows/site.py", "infra/settings.py",
    ):  # fmt: skip
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-1] + b" ")
        source_digest.cache_clear()
        assert stands(study) == "not_approved"
        (tmp_path / name).write_bytes(data)
    monkeypatch.undo()
    source_digest.cache_clear()


def changed(data: bytes, at: float, mask: int) -> bytes:
    found = bytearray(data)
    found[int(at * len(data))] ^= mask
    return bytes(found)


def refused(root: Path, **changes: str) -> bool:
    try:
        return stands(root, **changes) == "not_approved"
    except ValueError:
        return True


FILES = [CONSORTIUM_FILE, f"site-01/{FOLDER}/site-01.json", f"site-01/{FOLDER}/site-02.json"]
WHERE = st.floats(0, 1, exclude_max=True)
MASKS = st.integers(1, 255)


@pytest.mark.parametrize("name", FILES)
@given(at=WHERE, mask=MASKS)
@settings(max_examples=60, deadline=None)
def test_one_changed_byte_of_a_signed_file_is_refused(
    study: Path, name: str, at: float, mask: int
) -> None:
    data = (study / name).read_bytes()
    try:
        (study / name).write_bytes(changed(data, at, mask))
        assert refused(study)
    finally:
        (study / name).write_bytes(data)
    assert stands(study) is None


@given(at=WHERE, mask=MASKS)
@settings(max_examples=120, deadline=None)
def test_one_changed_byte_of_the_protocol_is_refused(study: Path, at: float, mask: int) -> None:
    path = study / "study.toml"
    values = load_protocol(path).values()
    try:
        path.write_bytes(changed(STUDY.encode(), at, mask))
        try:
            same = load_protocol(path).values() == values  # a space that became a tab
        except ProtocolError:
            same = False
        assert refused(study) is not same
    finally:
        path.write_text(STUDY)


@given(name=st.sampled_from(["protocol", "code", "consortium", "settings"]), at=WHERE, mask=MASKS)
@settings(max_examples=60, deadline=None)
def test_one_changed_byte_of_a_digest_is_refused(
    study: Path, name: str, at: float, mask: int
) -> None:
    data = getattr(approved("site-01")[0].statement, name)
    assert refused(study, **{name: changed(data.encode(), at, mask).decode("latin-1")})
