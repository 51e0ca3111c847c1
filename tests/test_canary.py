"""A thousand identifiers in the sites' files, none of them anywhere else after a whole study."""

from __future__ import annotations

import base64
import gzip
import io
import json
import socket
import struct
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pydicom
import pytest
import tifffile
from typer.testing import CliRunner

from modalities.cohort import read_cohort
from modalities.synthetic.dicom import write_series, write_structure_set
from modalities.synthetic.scans import draw_scan, site_scanner
from modalities.synthetic.slides import SLIDE_MPP, draw_slide, site_stain
from tests import federated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flows.services import Server

pytestmark = pytest.mark.border

SIZES = (95, 90, 85)
N_IMAGES = 3
N_IDENTIFIERS = 1000
TABLES = ("pathology", "radiology", "omics")
# Beside the tables, so that raw files are read too; a few say too little to be trained on.
IMAGES = """
[modality.slides]
kind = "pathology"
pretrained = false
[modality.scans]
kind = "radiology"
"""
LEAKS = {
    "engine": ("wire-opened", "payloads"),
    "prefect": ("prefect", "loopback"),
    "mlflow": ("mlflow.db",),
    "run": ("runs",),
    "before the first flow": ("loopback",),
    "after the last flow": ("loopback",),
}
_SYLLABLES = (
    "zor", "vik", "thand", "quis", "brel", "mok", "fen", "dral", "yst", "grom", "pel", "wex", "jun",
    "korb", "lus", "narf",
)  # fmt: skip
_CHUNK = 1 << 22
_ANY_PROTOCOL = 3
_SO_RCVBUFFORCE = 33  # room for what comes while this process is at something else


@dataclass(frozen=True)
class Planted:
    """What was planted, and what is leaked on purpose.

    Attributes
    ----------
    texts
        Record numbers, names, DICOM UIDs, file names and dates, in tables and in raw files.
    numbers
        Rare values, each of which stands next to the one of the same place in ``beside``.
    controls
        Text that is leaked, by where.
    """

    texts: list[str]
    numbers: list[float]
    beside: list[float]
    controls: dict[str, str]


class Search:
    """Finds identifiers in bytes, in whatever way they are written."""

    def __init__(self, patterns: dict[bytes, str]) -> None:
        assert min(map(len, patterns)) >= 8
        self._patterns = patterns
        self._lengths = sorted({len(p) for p in patterns})
        self._starts = np.zeros(1 << 24, dtype=bool)
        self._by_start: dict[bytes, list[bytes]] = {}
        for pattern in patterns:
            self._starts[int.from_bytes(pattern[:3], "big")] = True
            self._by_start.setdefault(pattern[:8], []).append(pattern)

    def in_bytes(self, data: bytes) -> set[str]:
        """Identifiers that are in some bytes, or in what they hold compressed."""
        found: set[str] = set()
        overlap = self._lengths[-1]
        for start in range(0, len(data), _CHUNK):
            found |= self._in_chunk(data[start : start + _CHUNK + overlap])
        for inner in _unpacked(data):
            found |= self.in_bytes(inner)
        return found

    def _in_chunk(self, data: bytes) -> set[str]:
        if len(data) < 8:
            return set()
        values = np.frombuffer(data, dtype=np.uint8).astype(np.uint32)
        triples = values[:-2] << 16 | values[1:-1] << 8 | values[2:]
        found = set()
        for at in np.flatnonzero(self._starts[triples]).tolist():
            for pattern in self._by_start.get(data[at : at + 8], ()):
                if data.startswith(pattern, at):
                    found.add(self._patterns[pattern])
        return found

    def in_files(self, *places: Path) -> dict[str, set[str]]:
        """Identifiers by the file that holds them, their names and folders included."""
        files = [f for p in places for f in ([p] if p.is_file() else p.rglob("*"))]
        found = {
            str(file): self.in_bytes(str(file).encode())
            | (self.in_bytes(file.read_bytes()) if file.is_file() else set())
            for file in files
        }
        return {file: what for file, what in found.items() if what}


