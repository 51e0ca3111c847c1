"""Files of weights of tile encoders: what is in them, and whether it fits the network."""

from __future__ import annotations

import math
import re
import sys
import warnings
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import load_file
from timm.models import load_state_dict

from modalities.pathology.encoder import WrongWeights
from modalities.pathology.sources import packaged_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Tensors = dict[str, torch.Tensor]

# What training needs and embedding does not; heads that the network itself does not have.
_NOT_NEEDED: Final = ("mask_token", "embeddings.mask_token", "pooler.")

# The package numbers its 16 blocks through; timm counts within each of 7 stages.
_STAGE_STARTS: Final = (0, 1, 3, 5, 8, 11, 15)
_OUTSIDE: Final = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_IN_FIRST_STAGE: Final = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_IN_BLOCK: Final = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_OF_TRANSFORMERS: Final = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
_LAYER: Final = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
# Training over many devices keeps blocks in chunks, but numbers them through.
_CHUNK: Final = re.compile(r"^(blocks\.)\d+\.(?=\d+\.)")
_PROJECTION: Final = re.compile(r"attention\.attention\.(query|key|value)\.(weight|bias)")


def load_weights(model: torch.nn.Module, path: Path, *, name: str, form: str = "timm") -> None:
    """Load a file of weights into a network without classifier; each tensor must fit.

    Where the tensors of the network stand under a common prefix, such as ``backbone.``, what is
    beside them (heads of training) is left out.

    Parameters
    ----------
    name
        Of the encoder, for messages.
    form
        ``timm``, or ``transformers`` for vision transformers that are named as that library does.

    Raises
    ------
    WrongWeights
        If the file cannot be read without running code from it, if a tensor is missing, left over,
        of another shape or not finite, or if two networks in the file fit.
    """
    fitting = _chosen(_read(path), model, path.name, name, form)
    for tensor_name, tensor in fitting.items():
        if not torch.isfinite(tensor).all():
            raise WrongWeights(
                f"weights: found NaN or infinity in {tensor_name} of {path.name}, needed finite "
                "numbers; fetch or save it again"
            )
    model.load_state_dict(fitting, strict=True)


def _chosen(tensors: Tensors, model: torch.nn.Module, file: str, name: str, form: str) -> Tensors:
    """Give the tensors of a file that are the network's, named as it does."""
    whole = _fitting(tensors, model, form)
    if whole is not None:
        return whole
    parts = {k: _fitting(part, model, form) for k, part in _parts(tensors, model).items()}
    found = {k: part for k, part in parts.items() if part is not None}
    if len(found) > 1:
        raise WrongWeights(
            f"weights: found {len(found)} networks in {file} that fit {name!r} "
            f"({', '.join(sorted(found))}), needed one; save the one that is meant by itself"
        )
    if not found:
        misfits = _misfits(_named(tensors, model, form), model)
        raise WrongWeights(
            f"weights: found {len(misfits)} tensors in {file} that do not fit {name!r} (such as "
            f"{misfits[0]}), needed exactly those of this network; give the file that belongs to it"
        )
    return next(iter(found.values()))


def _fitting(tensors: Tensors, model: torch.nn.Module, form: str) -> Tensors | None:
    """Name the tensors as the network does; None if they are not exactly its own."""
    tensors = _named(tensors, model, form)
    for change in (_unchanged, _by_timm):
        changed = change(tensors, model)
        if not _misfits(changed, model):
            return changed
    return None


def _named(tensors: Tensors, model: torch.nn.Module, form: str) -> Tensors:
    tensors = _needed(tensors)
    if not any(map(_CHUNK.match, model.state_dict())):
        tensors = {_CHUNK.sub(r"\1", k): v for k, v in tensors.items()}
    if form == "transformers":
        tensors = _from_transformers(tensors, model)
    return _without_classifier(tensors, model)


def _parts(tensors: Tensors, model: torch.nn.Module) -> dict[str, Tensors]:
    """Tensors by each prefix under which a network like this one may stand."""
    firsts = (next(iter(model.state_dict())), "cls_token", "embeddings.cls_token")
    prefixes = {
        key.removesuffix(first) for key in tensors for first in firsts if key.endswith(f".{first}")
    }
    return {
        prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for prefix in prefixes
    }


def _needed(tensors: Tensors) -> Tensors:
    kept = {k: v for k, v in tensors.items() if not k.startswith(_NOT_NEEDED)}
    # timm tells one of its forms by this tensor.
    return kept | ({"mask_token": tensors["mask_token"]} if "mask_token" in tensors else {})


