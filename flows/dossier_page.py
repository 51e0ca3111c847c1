"""A dossier's parts as one page and as Markdown: both from the same blocks, so that they agree."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flows.report_page import embedded

if TYPE_CHECKING:
    from collections.abc import Sequence

_FOLDERS = ("templates/dossier", "templates/report")


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first cell of a row names it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Markup, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Listed:
    """Sentences, one a line."""

    items: tuple[Markup, ...]


@dataclass(frozen=True)
class Pairs:
    """Names with what is said to each."""

    rows: tuple[tuple[str, Markup], ...]


Block = Markup | Table | Listed | Pairs


@dataclass(frozen=True)
class Part:
    """A statement of the dossier: a section of its page, and most often a file of its own."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]


def page(facts: dict[str, Any], parts: Sequence[Part]) -> str:
    """Write the parts as one HTML page that needs no network, no script and no other file."""
    environment = Environment(
        loader=PackageLoader("flows", _FOLDERS[0]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = resources.files("flows").joinpath(_FOLDERS[1], "style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        facts=facts,
        parts=[(part, [(kind_of(x), x) for x in part.blocks]) for part in parts],
        style=Markup(style),
        record=embedded(facts),
    )


def kind_of(block: Block) -> str:
    """Name the form of a block."""
    if isinstance(block, Markup):
        return "paragraph"
    return type(block).__name__.lower()


def markdown(part: Part, *, title: str) -> str:
    """Write one part as Markdown under a title."""
    blocks = (_markdown_of(block) for block in part.blocks)
    return f"# {title}: {part.title}\n\n" + "\n\n".join(x for x in blocks if x) + "\n"


def _markdown_of(block: Block) -> str:
    if isinstance(block, Table):
        lines = [
            "| " + " | ".join(block.columns) + " |",
            "| " + " | ".join("---" for _ in block.columns) + " |",
            *("| " + " | ".join(_cell(x) for x in row) + " |" for row in block.rows),
        ]
        note = f"\n\n{block.note}" if block.note else ""
        return f"**{block.title}**\n\n" + "\n".join(lines) + note
    if isinstance(block, Listed):
        return "\n".join(f"- {text_of(x)}" for x in block.items)
    if isinstance(block, Pairs):
        return "\n".join(f"- **{name}**: {text_of(x)}" for name, x in block.rows)
    return text_of(block)


def _cell(value: Markup) -> str:
    return text_of(value).replace("|", "\\|")


def text_of(value: Markup) -> str:
    """Text of a marked-up value, on one line."""
    return Markup(value).striptags()