def _unpacked(data: bytes) -> Iterator[bytes]:
    """Give what bytes hold that are a gzip or zip file."""
    if data[:2] == b"\x1f\x8b":
        with suppress(OSError, EOFError):
            yield gzip.decompress(data)
    if data[:4] == b"PK\x03\x04":
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.infolist():
                yield member.filename.encode()
                yield archive.read(member)


def _base64(data: bytes) -> set[bytes]:
    """Base64 of bytes, wherever they begin among others: the digits that are theirs alone."""
    found = set()
    for before in range(3):
        digits = base64.b64encode(bytes(before) + data)
        first = (0, 2, 3)[before]
        last = (before + len(data)) * 8 // 6
        own = digits[first:last]
        found |= {own, own.translate(bytes.maketrans(b"+/", b"-_"))}
    return found


def written(data: bytes) -> set[bytes]:
    """Bytes as they are, in hexadecimal digits and in base64."""
    return {data, data.hex().encode(), data.hex().upper().encode(), *_base64(data)}


def patterns_of(texts: Sequence[str], pairs: Sequence[tuple[float, float]]) -> dict[bytes, str]:
    """Every way to write these texts and numbers, with what each stands for.

    A number in single precision is too short to be told from chance; it is looked for together
    with the number beside it.
    """
    patterns: dict[bytes, str] = {}
    for text in texts:
        forms = written(text.encode()) | {text.encode("utf-16-le"), text.encode("utf-16-be")}
        patterns |= dict.fromkeys(forms, text)
    for one, other in pairs:
        name = repr(float(one))
        forms = written(name[:12].encode()) | {name[:12].encode("utf-16-le")}
        for order in "<>":
            forms |= written(struct.pack(f"{order}d", one))
            forms |= written(struct.pack(f"{order}2f", one, other))
        patterns |= dict.fromkeys(forms, name)
    return patterns


def search_for(planted: Planted) -> Search:
    pairs = list(zip(planted.numbers, planted.beside, strict=True))
    return Search(patterns_of(planted.texts, pairs))


@pytest.mark.parametrize(
    "leaked",
    [
        b"Zorvik Thandquis", b"Wm9ydmlrIFRoYW5kcXVpcw==", b"YVpvcnZpayBUaGFuZHF1aXM",
        b"YWFab3J2aWsgVGhhbmRxdWlz", b"5a6f7276696b205468616e6471756973",
        "Zorvik Thandquis".encode("utf-16-le"), gzip.compress(b"Zorvik Thandquis", mtime=0),
    ],
)  # fmt: skip
def test_a_name_is_found_however_it_is_written(leaked: bytes) -> None:
    search = Search(patterns_of(["Zorvik Thandquis"], []))
    assert search.in_bytes(bytes(1000) + leaked if leaked[:2] != b"\x1f\x8b" else leaked)
    assert not search.in_bytes(bytes(1000) + leaked[:-3] if leaked[:1] == b"Z" else b"Zorvik")


@pytest.mark.parametrize("kind", ["<f8", ">f8", "<f4", ">f4"])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_a_rare_number_is_found_in_any_precision_order_and_encoding(kind: str, offset: int) -> None:
    values = np.array([61.283746501928374, 17.550028364819273])
    search = Search(patterns_of([], [tuple(values.tolist())]))
    raw = bytes(offset) + values.astype(kind).tobytes() + b"rest"
    for leaked in (raw, base64.b64encode(raw), raw.hex().encode()):
        assert search.in_bytes(leaked) == {repr(values[0].item())}
    assert search.in_bytes(json.dumps(values.tolist()).encode())
    assert not search.in_bytes(np.array([61.28, 17.55]).tobytes())


def test_an_identifier_is_found_across_the_pieces_in_which_a_large_file_is_read() -> None:
    search = Search(patterns_of(["Zorvik Thandquis"], []))
    assert search.in_bytes(bytes(_CHUNK - 7) + b"Zorvik Thandquis" + bytes(_CHUNK))
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("job/meta.json", '{"name": "Zorvik Thandquis"}')
        assert search.in_bytes(buffer.getvalue())