def _read(path: Path) -> Tensors:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that are refused all the same
            found = _loaded(path)
    except Exception as error:  # noqa: BLE001 - unpicklers and zip readers raise anything
        raise WrongWeights(
            f"weights: found {path.name}, which does not read as tensors alone "
            f"({type(error).__name__}), needed safetensors or a PyTorch state; save it so"
        ) from None
    tensors = _tensors(found)
    inner = {k: _tensors(v) for k, v in found.items()} if isinstance(found, dict) else {}
    inner = {k: v for k, v in inner.items() if v}
    if "teacher" in inner:
        tensors = inner["teacher"]
    elif not tensors and len(inner) == 1:
        (tensors,) = inner.values()
    if not tensors:
        raise WrongWeights(
            f"weights: found no tensors in {path.name}, needed those of the network; save its state"
        )
    return tensors


def _loaded(path: Path) -> Any:
    if _is_safetensors(path):
        return load_file(path)
    return load_state_dict(str(path), use_ema=False, device="cpu", weights_only=True)


def _tensors(found: object) -> Tensors:
    if not isinstance(found, dict):
        return {}
    return {str(k): v for k, v in found.items() if isinstance(v, torch.Tensor)}


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as that format does, whatever its suffix."""
    with path.open("rb") as stream:
        head = stream.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _misfits(tensors: Mapping[str, torch.Tensor], model: torch.nn.Module) -> list[str]:
    """Names of the tensors that one of the two lacks, or has in another shape."""
    own = {name: value.shape for name, value in model.state_dict().items()}
    theirs = {name: value.shape for name, value in tensors.items()}
    return sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))


def _without_classifier(tensors: Tensors, model: torch.nn.Module) -> Tensors:
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    named = config.get("classifier") or ()
    names = (named,) if isinstance(named, str) else tuple(named)
    heads = tuple(f"{name}." for name in names)
    own = model.state_dict().keys()
    return {k: v for k, v in tensors.items() if k in own or not k.startswith(heads)}


def _unchanged(tensors: Tensors, model: torch.nn.Module) -> Tensors:
    del model
    return {k: v for k, v in tensors.items() if k != "mask_token"}


def _by_timm(tensors: Tensors, model: torch.nn.Module) -> Tensors:
    """Rename and resize as timm does for the published forms of this kind of network."""
    change: Callable[[Tensors, torch.nn.Module], Tensors] | None = getattr(
        sys.modules[type(model).__module__], "checkpoint_filter_fn", None
    )
    try:
        return tensors if change is None else change(dict(tensors), model)
    except (KeyError, RuntimeError, ValueError, AttributeError, AssertionError):
        return tensors  # a form of something else; the check that follows says so


def _from_transformers(tensors: Tensors, model: torch.nn.Module) -> Tensors:
    """Name the tensors of a vision transformer as timm does, and join its three projections."""
    found: Tensors = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        layer = _LAYER.search(key)
        inside = layer[2] if layer else key
        block = f"blocks.{layer[1]}." if layer else ""
        projection = _PROJECTION.fullmatch(inside)
        if projection:
            joined = f"{block}attn.qkv.{projection[2]}"
            parts.setdefault(joined, {})[projection[1]] = value
        else:
            found[block + _as_in_timm(inside)] = value
    whole = {
        name: torch.cat([three[x] for x in ("query", "key", "value")])
        for name, three in parts.items()
        if len(three) == 3
    }
    if "pos_embed" in found:
        found["pos_embed"] = _positions(found["pos_embed"], model.pos_embed)  # type: ignore[arg-type]
    return found | whole


def _positions(found: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Bring square positions behind a class token to another grid, as that library does.

    timm smoothes before it shrinks, which gives other embeddings than the authors'.
    """
    old, new = (math.isqrt(x.shape[1] - 1) for x in (found, own))
    if found.ndim != 3 or old == new or old**2 != found.shape[1] - 1:
        return found
    grid = found[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic")
    return torch.cat([found[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def _as_in_timm(name: str) -> str:
    stem, _, last = name.rpartition(".")
    for theirs, ours in _OF_TRANSFORMERS.items():
        if name == theirs:
            return ours
        if stem == theirs:
            return f"{ours}.{last}"
    return name


def default_tensors() -> Tensors:
    """Weights of the default encoder, classifier included, from the package that ships them.

    Raises
    ------
    MissingWeights
        If that package is not installed.
    """
    state = torch.load(packaged_weights(), map_location="cpu", weights_only=True)
    return {_timm_key(key): value for key, value in state.items()}


def _timm_key(key: str) -> str:
    """Name in timm of a weight of the packaged network."""
    block = re.fullmatch(r"_blocks\.(\d+)\.(.+)", key)
    if block is None:
        return _renamed(key, _OUTSIDE)
    number = int(block[1])
    stage = next(s for s, first in reversed(list(enumerate(_STAGE_STARTS))) if number >= first)
    inside = _renamed(block[2], _IN_FIRST_STAGE if stage == 0 else _IN_BLOCK)
    return f"blocks.{stage}.{number - _STAGE_STARTS[stage]}.{inside}"


def _renamed(key: str, names: Mapping[str, str]) -> str:
    part, _, rest = key.partition(".")
    return f"{names[part]}.{rest}"
