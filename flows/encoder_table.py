"""The tile encoders that are known by name, as a table to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.table import Table

from modalities.pathology.encoder_names import KNOWN_ENCODERS

if TYPE_CHECKING:
    from modalities.pathology.encoder_names import KnownEncoder

_WIDE_COLUMNS: Final = 140
_ONLY_WIDE: Final = frozenset({"million", "weights of"})


def encoder_table(columns: int) -> Table:
    """Make the table, one row per encoder, for so many columns; nothing in it is cut off."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    rows = [_row(known) for known in KNOWN_ENCODERS]
    shown = [x for x in rows[0] if columns >= _WIDE_COLUMNS or x not in _ONLY_WIDE]
    for column in shown:
        least = max(len(row[column]) for row in rows) if column in {"name", "dim"} else None
        table.add_column(column, overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*(row[column] for column in shown))
    return table


def _row(known: KnownEncoder) -> dict[str, str]:
    million = known.million_parameters
    access = "on request" if known.gated else "public"
    return {
        "name": known.name,
        "also": ", ".join(known.aliases),
        "dim": str(known.dim),
        "million": "" if million is None else f"{million:.0f}",
        "tiles": f"{known.tile_px} px at {known.mpp:g}",
        "weights of": known.repository,
        "licence": known.licence,
        "weights are": f"{access}, not run here" if known.needs else access,
    }
