"""Whether a dossier still says what its run says: nothing empty, nothing changed, nothing small.

Everything is held against the record of the run, beside the dossier's folder; a page and files that
follow from other facts than that record's are found by writing them again.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final

from flows.dossier import FACTS, MATERIALS, PAGE, files_of, read_record
from flows.dossier_claim import CLAIM
from flows.dossier_facts import FORMAT, shown_record
from flows.dossier_statements import privacy_facts
from flows.protocol import NOT_STATED
from flows.report_checklist import CHECKLIST
from flows.shown import resolve
from modalities.cohort import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from flows.dossier_facts import Version

# A digit that is no part of a name: `site-01` and `ct2` are none.
_NUMBER: Final = re.compile(r"(?<![\w-])\d[\d.,]*")
# Where numbers stand that are of no run: item ids, references, style and the facts themselves.
_APART: Final = {"code", "cite", "style", "script", "head"}
_FIELDS: Final = {"td", "th", "dd", "dt", "li", "p", "h1", "h2", "caption", "data"}
_VOID: Final = {"meta"}
_CELL: Final = re.compile(r"(?<!\\)\|")
_ITEMS: Final = {
    "tripod_ai.md": {item.number for items in CHECKLIST.values() for item in items},
    "claim.md": {item.number for items in CLAIM.values() for item in items},
}


def check_dossier(folder: Path) -> list[str]:
    """Say what is wrong with a dossier, a sentence each; nothing for one that stands.

    Found are: a missing file, an empty field, a number that is not in the run or is shown as
    another, a count below the smallest cell, or one that gives it away, an unknown item of
    a checklist, any other difference from what the run says, and, of patients' data, what the study
    lead left unsaid.

    Parameters
    ----------
    folder
        Of the dossier, below that of its run.
    """
    facts = _read_facts(folder)
    if isinstance(facts, str):
        return [facts]
    faults = [*_against_run(facts, folder), *_empty(facts["dossier"]), *_small_cells(facts)]
    try:
        wanted = files_of(facts)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        return [*faults, f"{FACTS}: found facts that no page can be written of ({error!r})"]
    for name, text in wanted.items():
        faults += _of_file(folder / name, text, facts)
    if facts["protocol"]["study"]["data"] == "patients":
        faults += _unsaid(facts)
    return list(dict.fromkeys(faults))


def dossier_warnings(folder: Path) -> list[str]:
    """Say what a dossier leaves unsaid without being wrong."""
    facts = _read_facts(folder)
    if isinstance(facts, str) or facts["protocol"]["study"]["data"] == "patients":
        return []
    return _unsaid(facts)


def history_faults(folder: Path, history: Sequence[Version]) -> list[str]:
    """Say which versions of a dossier the registry does not have, or has otherwise.

    Aliases, gates and decisions change after a dossier was written; which run a version is of, and
    when it was registered, do not.

    Parameters
    ----------
    history
        Versions as the registry has them.
    """
    facts = _read_facts(folder)
    if isinstance(facts, str):
        return []
    known = {x.version: (x.date, x.run) for x in history}
    return [
        f"{FACTS}: /dossier/history/{i}: found version {row['version']} of run {row['run']}, "
        f"registered {row['date']}, needed one that the registry has"
        for i, row in enumerate(facts["dossier"]["history"])
        if known.get(row["version"]) != (row["date"], row["run"])
    ]


def _unsaid(facts: Mapping[str, Any]) -> list[str]:
    return [
        f"{FACTS}: governance.{name}: found {said!r}, needed the study lead's words in "
        "[governance] of study.toml"
        for name, said in facts["protocol"]["governance"].items()
        if said == NOT_STATED
    ]


def _read_facts(folder: Path) -> dict[str, Any] | str:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{FACTS}: found none, needed that of a dossier; write it with `consilium dossier`"
    except (OSError, ValueError):
        return f"{FACTS}: found no valid JSON"
    try:
        known = facts["dossier"]["format"] == FORMAT and "data" in facts["protocol"]["study"]
        known = known and isinstance(facts["protocol"]["governance"], dict)
    except (KeyError, TypeError):
        known = False
    if known:
        return dict(facts)
    return f"{FACTS}: found no facts of this version, needed them; write the dossier again"


def _against_run(facts: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Hold the facts against the record of the run, value by value."""
    try:
        record = read_record(folder.parent)
    except DataError as error:
        yield str(error)
        return
    shown, hidden = shown_record(record)
    own = {key: value for key, value in facts.items() if key != "dossier"}
    yield from _differences(own, json.loads(json.dumps(shown)), "")
    made = {"hidden": hidden, "privacy": privacy_facts(record)}
    for name, value in made.items():
        yield from _differences(facts["dossier"].get(name), value, f"/dossier/{name}")


