"""Numbers on a page: each is taken from the record, and says where it stands there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from flows.figure_style import span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NOTHING = "–"


def pointer(*parts: str | int) -> str:
    """Write the way to a value of the record as a JSON pointer (RFC 6901).

    Examples
    --------
    >>> pointer("results", "arms", "without.omics", "concordance")
    '/results/arms/without.omics/concordance'
    """
    return "".join("/" + str(x).replace("~", "~0").replace("/", "~1") for x in parts)


def resolve(values: Any, at: str) -> Any:
    """Value at a JSON pointer; None where the way ends early.

    Parameters
    ----------
    values
        Dictionaries and lists as JSON holds them.
    at
        As from `pointer`; empty for the whole.
    """
    for part in at.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(values, dict):
            values = values.get(name)
        elif isinstance(values, list):
            values = values[int(name)] if int(name) < len(values) else None
        else:
            return None
    return values


def formatted(value: float, how: str) -> str:
    """Write a number for people.

    Parameters
    ----------
    how
        One of the named forms (``count``, ``percent``, ``percent1``, ``p``, ``span``, ``bytes``,
        ``seconds``), or a format specification such as ``.3f``.
    """
    form = _FORMS.get(how)
    text = form(value) if form is not None else format(value, how)
    return _unsigned_zero(text).replace("-", "−")


def _unsigned_zero(text: str) -> str:
    return text if any(x in "123456789<" for x in text) else text.lstrip("-+")


def _bytes(n: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" or n >= 10 else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def _seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


_FORMS: dict[str, Callable[[float], str]] = {
    "count": lambda x: f"{x:,}",
    "percent": lambda x: f"{100 * x:.0f} %",
    "percent1": lambda x: f"{100 * x:.1f} %",
    "p": lambda x: "< 0.001" if x < 0.001 else f"{x:.3f}",
    "span": span,
    "bytes": _bytes,
    "seconds": _seconds,
}


def missing(why: str) -> Markup:
    """Say that there is no figure, and why."""
    mark = Markup('<span class="missing">{} <span class="why">({})</span></span>')
    return mark.format(NOTHING, why)


@dataclass(frozen=True)
class Shown:
    """The record of a run, value by value as marked-up text.

    Attributes
    ----------
    values
        As from :func:`flows.record_values.record_values`.
    """

    values: dict[str, Any]

    def get(self, at: str) -> Any:
        """Plain value at a JSON pointer, for decisions; never to be shown as it is."""
        return resolve(self.values, at)

    def number(self, at: str, how: str = "count", *, why: str = "") -> Markup:
        """Show the number at a JSON pointer, or why there is none.

        Parameters
        ----------
        how
            As in `formatted`.

        Raises
        ------
        KeyError
            If there is none, and no reason for it.
        """
        value = self.get(at)
        if value is None:
            if not why:
                raise KeyError(f"{at}: found nothing, needed a number or a reason for its lack")
            return missing(why)
        return self._marked(at, value, formatted(value, how))

    def text(self, at: str, *, why: str = "") -> Markup:
        """Show the text at a JSON pointer, or why there is none."""
        value = self.get(at)
        if not value:
            return missing(why or "not told")
        return self._marked(at, value, str(value))

    def name(self, at: str) -> Markup:
        """Show a name, with spaces for its underscores."""
        value = str(self.get(at))
        return self._marked(at, value, value.replace("_", " "))

    def items(self, at: str) -> Markup:
        """Show the texts of a list, with commas."""
        return Markup(", ").join(self.text(f"{at}/{i}") for i in range(len(self.get(at) or [])))

    def estimate(self, at: str, how: str = ".3f", *, why: str = "") -> Markup:
        """Show an estimate with its 95 % interval, or why there is none."""
        return self.interval(f"{at}/value", f"{at}/low", f"{at}/high", how, why=why)

    def difference(self, at: str, *, why: str = "") -> Markup:
        """Show an estimate that may be of either sign, its sign always written."""
        return self.estimate(at, "+.3f", why=why)

    def nth(self, at: str, index: str | int, how: str, *, why: str) -> Markup:
        """Show one of several estimates that stand in parallel lists."""
        value, low, high = (f"{at}/{part}/{index}" for part in ("value", "low", "high"))
        return self.interval(value, low, high, how, why=why)

    def interval(self, value: str, low: str, high: str, how: str, *, why: str) -> Markup:
        """Show a value with its bounds; where a bound is missing, the value without an interval."""
        shown = self.number(value, how, why=why)
        if self.get(value) is None:
            return shown
        if self.get(low) is None or self.get(high) is None:
            return shown + Markup(' <span class="why">(no interval)</span>')
        bounds = Markup(' <span class="interval">({} to {})</span>')
        return shown + bounds.format(self.number(low, how), self.number(high, how))

    def counted(self, patients: str, events: str, *, why: str) -> Markup:
        """Show patients with events in parentheses; no patients mean that nothing was told."""
        if not self.get(patients):
            return missing(why)
        return Markup("{} ({})").format(self.number(patients), self.number(events))

    def days(self, at: str) -> Markup:
        """Show a list of days: the interior ends, and the last."""
        n = len(self.get(at))
        parts = [self.number(f"{at}/{i}", "span") for i in range(n)]
        if n < 2:
            return Markup(", ").join(parts)
        return Markup("{}, with ends at {} within").format(parts[-1], Markup(", ").join(parts[:-1]))

    def _marked(self, at: str, value: Any, text: str) -> Markup:
        exact = value if isinstance(value, str) else json.dumps(value)
        return Markup('<data value="{}" data-key="{}">{}</data>').format(exact, at, text)


def listed(parts: Sequence[Markup | str]) -> Markup:
    """Join names as a sentence does, with commas and an *and*."""
    if len(parts) < 2:
        return Markup("").join(parts)
    return Markup("{} and {}").format(Markup(", ").join(parts[:-1]), parts[-1])