def _names(rng: np.random.Generator, n: int) -> list[str]:
    found: set[str] = set()
    while len(found) < n:
        first, *last = rng.choice(_SYLLABLES, 5).tolist()
        found.add(f"{first.title()}{last[0]} {''.join(last[1:]).title()}")
    return sorted(found)


def plant(root: Path, sites: Sequence[str]) -> Planted:
    """Put identifiers into every file of a simulated consortium of tables."""
    rng = np.random.default_rng(4)
    texts: list[str] = []
    numbers: list[float] = []
    beside: list[float] = []
    names = iter(_names(rng, sum(SIZES)))
    days = pd.date_range("1931-01-02", "1969-12-30").strftime("%Y-%m-%d")
    dates = iter(rng.choice(days, sum(SIZES), replace=False).tolist())
    for at, site in enumerate(sites):
        clinical = pd.read_csv(root / site / "clinical.csv", dtype=str)
        own = _pseudonyms(rng, at, len(clinical))
        new = dict(zip(clinical["patient_id"], own, strict=True))
        clinical["patient_id"] = own
        clinical["name"] = [next(names) for _ in own]
        clinical["born"] = [next(dates) for _ in own]
        ages = clinical["age_years"].astype(float) + rng.uniform(0.0, 1e-3, len(own))
        clinical["age_years"] = [repr(x) for x in ages]
        clinical.to_csv(root / site / "clinical.csv", index=False)
        texts += [*own, *clinical["name"], *clinical["born"]]
        numbers += ages[:-1].tolist()[:30]
        beside += ages[1:].tolist()[:30]
        texts += _plant_tables(root / site, rng, new, (numbers, beside))
        texts += _plant_images(root / site, rng, own[:N_IMAGES], at)
    kept = N_IDENTIFIERS - len(texts)
    controls = {x: f"Leaked {x} Korbnarf" for x in LEAKS}
    (root / "truth.json").unlink()  # a simulation's own; it knows every pseudonym
    return Planted(texts, numbers[:kept], beside[:kept], controls)


def _pseudonyms(rng: np.random.Generator, at: int, n: int) -> list[str]:
    """Record numbers at the first site, DICOM UIDs at the second, names at the third."""
    digits = [f"{x:012d}" for x in rng.choice(10**12, n, replace=False).tolist()]
    if at == 0:
        return [f"MRN-{x}" for x in digits]
    if at == 1:
        return [f"1.2.826.0.1.3680043.9.{x[:6]}.{int(x[6:])}" for x in digits]
    return [
        f"{name.replace(' ', '_')}_{x[:4]}" for name, x in zip(_names(rng, n), digits, strict=True)
    ]


def _plant_tables(
    folder: Path,
    rng: np.random.Generator,
    new: dict[str, str],
    values: tuple[list[float], list[float]],
) -> list[str]:
    """Rename patients and files, and make every value a rare one."""
    manifest = pd.read_csv(folder / "manifest.csv", dtype=str, keep_default_na=False)
    manifest["patient_id"] = manifest["patient_id"].map(new)
    names = []
    for modality in TABLES:
        table = pd.read_csv(folder / f"{modality}.csv", dtype={"patient_id": str})
        table["patient_id"] = table["patient_id"].map(new)
        cells = table.columns[1:]
        noise = rng.uniform(0.0, 1e-4, table[cells].shape)
        table[cells] = table[cells].astype(float) + noise
        values[0].extend(table[cells[0]].tolist()[:22])
        values[1].extend(table[cells[1]].tolist()[:22])
        names.append(f"export-{rng.integers(10**9, 10**10)}-{modality}.csv")
        table.to_csv(folder / names[-1], index=False, float_format="%.17g")
        (folder / f"{modality}.csv").unlink()
        manifest.loc[manifest["modality"] == modality, "path"] = names[-1]
    manifest.to_csv(folder / "manifest.csv", index=False)
    return names