def _differences(found: Any, wanted: Any, at: str) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            yield from _differences(found.get(key), wanted.get(key), f"{at}/{key}")
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for i, both in enumerate(zip(found, wanted, strict=True)):
            yield from _differences(*both, f"{at}/{i}")
    elif found != wanted:
        yield f"{FACTS}: {at}: found {_short(found)}, needed {_short(wanted)} as the run has it"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _empty(value: Any, at: str = "/dossier") -> Iterator[str]:
    if value is None or (isinstance(value, str) and not value.strip()):
        yield f"{FACTS}: {at}: found an empty field, needed words or a number"
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _empty(part, f"{at}/{key}")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from _empty(part, f"{at}/{i}")


def _small_cells(facts: Mapping[str, Any]) -> Iterator[str]:
    """Find counts that a dossier hides, in facts that show them."""
    try:
        _, hidden = shown_record(facts)
    except (KeyError, ValueError, TypeError):
        return
    least = facts["protocol"]["privacy"]["cell"]
    for at in hidden:
        found = resolve(facts, at)
        if found is not None and found < least:
            yield f"{FACTS}: {at}: found {found}, needed it hidden: it is below {least}"


def _of_file(path: Path, wanted: str, facts: Mapping[str, Any]) -> Iterator[str]:
    try:
        found = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        yield f"{path.name}: found none, needed it in the dossier"
        return
    if path.name == PAGE:
        yield from _of_page(found, facts)
    if path.suffix == ".md":
        yield from _of_markdown(path.name, found)
    if found == wanted or path.name == FACTS:
        return
    if path.suffix == ".json":
        yield from _of_json(path.name, found, wanted)
        return
    for i, (line, other) in enumerate(
        zip_longest(found.splitlines(), wanted.splitlines(), fillvalue=""), start=1
    ):
        if line != other:
            yield f"{path.name}: line {i}: found {_apart(line, other)} as the run has it"


def _apart(line: str, other: str) -> str:
    """Show where two lines differ, with a few characters around."""
    same = next((i for i, both in enumerate(zip(line, other, strict=False)) if len(set(both)) > 1),
                min(len(line), len(other)))  # fmt: skip
    start = max(0, same - 20)
    return f"{line[start : same + 30]!r}, needed {other[start : same + 30]!r}"


def _of_json(name: str, found: str, wanted: str) -> Iterator[str]:
    try:
        values = json.loads(found)
    except ValueError:
        yield f"{name}: found no valid JSON"
        return
    if name != MATERIALS:
        yield from (x.replace(FACTS, name, 1) for x in _empty(values, ""))
    yield from (x.replace(FACTS, name, 1) for x in _differences(values, json.loads(wanted), ""))


def _of_markdown(name: str, text: str) -> Iterator[str]:
    """Find empty cells and list items, and items that the checklist does not have."""
    for i, line in enumerate(text.splitlines(), start=1):
        cells = [x.strip() for x in _CELL.split(line)[1:-1]] if line.startswith("|") else [line]
        if any(not x for x in cells if line.startswith("|")) or _is_bare(line):
            yield f"{name}: line {i}: found an empty field, needed words or a number"
        known = _ITEMS.get(name)
        item = cells[0] if line.startswith("|") else ""
        if known and item and item != "Item" and set(item) != {"-"} and item not in known:
            yield f"{name}: line {i}: found {item!r}, needed an item of the checklist"


def _is_bare(line: str) -> bool:
    return re.fullmatch(r"- *(\*\*[^*]*\*\*: *)?", line) is not None


class _Page(HTMLParser):
    """A page's fields, its numbers, and whether each says where it is from."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__(convert_charrefs=True)
        self.facts = facts
        self.faults: list[str] = []
        self._open: list[str] = []
        self._text: list[str] = []
        self._number: tuple[str, str] | None = None
        self._record = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            return
        self._open.append(tag)
        self._text.append("")
        if tag == "data":
            named = dict(attrs)
            self._number = (named.get("data-key") or "", named.get("value") or "")

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self._fault(f"found {tag} closed that was not open")
            return
        text = self._text.pop()
        if self._text:
            self._text[-1] += text
        if tag in _FIELDS and not text.strip():
            self._fault(f"found an empty field ({tag}), needed words or a number")
        if tag == "data" and self._number is not None:
            self._resolve(*self._number)
            self._number = None
        if tag == "script":
            self._record = text

    def handle_data(self, data: str) -> None:
        if self._text:
            self._text[-1] += data
        if "data" in self._open or _APART.intersection(self._open):
            return
        for number in _NUMBER.findall(data):
            self._fault(f"found the number {number}, needed none that is not taken from the run")

    def _resolve(self, key: str, value: str) -> None:
        found = resolve(self.facts, key) if key.startswith("/") else None
        exact = found if isinstance(found, str) else json.dumps(found)
        if found is None or exact != value:
            self._fault(
                f"found {value[:60]!r} for {key or 'no place'}, which the run does not have"
            )

    def _fault(self, text: str) -> None:
        self.faults.append(f"{PAGE}: line {self.getpos()[0]}: {text}")


def _of_page(text: str, facts: Mapping[str, Any]) -> list[str]:
    page = _Page(facts)
    page.feed(text)
    page.close()
    return page.faults
