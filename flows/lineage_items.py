"""What a check of a version's lineage found of one part of it, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

State = Literal["whole", "grown", "changed", "missing", "elsewhere"]
FAULTS: Final = ("changed", "missing")
COORDINATOR: Final = "coordinator"
NOT_THERE: Final = "it was not there"


@dataclass(frozen=True)
class Item:
    """One part of a version's lineage.

    Attributes
    ----------
    party
        ``coordinator`` or the name of a site.
    name
        What it is; no patient and no path.
    state
        ``grown``: what the version rests on is as it was, and more came since; ``elsewhere``: not
        on this machine, so that nothing is known of it.
    file
        Where it is, relative to the party's folder; for the terminal at the party only.
    why
        What was found, where that is not plain.
    """

    party: str
    name: str
    state: State
    file: str = ""
    why: str = ""

    def sentence(self) -> str:
        """One line for the terminal of the party."""
        at = f" ({self.file})" if self.file and self.file != self.name else ""
        why = f": {self.why}" if self.why else ""
        state = "not on this machine" if self.state == "elsewhere" else self.state
        return f"{self.party}: {self.name}{at}: {state}{why}"


def differences(what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[Item]:
    """Name what of the coordinator's is not as it was written.

    Parameters
    ----------
    what
        How a part is called, with ``{}`` for its name.
    found, wanted
        Parts by name, as they are and as they were.
    """
    for name in sorted({*found, *wanted}):
        if name not in found:
            yield Item(COORDINATOR, what.format(name), "missing")
        elif name not in wanted:
            yield Item(COORDINATOR, what.format(name), "changed", why=NOT_THERE)
        elif found[name] != wanted[name]:
            yield Item(COORDINATOR, what.format(name), "changed")


def counted(n: int, one: str) -> str:
    """Write a count with its noun."""
    return f"{n} {one}{'' if n == 1 else 's'}"


def item_values(items: Sequence[Item]) -> list[Mapping[str, Any]]:
    """Give items as plain values for a program: names and states, no file."""
    return [{"party": x.party, "item": x.name, "state": x.state} for x in items]
