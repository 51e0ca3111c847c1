"""What is planted in the sites' raw files is found nowhere else after a whole study."""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import struct
import zipfile
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from tests import federated

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.border, pytest.mark.slow, pytest.mark.timeout(900)]

_FLOAT_COLUMN = "pathology_01"
_WINDOW = 8


class Canaries:
    """Identifiers, in every way in which one may be written."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.floats: list[float] = []

    def patterns(self) -> dict[bytes, str]:
        found: dict[bytes, str] = {}
        for text in self.texts:
            for pattern in _written(text.encode()):
                found[pattern] = text
            found[text.encode("utf-16-le")] = text
        for value in self.floats:
            found[repr(value).encode()] = repr(value)
            for raw in (struct.pack("<d", value), struct.pack(">d", value)):
                for pattern in _written(raw):
                    found[pattern] = repr(value)
        return {p: name for p, name in found.items() if len(p) >= _WINDOW}


def _written(raw: bytes) -> Iterator[bytes]:
    """Raw, hexadecimal in both cases, and base64 at each alignment."""
    yield raw
    yield raw.hex().encode()
    yield raw.hex().upper().encode()
    for shift in range(3):
        coded = base64.b64encode(bytes(shift) + raw)
        # Characters at both ends hold bits of neighbours.
        yield coded[-(-8 * shift // 6) : (8 * (shift + len(raw))) // 6]


def leaks(content: bytes, patterns: dict[bytes, str]) -> set[str]:
    """Names of the identifiers that some bytes hold."""
    by_start: dict[int, list[bytes]] = defaultdict(list)
    for pattern in patterns:
        by_start[struct.unpack("<Q", pattern[:_WINDOW])[0]].append(pattern)
    keys = np.array(sorted(by_start), dtype=np.uint64)
    found = set()
    for shift in range(_WINDOW):
        n = (len(content) - shift) // _WINDOW
        if n <= 0:
            continue
        windows = np.frombuffer(content, dtype="<u8", count=n, offset=shift)
        at = np.minimum(np.searchsorted(keys, windows), len(keys) - 1)
        for hit in np.flatnonzero(keys[at] == windows):
            start = shift + _WINDOW * int(hit)
            for pattern in by_start[int(windows[hit])]:
                if content[start : start + len(pattern)] == pattern:
                    found.add(patterns[pattern])
    return found


def _unpacked(content: bytes) -> Iterator[bytes]:
    """A file's bytes, and what is in it where it is compressed."""
    yield content
    if content[:2] == b"\x1f\x8b":
        yield gzip.decompress(content)
    if content[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield name.encode()
                yield archive.read(name)


def _plant(root: Path, names: Iterable[str]) -> Canaries:
    """Rename patients and files, add dates and image numbers, and make values rare."""
    rng, canaries = random.Random(7), Canaries()

    def new(prefix: str) -> str:
        text = f"{prefix}{rng.getrandbits(48):012x}"
        canaries.texts.append(text)
        return text

    for site in names:
        folder = root / site
        manifest = pd.read_csv(folder / "manifest.csv", dtype=str, keep_default_na=False)
        clinical = pd.read_csv(folder / "clinical.csv", dtype={"patient_id": str})
        ids = {x: new("MRN") for x in clinical["patient_id"]}
        files = {x: f"{new('Mueller_Anna_')}.csv" for x in sorted(set(manifest["path"]))}
        for old, name in files.items():
            table = pd.read_csv(folder / old, dtype={"patient_id": str})
            table["patient_id"] = table["patient_id"].map(ids)
            if _FLOAT_COLUMN in table:
                rare = [x + rng.random() * 1e-3 for x in table[_FLOAT_COLUMN]]
                table[_FLOAT_COLUMN] = rare
                canaries.floats += rare
            table.to_csv(folder / name, index=False)
            (folder / old).unlink()
        clinical["patient_id"] = clinical["patient_id"].map(ids)
        # Dates and image numbers that the registry has and the study does not read.
        clinical["born"] = [
            f"19{rng.randint(10, 49)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
            for _ in range(len(clinical))
        ]
        clinical["study_uid"] = [
            f"1.2.826.0.1.{rng.randint(10**15, 10**16)}" for _ in range(len(clinical))
        ]
        canaries.texts += [*clinical["born"], *clinical["study_uid"]]
        clinical.to_csv(folder / "clinical.csv", index=False)
        manifest["patient_id"] = manifest["patient_id"].map(ids)
        manifest["path"] = manifest["path"].map(files)
        manifest.to_csv(folder / "manifest.csv", index=False)
    for name in ("truth.json", "simulation.json"):  # the simulation's own, which knows everybody
        (root / name).unlink(missing_ok=True)
    return canaries


class Studied:
    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "consortium"
        self.names = federated.build(self.root)
        self.canaries = _plant(self.root, self.names)
        self.patterns = self.canaries.patterns()
        self.summary = federated.run(self.root)

    def outside(self) -> list[Path]:
        """Every file that is not in a site's folder or kit."""
        of_sites = [self.root / x for x in self.names]
        of_sites += [self.root / "kits" / x for x in self.names]
        of_sites += [self.root / "logs" / f"{x}.log" for x in self.names]
        return [
            path
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and not any(path.is_relative_to(x) for x in of_sites)
        ]


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Studied:
    return Studied(tmp_path_factory.mktemp("canary"))


def test_a_thousand_identifiers_are_planted_and_reach_the_sites_cohorts(studied: Studied) -> None:
    assert len(set(studied.canaries.texts)) + len(studied.canaries.floats) > 1000
    cohort = (studied.root / studied.names[0] / "cohort.h5mu").read_bytes()
    assert len(leaks(cohort, studied.patterns)) > 100


def test_no_identifier_is_found_on_a_disk_in_a_database_or_an_artifact_outside_the_sites(
    studied: Studied,
) -> None:
    searched = studied.outside()
    names = {path.name for path in searched}
    assert {"mlflow.db", "prefect.db", "report.html", "audit.jsonl", "log.txt"} <= names
    found = {
        str(path.relative_to(studied.folder)): leaked
        for path in searched
        if path.name not in ("payloads.bin", "traffic.bin")
        for content in _unpacked(path.read_bytes())
        if (leaked := leaks(path.name.encode() + b"\0" * _WINDOW + content, studied.patterns))
    }
    assert found == {}


def test_no_identifier_is_found_in_the_payloads_that_crossed(studied: Studied) -> None:
    payloads = (studied.folder / "payloads.bin").read_bytes()
    assert len(payloads) > 50_000
    assert leaks(payloads, studied.patterns) == set()


def test_no_identifier_is_found_in_the_traffic_on_the_wire(studied: Studied) -> None:
    traffic = studied.folder / "traffic.bin"
    if traffic.exists():  # only whoever may look at the interface can search it
        content = traffic.read_bytes()
        assert len(content) > 100_000
        assert b"CNSE1" not in content  # the envelopes are inside transport security
        assert leaks(content, studied.patterns) == set()


def test_no_path_of_a_site_reaches_a_server(studied: Studied) -> None:
    where = [str(studied.root / x).encode() for x in studied.names]
    for name in ("mlflow.db", "prefect/prefect.db"):
        content = (studied.root / name).read_bytes()
        assert not any(path in content for path in where), name


@pytest.mark.parametrize("how", ["raw", "base64", "hex", "utf-16", "float", "float as base64"])
def test_a_leak_on_purpose_is_found_by_the_same_search(studied: Studied, how: str) -> None:
    text, value = studied.canaries.texts[500], studied.canaries.floats[7]
    raw = struct.pack("<d", value)
    written = {
        "raw": text.encode(),
        "base64": base64.b64encode(f'{{"patient": "{text}"}}'.encode()),
        "hex": text.encode().hex().encode(),
        "utf-16": text.encode("utf-16"),
        "float": raw,
        "float as base64": base64.b64encode(b"ab" + raw + b"cd"),
    }[how]
    content = (studied.root / "mlflow.db").read_bytes()
    at = len(content) // 2 + 1
    assert leaks(content[:at] + written + content[at:], studied.patterns)


def test_the_study_gave_the_model_of_the_pooled_rows(studied: Studied) -> None:
    summary = studied.summary
    assert summary["max_coefficient_gap"] < 1e-8, json.dumps(summary["max_coefficient_gap"])
    assert summary["sums"] == "secure_sum"
    assert len(summary["round_s"]) == summary["messages"]
    assert summary["engine_round_s"] > 0
