"""Tile encoders by name: known ones of pathology, and any image network of timm.

torch and timm take seconds to import; they wait until an encoder is loaded.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from modalities.pathology.encoder_names import canonical_name, known_encoder
from modalities.pathology.spec import DEFAULT_ENCODER

if TYPE_CHECKING:
    from modalities.pathology.network import TileEncoder
    from modalities.pathology.spec import PathologySpec

Compiler = Literal["none", "inductor", "openvino"]

_HUB_NAME = re.compile(r"hf[-_]hub:[\w.-]+/[\w.-]+(@[\w./-]+)?")


class UnknownEncoder(ValueError):
    """No encoder has that name."""


class MissingWeights(OSError):
    """The encoder is known, its pretrained weights are not at hand."""


class WrongWeights(ValueError):
    """A file of weights that is damaged, of another network, or not the one asked for."""


class MissingCompiler(ImportError):
    """An encoder is to be compiled by something that is not installed."""


def check_encoder_name(name: str) -> None:
    """Check that an encoder of that name exists, without loading it.

    Some known ones cannot run here; features that were made with them elsewhere can be used. A timm
    name is looked up in timm's sources, which takes milliseconds; only a name that is not there
    costs the import of timm. Of a hub name only the form can be checked.

    Raises
    ------
    UnknownEncoder
        With the closest names.
    """
    if known_encoder(name) is not None:
        return
    bare = name.removeprefix("timm:")
    found = (
        bare == DEFAULT_ENCODER
        or _HUB_NAME.fullmatch(name) is not None
        or bare.split(".")[0] in _names_in_sources()
    )
    if not found:
        _check_with_timm(bare)


def check_encoder(spec: PathologySpec, *, weights: Path | None = None) -> None:
    """Check that the encoder of a spec could be loaded, without loading it.

    Parameters
    ----------
    weights
        As for :func:`load_tile_encoder`.

    Raises
    ------
    UnknownEncoder, MissingWeights, WrongWeights
        As :func:`load_tile_encoder`, except for a file of weights that is of another network.
    """
    _check_runs(spec.encoder)
    from modalities.pathology.sources import check_weights

    check_weights(spec, weights)


def load_tile_encoder(
    spec: PathologySpec,
    *,
    weights: Path | None = None,
    device: str | None = None,
    compiler: Compiler = "none",
) -> TileEncoder:
    """Load the encoder of a spec.

    Parameters
    ----------
    weights
        File of its weights, in safetensors or PyTorch's own form; None takes those of its source.
    device
        As torch names it; None takes the first GPU, or the processor where there is none.
    compiler
        What compiles the network on a processor. It takes seconds to a minute before the first
        tile, and pays for many.

    Raises
    ------
    UnknownEncoder
        If no encoder has that name, or it needs what is not part of this.
    MissingWeights, WrongWeights
        If its weights are not installed and cannot be fetched, or are not those of the spec.
    MissingCompiler
        If the compiler is not installed.
    """
    _check_runs(spec.encoder)
    from modalities.pathology.network import build_encoder

    return build_encoder(spec, weights=weights, device=device, compiler=compiler)


def _check_runs(name: str) -> None:
    check_encoder_name(name)
    known = known_encoder(name)
    if known is not None and known.needs:
        raise UnknownEncoder(
            f"encoder: {known.name!r} needs {known.needs}, which is not part of this; embed with "
            "it elsewhere and list the .h5 files of features in a study's manifest"
        )


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
    from modalities.pathology.encoder_names import KNOWN_ENCODERS

    known = [x for row in KNOWN_ENCODERS for x in (row.name, *row.aliases)]
    names = [*known, *timm.list_models()]
    near = difflib.get_close_matches(name.casefold(), names, n=5, cutoff=0.5)
    close = list(dict.fromkeys(canonical_name(x) for x in near))[:3]
    hint = f"; close names are {', '.join(close)}" if close else ""
    raise UnknownEncoder(
        f"encoder: found {name!r}, needed a timm model name, hf-hub:owner/name or one that "
        f"`consilium extract pathology --list-encoders` shows{hint}"
    )
