"""A consortium on disk: every site's raw files, whole or absent, and the truth beside them."""

from __future__ import annotations

import csv
import io
import json
import os
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from modalities.files import replacing, sweep
from modalities.synthetic.counts import write_counts
from modalities.synthetic.scans import ROI, scan_paths, write_scan
from modalities.synthetic.slides import write_slide
from modalities.synthetic.tables import draw_tables, feature_names
from modalities.synthetic.truth import (
    MODALITIES,
    STAGES,
    TREATMENTS,
    Patients,
    Truth,
    draw_patients,
    truth_of,
    truth_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from multiprocessing.process import BaseProcess
    from pathlib import Path

FORMAT_VERSION = 1

SITE_FILES: Mapping[str, str] = MappingProxyType(
    {
        "manifest.csv": "patient_id, modality, path, mask_path, roi; paths relative to this file",
        "clinical.csv": "patient_id, event, time_days, age_years, sex, stage, treatment",
        "raw/slides/<patient>.tif": "pyramidal tiled TIFF at 0.5 micrometres a pixel",
        "raw/scans/<patient>/ct/": "DICOM CT series of every other patient",
        "raw/scans/<patient>/rtstruct.dcm": "its structure set, with the region GTV",
        "raw/scans/<patient>_ct.nii.gz": "CT of the other patients",
        "raw/scans/<patient>_gtv.nii.gz": "its mask",
        "raw/rna.h5ad": "integer counts of all patients who have any",
        "<modality>.csv": "features instead of all raw files, in a simulation of tables only",
    }
)
"""What a site's folder holds, by name."""

_MARKER = "simulation.json"
_CHUNK = 8


@dataclass(frozen=True)
class _Chunk:
    """Patients of one site whose images one process draws."""

    folder: Path
    seed: int
    site: int
    indices: tuple[int, ...]


def simulate(
    folder: Path,
    sites: Sequence[int],
    *,
    seed: int = 0,
    tables_only: bool = False,
    workers: int = 2,
    advance: Callable[[int], None] | None = None,
) -> Truth:
    """Write the raw files of a simulated consortium, with the same bytes every time.

    The sites lie in ``folder/site-01`` and so on with the files that ``SITE_FILES`` names, the
    truth in ``folder/truth.json``. What an interrupted run of the same simulation left is kept; a
    patient's files depend on the seed, the site and the patient's number alone.

    Parameters
    ----------
    folder
        Where to write; made if absent.
    sites
        Number of patients at each site.
    seed
        Seed of everything random.
    tables_only
        Write one table of features per modality instead of slides, scans and counts.
    workers
        Processes that draw images; with 1, this process does.
    advance
        Called with the number of patients just finished.

    Returns
    -------
    truth
        True log hazards, for scoring only.

    Raises
    ------
    ValueError
        If an argument is out of range, or ``folder`` holds another simulation or other sites.
    """
    _check(sites, seed, workers)
    _claim(folder, {"seed": seed, "sites": [int(n) for n in sites], "tables_only": tables_only})
    report = advance or _ignore
    patients = {
        f"site-{site + 1:02d}": draw_patients(seed, site, range(n)) for site, n in enumerate(sites)
    }
    for name, rows in patients.items():
        if tables_only:
            _write_tables(folder / name, seed, rows)
            report(len(rows.indices))
        else:
            _write_site(folder / name, seed, rows)
    if not tables_only:
        chunks = [c for name, rows in patients.items() for c in _chunks(folder / name, seed, rows)]
        _draw(chunks, workers, report)
    truth = truth_of(seed, patients)
    _keep_or_write(folder / "truth.json", truth_text(truth))
    _finish(folder)
    return truth


def _ignore(_: int) -> None:
    return None


def _check(sites: Sequence[int], seed: int, workers: int) -> None:
    if not sites or min(sites) < 1:
        raise ValueError(
            f"sites: found {list(sites)}, needed at least one site with at least one patient each"
        )
    for name, value, least in (("seed", seed, 0), ("workers", workers, 1)):
        if value < least:
            raise ValueError(f"{name}: found {value}, needed at least {least}")


def _claim(folder: Path, parameters: Mapping[str, Any]) -> None:
    """Mark the folder as this simulation's before anything else is written, or refuse."""
    marker = folder / _MARKER
    wanted = {"format": FORMAT_VERSION, **parameters}
    if marker.exists():
        found = _read(marker)
        finished = found.pop("finished", False)
        if found != wanted:
            raise ValueError(
                "simulation: found one with other parameters in the folder, needed the same ones "
                "or an empty folder; choose another folder"
            )
        if not finished:
            # Readers of a series would read what a killed run left half-written.
            sweep(folder)
    elif any(folder.glob("site-*")):
        raise ValueError(
            "simulation: found sites in the folder that no simulation wrote, needed a folder "
            "without sites; choose another folder"
        )
    else:
        _write_text(marker, json.dumps({**wanted, "finished": False}) + "\n")


def _read(marker: Path) -> dict[str, Any]:
    try:
        content = json.loads(marker.read_text())
    except ValueError:
        content = {}
    return content if isinstance(content, dict) else {}


def _finish(folder: Path) -> None:
    marker = folder / _MARKER
    content = _read(marker)
    if not content.get("finished"):
        _write_text(marker, json.dumps({**content, "finished": True}) + "\n")


def _write_text(target: Path, text: str) -> None:
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def _keep_or_write(target: Path, text: str) -> None:
    if not target.exists():
        _write_text(target, text)


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def _write_site(folder: Path, seed: int, patients: Patients) -> None:
    """Write everything of a site but its images, which processes share."""
    counts = folder / "raw" / "rna.h5ad"
    with_counts = [i for i, has in zip(patients.indices, patients.has("omics"), strict=True) if has]
    if with_counts and not counts.exists():
        write_counts(counts, seed, draw_patients(seed, patients.site, with_counts))
    _write_registry(folder, patients, _raw_row)


def _write_tables(folder: Path, seed: int, patients: Patients) -> None:
    if all((folder / f"{modality}.csv").exists() for modality in MODALITIES):
        return _write_registry(folder, patients, _table_row)
    for modality, values in draw_tables(seed, patients).items():
        has = patients.has(modality)
        ids = [name for name, kept in zip(patients.patient_ids, has, strict=True) if kept]
        rows = (
            [name, *(f"{value:.6g}" for value in row)]
            for name, row in zip(ids, values[has].tolist(), strict=True)
        )
        text = _csv(("patient_id", *feature_names(modality)), rows)
        _keep_or_write(folder / f"{modality}.csv", text)
    return _write_registry(folder, patients, _table_row)


def _write_registry(
    folder: Path, patients: Patients, row: Callable[[str, int, str], tuple[str, ...]]
) -> None:
    """Write the registry export and the manifest of a site."""
    manifest = _csv(
        ("patient_id", "modality", "path", "mask_path", "roi"),
        (
            (patient_id, modality, *row(modality, index, patient_id))
            for modality in MODALITIES
            for has, index, patient_id in zip(
                patients.has(modality), patients.indices, patients.patient_ids, strict=True
            )
            if has
        ),
    )
    clinical = _csv(
        ("patient_id", "event", "time_days", "age_years", "sex", "stage", "treatment"),
        zip(
            patients.patient_ids,
            patients.event.astype(int).tolist(),
            patients.time_days.tolist(),
            patients.age_years.tolist(),
            ["male" if male else "female" for male in patients.male],
            [STAGES[stage] for stage in patients.stage],
            [TREATMENTS[treatment] for treatment in patients.treatment],
            strict=True,
        ),
    )
    _keep_or_write(folder / "clinical.csv", clinical)
    _keep_or_write(folder / "manifest.csv", manifest)


def _raw_row(modality: str, index: int, patient_id: str) -> tuple[str, str, str]:
    if modality == "pathology":
        return f"raw/slides/{patient_id}.tif", "", ""
    if modality == "radiology":
        return *scan_paths(index, patient_id), ROI
    return "raw/rna.h5ad", "", ""


def _table_row(modality: str, _index: int, _patient_id: str) -> tuple[str, str, str]:
    return f"{modality}.csv", "", ""


def _chunks(folder: Path, seed: int, patients: Patients) -> list[_Chunk]:
    return [
        _Chunk(folder, seed, patients.site, patients.indices[start : start + _CHUNK])
        for start in range(0, len(patients.indices), _CHUNK)
    ]


def _draw(chunks: Sequence[_Chunk], workers: int, report: Callable[[int], None]) -> None:
    """Draw the images that are still missing; processes are started only if there are any."""
    waiting = []
    for chunk in chunks:
        if _missing_images(chunk):
            waiting.append(chunk)
        else:
            report(len(chunk.indices))
    if workers == 1 or len(waiting) < 2:
        for chunk in waiting:
            report(_draw_chunk(chunk))
        return
    # Not forked: a copy of a process that runs threads may hang.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        running = [pool.submit(_draw_chunk, chunk) for chunk in waiting]
        try:
            for done in as_completed(running):
                report(done.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """End this process when its parent is killed, so that it does not draw beside the next run."""
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _missing_images(chunk: _Chunk) -> list[tuple[str, int]]:
    """Modality and place within the chunk of every image that does not lie there yet."""
    patients = draw_patients(chunk.seed, chunk.site, chunk.indices)
    missing = []
    for place, (index, patient_id) in enumerate(
        zip(chunk.indices, patients.patient_ids, strict=True)
    ):
        # A scan's mask is written last.
        last = {
            "pathology": f"raw/slides/{patient_id}.tif",
            "radiology": scan_paths(index, patient_id)[1],
        }
        missing += [
            (modality, place)
            for modality, path in last.items()
            if patients.has(modality)[place] and not (chunk.folder / path).exists()
        ]
    return missing


def _draw_chunk(chunk: _Chunk) -> int:
    """Draw the missing images of a chunk; returns its number of patients."""
    patients = draw_patients(chunk.seed, chunk.site, chunk.indices)
    for modality, place in _missing_images(chunk):
        patient_id, key = patients.patient_ids[place], (chunk.site, chunk.indices[place])
        observed = patients.observed[modality][place]
        if modality == "pathology":
            target = chunk.folder / "raw" / "slides" / f"{patient_id}.tif"
            write_slide(target, observed, seed=chunk.seed, key=key)
        else:
            write_scan(chunk.folder, patient_id, observed, seed=chunk.seed, key=key)
    return len(chunk.indices)