def _plant_images(
    folder: Path, rng: np.random.Generator, patients: Sequence[str], at: int
) -> list[str]:
    """Add a slide and a DICOM series for some patients; those of the last are damaged.

    Names stand in headers, descriptions and file names, where a hospital's own systems put them.
    """
    texts, rows = [], []
    for i, patient in enumerate(patients):
        name, file, scan = _names(rng, 3)
        slide = folder / "raw" / f"{file.replace(' ', '-')}.tif"
        slide.parent.mkdir(exist_ok=True)
        tifffile.imwrite(
            slide, draw_slide(rng.normal(size=2), site_stain(4, at), rng), tile=(256, 256),
            compression="jpeg", photometric="rgb", resolution=(1e4 / SLIDE_MPP,) * 2,
            resolutionunit="centimeter", description=f"Aperio|Patient={name}|Rack=1",
            metadata=None,
        )  # fmt: skip
        series = folder / "raw" / scan.replace(" ", "-")
        made = draw_scan(rng.normal(size=3), site_scanner(4, at), rng)
        about = write_series(series, made.volume, made.spacing_mm, name, patient)
        write_structure_set(series.with_suffix(".dcm"), made.mask, about, "GTV")
        texts += [name, slide.stem, series.name, *_identify(sorted(series.iterdir()), rng)]
        if i == len(patients) - 1:
            slide.write_bytes(slide.read_bytes()[:-5000])
            (series / "012.dcm").unlink()
        rows.append(f"{patient},slides,raw/{slide.name},,\n")
        rows.append(f"{patient},scans,raw/{series.name},raw/{series.name}.dcm,GTV\n")
    with (folder / "manifest.csv").open("a") as manifest:
        manifest.writelines(rows)
    return texts


def _identify(images: Sequence[Path], rng: np.random.Generator) -> list[str]:
    """Write into the headers of a series what a scanner does; give that and its identifiers."""
    name, place = (x.replace(" ", "^") for x in _names(rng, 2))
    accession = f"ACC{rng.integers(10**12, 10**13)}"
    uids: set[str] = set()
    for image in images:
        header = pydicom.dcmread(image)
        header.PatientName, header.InstitutionName = name, place
        header.AccessionNumber = accession
        header.save_as(image)
        uids |= {header.StudyInstanceUID, header.SeriesInstanceUID}
    uids.add(header.SOPInstanceUID)
    return [name, place, accession, *sorted(uids)]


def _plant_failing_site(root: Path, planted: Planted) -> None:
    """Add a site whose files make its flow fail, with an identifier in the path and the text."""
    text = (root / "site-01" / "site.toml").read_text().replace('"site-01"', '"site-04"')
    folder = root / "site-04"
    folder.mkdir()
    bad = planted.texts[0]
    (folder / "site.toml").write_text(text.replace('"clinical.csv"', f'"{bad}/clinical.csv"'))
    (folder / bad / "clinical.csv").mkdir(parents=True)  # a folder in place of the file
    (folder / "manifest.csv").write_text("patient_id,modality,path,mask_path,roi\n")


def run_whole_study(root: Path) -> None:
    """Prepare, train and run a study through its flows, over the engine; once per process."""
    from flows.demo import write_consortium
    from flows.terminal import serving

    sites = write_consortium(root, SIZES, seed=11, tables_only=True, secure_sum=True)
    with (root / "study.toml").open("a") as study:
        study.write(IMAGES)
    planted = plant(root, sites)
    (root / "planted.json").write_text(json.dumps(asdict(planted)))
    controls = planted.controls
    with _capturing(root / "loopback") as say, serving(root, as_json=True) as run:
        say(controls["before the first flow"])
        run_study_of(root, run.server, sites, planted)
        say(controls["after the last flow"])


