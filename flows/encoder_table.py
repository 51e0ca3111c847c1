"""The tile encoders that are known by name, as a table to read."""

from __future__ import annotations

from rich.table import Table

from modalities.pathology.encoder_names import KNOWN_ENCODERS, KnownEncoder

_COLUMNS = ("name", "also", "dim", "million", "tiles", "weights of", "licence", "weights are")


def encoder_table() -> Table:
    """Make the table, one row per encoder."""
    table = Table(*_COLUMNS, box=None, header_style="bold", pad_edge=False)
    for known in KNOWN_ENCODERS:
        table.add_row(*_row(known))
    return table


def _row(known: KnownEncoder) -> tuple[str, ...]:
    million = known.million_parameters
    return (
        known.name,
        ", ".join(known.aliases),
        str(known.dim),
        "" if million is None else f"{million:.0f}",
        f"{known.tile_px} px at {known.mpp:g}",
        known.repository,
        known.licence,
        f"{known.access}; needs {known.needs}" if known.needs else known.access,
    )
