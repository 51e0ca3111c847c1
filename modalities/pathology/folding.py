"""Batch normalisation folded into the convolutions before it, which saves a pass over each map."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

if TYPE_CHECKING:
    from collections.abc import Iterator

# Folding changes the order of roundings only; more than this is another function.
_TOLERANCE = 1e-3


def folded(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Give ``model`` with every batch normalisation folded that follows a convolution directly.

    Parameters
    ----------
    model
        In evaluation mode; left as it is.
    images
        (n, 3, size, size) that show which module feeds which, and that both networks agree.

    Returns
    -------
    torch.nn.Module
        A copy, or ``model`` itself where there is nothing to fold or the copy does not agree.
    """
    with torch.inference_mode(mode=False), torch.no_grad():
        pairs = list(_pairs(model, images))
        if not pairs:
            return model
        other = copy.deepcopy(model)
        for convolution, normalisation in pairs:
            _fold(other, convolution, normalisation)
        expected, found = model(images), other(images)
    spread = float(expected.std()) or 1.0
    agrees = bool(((expected - found).abs().max() <= _TOLERANCE * spread).item())
    return other if agrees else model


def _pairs(model: nn.Module, images: torch.Tensor) -> Iterator[tuple[str, str]]:
    """Names of convolutions, each with the normalisation that reads its output and nothing else."""
    made: dict[int, str] = {}
    kept: list[torch.Tensor] = []  # an address is only telling while its tensor lives
    found: list[tuple[str, str]] = []
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            made[id(output)] = names[module]
            kept.append(output)
        elif id(inputs[0]) in made:
            found.append((made[id(inputs[0])], names[module]))

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    hooks = [m.register_forward_hook(note) for m in names if isinstance(m, kinds)]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    # A module that is called twice, or with two partners, is no pair.
    for at in (0, 1):
        seen = [pair[at] for pair in found]
        found = [pair for pair in found if seen.count(pair[at]) == 1]
    yield from found


def _fold(model: nn.Module, convolution: str, normalisation: str) -> None:
    first, second = model.get_submodule(convolution), model.get_submodule(normalisation)
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.BatchNorm2d)
    _replace(model, convolution, fuse_conv_bn_eval(first, second))
    # timm joins normalisation and activation in one module, of which the activation stays.
    after = [x for x in (getattr(second, "drop", None), getattr(second, "act", None)) if x]
    _replace(model, normalisation, nn.Sequential(*after) if after else nn.Identity())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