def run_study_of(root: Path, server: Server, sites: Sequence[str], planted: Planted) -> None:
    """Do what the sites and the coordinator do, one after the other."""
    from flows.demo import connect
    from flows.protocol import load_protocol

    connect(server, root)
    from flows.site import prepare_site, train_site

    study = load_protocol(root / "study.toml").study.name
    server.wait_ready()
    for site in sites:
        prepare_site(study, site)
    for site in sites:
        train_site(study, site)
    _tap(root / "payloads", planted.controls["engine"])
    with federated.loopback(root, overhear=True) as parties:
        said = [_study_run(root) for _ in range(2)]
        (root / "decrypted.json").write_text(json.dumps(sorted(parties.decrypted)))
    (root / "said.json").write_text(json.dumps(said))
    _plant_failing_site(root, planted)
    with suppress(Exception):
        prepare_site(study, "site-04")
    _leak(root, planted.controls, run_id=said[0]["run"])


def _study_run(root: Path) -> dict[str, Any]:
    """Run the study as its lead types it."""
    from flows.cli import app

    command = ["study", "run", "--root", str(root), "--federation", "flare", "--json"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


@contextmanager
def _capturing(file: Path) -> Iterator[Callable[[str], None]]:
    """Write down all loopback traffic, of whatever process; give a way to say something in it.

    Where this process may not see the traffic, no file is written.
    """
    done = threading.Event()

    def say(text: str) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            out.sendto(text.encode(), ("127.0.0.1", 9))

    try:
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(_ANY_PROTOCOL))
    except (AttributeError, PermissionError):  # another system, or not its administrator
        yield say
        return

    def capture() -> None:
        with file.open("wb") as seen:
            while not done.is_set():
                with suppress(TimeoutError):
                    seen.write(wire.recv(1 << 17))

    with wire:
        with suppress(PermissionError):
            wire.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 28)
        wire.bind(("lo", 0))
        wire.settimeout(0.5)
        thread = threading.Thread(target=capture)
        thread.start()
        try:
            yield say
        finally:
            done.set()
            thread.join()


def _tap(file: Path, control: str) -> None:
    """Write down every payload at the coordinator's end, and leak one text over the engine."""
    from fusion.flare import ECHO, FlareTransport

    exchange, begin = FlareTransport._exchange, FlareTransport._begin

    def tapped(
        self: FlareTransport, kind: str, payload: bytes, sites: Sequence[str]
    ) -> dict[str, bytes]:
        replies = exchange(self, kind, payload, sites)
        with file.open("ab") as taps:
            for data in (payload, *replies.values()):
                taps.write(data)
        return replies

    def begun(self: FlareTransport) -> None:
        begin(self)
        self._exchange(ECHO, control.encode(), self.sites)

    FlareTransport._exchange = tapped  # type: ignore[method-assign]
    FlareTransport._begin = begun  # type: ignore[method-assign]


def _leak(root: Path, controls: dict[str, str], *, run_id: str) -> None:
    """Leak texts on purpose, to Prefect's server, MLflow and the coordinator's folder of runs."""
    from mlflow import MlflowClient
    from prefect import flow

    @flow(name="leak", persist_result=False)
    def leak(text: str) -> None:
        del text

    leak(controls["prefect"])
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    run = client.search_runs([x.experiment_id for x in client.search_experiments()])[0]
    client.set_tag(run.info.run_id, "leaked", controls["mlflow"])
    leaked = base64.b64encode(b"x" + controls["run"].encode())
    (root / "runs" / run_id[:12] / "leaked.csv.gz").write_bytes(gzip.compress(leaked, mtime=0))


@dataclass(frozen=True)
class Finished:
    """A consortium after its study, and what was planted."""

    root: Path
    planted: Planted
    said: list[dict[str, Any]]

    def places(self, *names: str) -> list[Path]:
        """Files and folders in which something was left."""
        if "loopback" in names and not (self.root / "loopback").exists():
            pytest.fail(
                "loopback: found no captured traffic, needed it; run these tests on Linux as root, "
                "or with the capability NET_RAW"
            )
        return [self.root / x for x in names if (self.root / x).exists()]


