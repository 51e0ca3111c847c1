"""Files of a slide: which there are, whether they stay the same, and the slide's name.

Most slides are one file. Of MRXS, VMS and VMU one file names or stands beside others, and a DICOM
slide is a series: every file of one folder that says so in its header, as OpenSlide gathers them.
No value of a header leaves this module.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from modalities.cohort import DataError
from modalities.files import digest_path, fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    FileState = tuple[int, int, int]

# Of anything but DICOM, which is known by its header.
SUFFIXES: Final = frozenset(
    {".bif", ".czi", ".mrxs", ".ndpi", ".scn", ".svs", ".svslide", ".tif", ".tiff", ".vms", ".vmu"}
)
# Archives give DICOM files all of these, and names that are a UID end in a dot and digits.
_DICOM_SUFFIXES: Final = frozenset({".dcm", ".dicom", ""})
_DICOM_MAGIC: Final = b"DICM"
_DICOM_MAGIC_AT: Final = 128
_WHOLE_SLIDE_UID: Final = "1.2.840.10008.5.1.4.1.1.77.1.6"
_SOP_CLASS: Final = 0x00020002
_SERIES: Final = 0x0020000E
_KEY_FILE_BYTES: Final = 1 << 16


def slide_files(path: Path) -> list[Path]:
    """Files that are read for a slide: its own, then the others in the order of their names.

    Raises
    ------
    OSError
        If the slide or its folder is not there.
    """
    data = path.with_suffix("")
    suffix = path.suffix.lower()
    if suffix == ".mrxs":
        return [path, *sorted(p for p in data.rglob("*") if p.is_file())]
    if suffix in {".vms", ".vmu"}:
        return [path, *sorted(_named_in(path))]
    series = _series(path)
    return [path] if not series else [path, *(p for p in _same_series(path, series) if p != path)]


def digest_slide(path: Path) -> str:
    """SHA-256 of a slide, with the other files where its format has any (MRXS, VMS, VMU, DICOM).

    Raises
    ------
    DataError
        ``missing_file`` or ``unreadable_slide``.
    """
    try:
        return _digest(path)
    except FileNotFoundError:
        raise DataError("missing_file", "slide: found no file; check the path") from None
    except OSError:
        raise DataError(
            "unreadable_slide", "slide: found a file that cannot be read; check its permissions"
        ) from None


def slide_state(path: Path) -> frozenset[tuple[str, FileState]] | None:
    """Tell the files of a slide from others that were put into their place or written to.

    None where the slide is away.
    """
    try:
        return frozenset((p.name, _state(p)) for p in slide_files(path))
    except OSError:
        return None


def changed_slide() -> DataError:
    """Error of a slide that is no longer the one whose reading began."""
    return DataError(
        "changed_slide",
        "slide: found another file than when its reading began, needed one that stays; "
        "run it again",
    )


def slide_stem(path: Path) -> str:
    """Name of a slide as its files have it, by which files that are made of it are named.

    The name of its file without suffix. A DICOM series in several files has the name of its
    folder, unless another slide is in there too: its files are numbers, the same in every series.
    """
    try:
        own = _series(path)
        if own:
            beside = [_series_if_told(p) for p in _files_in(path.parent)]
            if beside.count(own) > 1 and set(beside) <= {own, None}:
                return path.absolute().parent.name or path.stem
    except OSError:
        pass
    return path.stem


def slide_name(path: Path) -> str:
    """Name of a slide, as text also where it is none in UTF-8."""
    return os.fsencode(slide_stem(path)).decode(errors="backslashreplace")


def slides_among(files: Iterable[Path]) -> list[Path]:
    """Give the slides among files by their suffixes, sorted; of a DICOM series its first file.

    A DICOM file that is no whole-slide image is left out.
    """
    return each_once(path for path in sorted(files) if _is_slide(path))


def each_once(slides: Iterable[Path]) -> list[Path]:
    """Leave out a slide that was there before, and another file of the same DICOM series."""
    found: dict[tuple[Path, str], Path] = {}
    for path in slides:
        found.setdefault((path.parent, _series_if_told(path) or path.name), path)
    return list(found.values())


def _is_slide(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in _DICOM_SUFFIXES or suffix[1:].isdigit():
        return _series_if_told(path) is not None
    return suffix in SUFFIXES


def _digest(path: Path) -> str:
    data = path.with_suffix("")
    if path.suffix.lower() == ".mrxs" and data.is_dir():
        return fingerprint([digest_path(path), digest_path(data)])
    digests = [digest_path(p) for p in slide_files(path)]
    if len(digests) == 1:
        return digests[0]
    # A DICOM file says itself what it is: neither its name counts nor which of them was named.
    return fingerprint(sorted(digests) if _series(path) else digests)


def _state(path: Path) -> FileState:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _files_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file())


def _named_in(key_file: Path) -> set[Path]:
    """Files beside a VMS or VMU file that stand in it as values."""
    with key_file.open("rb") as stream:
        lines = stream.read(_KEY_FILE_BYTES).splitlines()
    values = (os.fsdecode(line.partition(b"=")[2].strip()) for line in lines)
    named = {key_file.parent / x for x in values if x and "\0" not in x and Path(x).name == x}
    return {p for p in named if p.is_file()} - {key_file}


def _same_series(path: Path, series: str) -> Iterator[Path]:
    return (p for p in _files_in(path.parent) if _series_if_told(p) == series)


def _series_if_told(path: Path) -> str | None:
    """As ``_series``; of a file that cannot be read it is as if none could be found."""
    try:
        return _series(path) if path.is_file() else None
    except OSError:
        # Whatever has this suffix may be a slide, and is to be told of.
        return "" if path.suffix.lower() == ".dcm" else None


def _series(path: Path) -> str | None:
    """Give the series of a DICOM slide; "" where it names none, None where it is no such slide."""
    # Not opened, since others tell what these are: what is TIFF and DICOM at once is read as TIFF.
    if path.suffix.lower() in SUFFIXES:
        return None
    return _series_in(path, _state(path))


@lru_cache(maxsize=1 << 14)
def _series_in(path: Path, state: FileState) -> str | None:
    """Read the header of a file; ``state`` is of the cache's key, since a file may change."""
    with path.open("rb") as stream:
        if stream.read(_DICOM_MAGIC_AT + 4)[_DICOM_MAGIC_AT:] != _DICOM_MAGIC:
            return None
    from pydicom.filereader import read_file_meta_info, read_partial

    series = None
    try:
        if _text(read_file_meta_info(path), _SOP_CLASS) == _WHOLE_SLIDE_UID:
            series = ""
            with path.open("rb") as stream:
                # The table of frames, of which there may be a hundred thousand, comes after it.
                header = read_partial(
                    stream, stop_when=lambda tag, _vr, _n: tag > _SERIES, specific_tags=[_SERIES]
                )
            series = _text(header, _SERIES)
    except OSError:
        raise
    except Exception:  # noqa: BLE001 - what damage does to a header, nobody foresees
        return series
    return series


def _text(dataset: Any, tag: int) -> str:
    """Value of an element as it stands: the library would tell of an odd one in its log."""
    if tag not in dataset:
        return ""
    value = dataset.get_item(tag).value
    text = value.decode("ascii", errors="replace") if isinstance(value, bytes) else str(value or "")
    return text.strip(" \0")
