"""Networks of tile encoders, without or with their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import timm
import torch
from timm.layers import SwiGLUPacked
from torch import nn

from modalities.pathology.encoder import UnknownEncoder
from modalities.pathology.encoder_names import known_encoder
from modalities.pathology.sources import (
    asking_the_hub,
    check_digest,
    find_weights,
    missing_pretrained,
    unpinned,
)
from modalities.pathology.spec import DEFAULT_ENCODER
from modalities.pathology.weights import default_tensors, load_weights

if TYPE_CHECKING:
    from pathlib import Path

    from modalities.pathology.encoder_names import KnownEncoder
    from modalities.pathology.spec import PathologySpec


@dataclass(frozen=True)
class Preprocessing:
    """What a network wants of a tile.

    Parameters
    ----------
    mean, std
        Per channel, of values from 0 to 1.
    input_px
        Side of what it sees.
    resize_px
        Side that the tile is brought to, of which the middle is seen; None takes the whole tile.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_px: int
    resize_px: int | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


class ClassToken(nn.Module):
    """The class token of a vision transformer that gives all its tokens.

    Parameters
    ----------
    model
        Gives (n, tokens, dim).
    with_mean
        Whether the mean of the patch tokens is put behind it.
    """

    def __init__(self, model: nn.Module, *, with_mean: bool) -> None:
        super().__init__()
        self.model = model
        self.with_mean = with_mean
        self.n_prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Give (n, dim) or (n, 2 dim)."""
        tokens = self.model(images)
        first: torch.Tensor = tokens[:, 0]
        if not self.with_mean:
            return first
        return torch.cat([first, tokens[:, self.n_prefix :].mean(1)], dim=1)


def network_of(spec: PathologySpec, weights: Path | None) -> tuple[nn.Module, Preprocessing]:
    """Build the network of a spec whose encoder is known, in evaluation mode on the CPU.

    Parameters
    ----------
    weights
        File to load in place of what the encoder's source gives.

    Raises
    ------
    UnknownEncoder
        If it does not see square tiles of three colours.
    MissingWeights, WrongWeights
        If its weights are not at hand, or do not fit.
    """
    known = known_encoder(spec.encoder)
    if weights is not None:
        check_digest(weights, spec.weights_sha256)
    if known is not None:
        model = _known(known, spec, weights)
        return model.eval(), preprocessing(known)
    model = _by_name(spec, weights)
    return model.eval(), _as_timm_says(model, spec.encoder)


def preprocessing(known: KnownEncoder) -> Preprocessing:
    """Give what an encoder wants of a tile."""
    mean, std = known.normalisation
    return Preprocessing(mean, std, known.input_px, known.resize_px, known.interpolation)


def _as_timm_says(model: nn.Module, name: str) -> Preprocessing:
    config = timm.data.resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    if (channels, height) != (3, width):
        raise UnknownEncoder(
            f"encoder: {name!r} sees {height} x {width} pixels in {channels} channels, needed a "
            "square in 3; choose another"
        )
    return Preprocessing(
        tuple(config["mean"]),
        tuple(config["std"]),
        int(width),
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
    )


def bare_network(known: KnownEncoder) -> nn.Module:
    """Build the network that an encoder's weights fit, with random ones."""
    changes = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if known.swiglu else {}
    model: nn.Module = timm.create_model(
        known.architecture, pretrained=False, num_classes=0, **known.options, **changes
    )
    return model


def pooled(model: nn.Module, known: KnownEncoder) -> nn.Module:
    """Let a network give what counts as the encoder's embedding."""
    if known.pooling == "third_stage":
        model.layer4 = nn.Identity()
    if known.pooling in {"token", "token+mean"}:
        return ClassToken(model, with_mean=known.pooling == "token+mean")
    return model


def _known(known: KnownEncoder, spec: PathologySpec, weights: Path | None) -> nn.Module:
    if not spec.pretrained and weights is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return pooled(bare_network(known), known)
    if weights is None:
        weights = find_weights(known)
        check_digest(weights, spec.weights_sha256)
    model = bare_network(known)
    load_weights(model, weights, name=known.name, form=known.form)
    return pooled(model, known)


def _by_name(spec: PathologySpec, weights: Path | None) -> nn.Module:
    name = spec.encoder.removeprefix("timm:")
    if weights is not None:
        model = _random_model(name)
        load_weights(model, weights, name=spec.encoder)
        return model
    if not spec.pretrained:
        return _random_model(name)
    if spec.weights_sha256 is not None:
        raise unpinned(name)
    return default_model() if name == DEFAULT_ENCODER else _fetched_model(name)


def default_model() -> nn.Module:
    """Build the default encoder with the weights that are installed.

    Raises
    ------
    MissingWeights
        If they are not.
    """
    model: nn.Module = timm.create_model(DEFAULT_ENCODER, pretrained=False)
    model.load_state_dict(default_tensors(), strict=True)
    model.reset_classifier(0)  # type: ignore[operator]
    return model


def _fetched_model(name: str) -> nn.Module:
    try:
        with asking_the_hub():
            model: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError):
        # The cause names hosts and cache folders.
        raise missing_pretrained(name) from None
    return model


def _random_model(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    return model