_RUN = """
import sys
from pathlib import Path
from tests.test_canary import run_whole_study
run_whole_study(Path(sys.argv[1]))
"""


@contextmanager
def whole_study() -> Iterator[Finished]:
    """Run the study in a process of its own, as Prefect is set up once per process."""
    with federated.plain_folder() as folder:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _RUN, str(folder)],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        planted = Planted(**json.loads((folder / "planted.json").read_text()))
        yield Finished(folder, planted, json.loads((folder / "said.json").read_text()))


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest) -> Finished:
    return federated.shared(request.config, "whole study", whole_study)


@pytest.fixture(scope="module")
def search(finished: Finished) -> Search:
    return search_for(finished.planted)


PLACES = {
    "the coordinator's kit": ("kits/coordinator", "kits/admin"),
    "the coordinator's log and approvals": ("coordinator",),
    "the runs and their reports": ("runs",),
    "MLflow's artifacts": ("artifacts",),
    "MLflow's database": ("mlflow.db", "mlflow.db-wal"),
    "Prefect's database and files": ("prefect",),
    "what parties print": ("logs",),
    "the traffic between coordinator and sites": ("wire",),
    "the whole study's traffic on this machine": ("loopback",),
    "the traffic between coordinator and sites, decrypted": ("wire-opened",),
    "every message and reply": ("payloads",),
}


@pytest.mark.slow
def test_a_thousand_identifiers_are_in_the_sites_own_files(
    finished: Finished, search: Search
) -> None:
    planted = finished.planted
    everything = {*planted.texts, *map(repr, planted.numbers)}
    assert len(everything) == N_IDENTIFIERS
    sites = [finished.root / site for site in ("site-01", "site-02", "site-03")]
    raw = [x for site in sites for x in (*site.glob("*.csv"), site / "raw")]
    found = set[str]().union(*search.in_files(*raw).values())
    assert found == everything


@pytest.mark.slow
@pytest.mark.parametrize("site", ["site-01", "site-02", "site-03"])
def test_a_damaged_slide_and_scan_are_set_aside_and_the_others_read(
    site: str, finished: Finished
) -> None:
    aside = pd.read_csv(finished.root / site / "excluded.csv", dtype=str)
    images = aside[aside["modality"].isin(["slides", "scans"])]
    assert sorted(images["modality"]) == ["scans", "slides"]
    assert images["patient_id"].nunique() == 1
    cohort = read_cohort(finished.root / site / "cohort.h5mu")
    assert {x: cohort.mod[x].n_obs for x in ("slides", "scans")} == {
        "slides": N_IMAGES - 1, "scans": N_IMAGES - 1,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_no_identifier_is_in(place: str, finished: Finished, search: Search) -> None:
    places = finished.places(*PLACES[place])
    assert any(p.is_dir() or p.stat().st_size > 100 for p in places)
    assert search.in_files(*places) == {}


@pytest.mark.slow
def test_the_traffic_of_every_site_was_decrypted(finished: Finished) -> None:
    decrypted = json.loads((finished.root / "decrypted.json").read_text())
    assert decrypted == ["site-01", "site-02", "site-03"]


@pytest.mark.slow
@pytest.mark.parametrize("leak", LEAKS)
def test_a_text_that_is_leaked_on_purpose_is_found(leak: str, finished: Finished) -> None:
    control = finished.planted.controls[leak]
    search = Search(patterns_of([control], []))
    for place in LEAKS[leak]:
        assert search.in_files(*finished.places(place))
    assert not search.in_files(finished.root / "wire")


@pytest.mark.slow
def test_no_path_of_a_site_reaches_a_server_or_the_network(finished: Finished) -> None:
    paths = [str(finished.root / f"site-0{i}") for i in range(1, 5)]
    search = Search(patterns_of(paths, []))
    places = finished.places(*(x for of in PLACES.values() for x in of))
    assert search.in_files(*places) == {}
    assert search.in_files(finished.root / "site-04" / "logs")  # where the failure's text is
