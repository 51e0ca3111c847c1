"""Whatever a page tells people to type is a command of ours, with flags that it has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.main import get_command

from flows.cli import app

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "infra/README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
_INDENTED = re.compile(r"^ {4}(\S.*(?:\\\n.*)*)$", re.MULTILINE)
_INLINE = re.compile(r"`((?:[\w-]+ )*?consilium [^`]+)`")
_ENDS = {"&&", ";", "|", ">"}


def lines_of(page: str) -> Iterator[str]:
    """Lines that are to be typed: in blocks, indented, or between backticks."""
    for block in _BLOCK.findall(page):
        yield from block.replace("\\\n", " ").splitlines()
    outside = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    for line in _INDENTED.findall(outside):
        yield line.replace("\\\n", " ")
    yield from (text.replace("\n", " ") for text in _INLINE.findall(outside))


def typed(line: str) -> list[list[str]]:
    """Give what follows `consilium` wherever it is run in a line."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an apostrophe in a sentence
        return []
    found = []
    for at, word in enumerate(words):
        if word == "consilium" and (at == 0 or words[at - 1] != "cd"):
            rest = words[at + 1 :]
            ends = [i for i, x in enumerate(rest) if x in _ENDS]
            found.append(rest[: ends[0]] if ends else rest)
    return found


def fault(words: list[str]) -> str | None:
    """Say why this cannot be typed."""
    command: Any = get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        if not rest or rest[0].startswith("-"):
            break
        if rest[0] not in command.commands:
            is_default = command.name == "lineage"  # a group that works without a command
            return None if is_default else f"no command {rest[0]}"
        command = command.commands[rest.pop(0)]
    flags = {x for one in command.params for x in (*one.opts, *one.secondary_opts)}
    unknown = {x.partition("=")[0] for x in rest if x.startswith("-")} - flags - {"--help", "-h"}
    return f"no flag {', '.join(sorted(unknown))}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=[str(x.relative_to(ROOT)) for x in PAGES])
def test_a_page_names_commands_and_flags_that_are_there(page: Path) -> None:
    faults = {
        " ".join(words): why
        for line in lines_of(page.read_text())
        for words in typed(line)
        if (why := fault(words)) is not None
    }
    assert faults == {}


def test_pages_are_read_as_they_are_meant() -> None:
    page = (
        "```sh\ncd consilium && make\nconsilium site \\\n  check --no # x\n```\n"
        "    docker compose exec a consilium nothing\n"
    )
    found = [words for line in lines_of(page) for words in typed(line)]
    assert found == [["site", "check", "--no"], ["nothing"]]
    assert [fault(words) for words in found] == ["no flag --no", "no command nothing"]
    all_typed = [w for p in PAGES for line in lines_of(p.read_text()) for w in typed(line)]
    assert len(all_typed) > 100
    assert ["deploy"] in all_typed
