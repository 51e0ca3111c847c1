"""Tile encoders by name: an image network of timm without its classifier.

torch and timm take seconds to import; they wait until an encoder is loaded.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from modalities.pathology.spec import DEFAULT_ENCODER

if TYPE_CHECKING:
    from modalities.pathology.network import TileEncoder
    from modalities.pathology.spec import PathologySpec

_HUB_NAME = re.compile(r"hf[-_]hub:[\w.-]+/[\w.-]+(@[\w./-]+)?")


class UnknownEncoder(ValueError):
    """No encoder has that name."""


class MissingWeights(OSError):
    """The encoder is known, its pretrained weights are not at hand."""


def check_encoder_name(name: str) -> None:
    """Check that an encoder of that name exists, without loading it.

    A timm name is looked up in timm's sources, which takes milliseconds; only a name that is not
    there costs the import of timm. Of a hub name only the form can be checked.

    Raises
    ------
    UnknownEncoder
        With the closest names.
    """
    known = (
        name == DEFAULT_ENCODER
        or _HUB_NAME.fullmatch(name) is not None
        or name.split(".")[0] in _names_in_sources()
    )
    if not known:
        _check_with_timm(name)


def load_tile_encoder(spec: PathologySpec) -> TileEncoder:
    """Load the encoder of a spec, onto a GPU where there is one.

    Raises
    ------
    UnknownEncoder
        If no encoder has that name.
    MissingWeights
        If its pretrained weights are not installed and cannot be fetched.
    """
    check_encoder_name(spec.encoder)
    from modalities.pathology.network import build_encoder

    return build_encoder(spec)


def _names_in_sources() -> frozenset[str]:
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        return frozenset()
    names: set[str] = set()
    for source in Path(found.origin).parent.joinpath("models").glob("*.py"):
        text = source.read_text(encoding="utf-8")
        names.update(re.findall(r"^@register_model\s+def (\w+)\(", text, re.MULTILINE))
    return frozenset(names)


def _check_with_timm(name: str) -> None:
    import timm

    if timm.is_model(name):
        return
    close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    hint = f"; close names are {', '.join(close)}" if close else ""
    raise UnknownEncoder(
        f"encoder: found {name!r}, needed a timm model name or hf-hub:owner/name{hint}"
    )
