"""The parts of an offline bundle that no package tool makes: our own wheel, pins and digests."""

from __future__ import annotations

import base64
import hashlib
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

PACKAGE: Final = "consilium"
SUMS: Final = "SHA256SUMS"
# From .venv/lib/python3.11/site-packages to the folder that has .venv and our sources: the code
# runs from there, beside the files that are no Python, as it does in a checkout.
_TO_SOURCES: Final = "../../../..\n"
_WHEEL: Final = (
    "Wheel-Version: 1.0\nGenerator: consilium\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
)
_MOMENT: Final = (2020, 1, 1, 0, 0, 0)


def write_wheel(folder: Path, package: str, version: str, files: Mapping[str, str]) -> Path:
    """Write a wheel of plain files; the same files give the same bytes.

    Parameters
    ----------
    files
        Text by name, as it lies in ``site-packages``; ``METADATA`` and ``entry_points.txt`` go to
        the wheel's own folder.
    """
    info = f"{package}-{version}.dist-info"
    own = {"METADATA", "entry_points.txt"}
    content = {f"{info}/{name}" if name in own else name: text for name, text in files.items()}
    content[f"{info}/WHEEL"] = _WHEEL
    record = [f"{name},{_record(text)}" for name, text in content.items()]
    content[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    path = folder / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in content.items():
            archive.writestr(zipfile.ZipInfo(name, _MOMENT), text)
    return path


def own_wheel(folder: Path) -> Path:
    """Write the wheel that makes the sources beside ``.venv`` an installed package."""
    found = distribution(PACKAGE)
    files = {f"{PACKAGE}.pth": _TO_SOURCES}
    for name in ("METADATA", "entry_points.txt"):
        text = found.read_text(name)
        if text is None:
            raise FileNotFoundError(f"{name}: found none of the installed package")
        files[name] = text
    return write_wheel(folder, PACKAGE, found.version, files)


def pins(wheels: Path) -> str:
    """Give requirements that fit exactly the wheels of a folder, each by its digest."""
    lines = []
    for wheel in sorted(wheels.glob("*.whl")):
        package, version = wheel.name.split("-")[:2]
        lines.append(f"{package}=={version} --hash=sha256:{_digest(wheel)}\n")
    return "".join(lines)


def finish(folder: Path) -> None:
    """Complete a bundle whose wheels and sources are there."""
    own_wheel(folder / "wheels")
    (folder / "requirements.txt").write_text(pins(folder / "wheels"))
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SUMS)
    lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines))


def _record(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    coded = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    return f"sha256={coded},{len(text.encode())}"


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    finish(Path(sys.argv[1]))
