"""Pictures of the pages that people work with: none is missing, left over, or large."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PICTURES = DOCS / "pictures"
SHOWN = re.compile(r"!\[(?P<says>[^\]]*)\]\((?P<file>[^)\s]+)\)")
TAKEN = re.compile(r'picture="(\w+)"')
MAX_BYTES = 150_000


def shown() -> dict[str, list[str]]:
    """What is written in place of each picture, by its file and the pages that show it."""
    found: dict[str, list[str]] = {}
    for page in DOCS.glob("*.md"):
        for match in SHOWN.finditer(page.read_text(encoding="utf-8")):
            found.setdefault(match["file"], []).append(match["says"])
    return found


def test_every_picture_is_on_a_page_and_every_page_has_its_pictures() -> None:
    assert set(shown()) == {f"pictures/{x.name}" for x in PICTURES.iterdir()}


def test_every_picture_says_in_words_what_is_on_it() -> None:
    for file, texts in shown().items():
        assert all(len(text) >= 30 for text in texts), file


def test_pictures_are_small() -> None:
    for picture in PICTURES.iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG"), picture.name
        assert picture.stat().st_size <= MAX_BYTES, picture.name


def test_every_picture_can_be_taken_anew() -> None:
    taken = set(TAKEN.findall((ROOT / "tests/test_topology.py").read_text(encoding="utf-8")))
    assert taken == {x.stem for x in PICTURES.iterdir()}
