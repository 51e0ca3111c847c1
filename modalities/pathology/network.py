"""Tile encoders in torch: precision, batches, devices."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from modalities.pathology.architectures import Preprocessing, network_of
from modalities.pathology.compiled import eager, runner
from modalities.pathology.encoder import UnknownEncoder
from modalities.pathology.folding import folded

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from modalities.pathology.compiled import Precision
    from modalities.pathology.encoder import Compiler
    from modalities.pathology.spec import PathologySpec

_LEAST_COSINE = 0.999
# Few tiles fit a processor's cache; a GPU wants many.
_BATCH_TILES = {"cpu": 16, "cuda": 256}
# Several devices load at once; the generator of random weights and the hub's client are one each,
# and the processor's memory need hold the network once only.
_BUILDS = threading.Lock()


class TileEncoder:
    """A network that turns tiles into embeddings, on a GPU where there is one.

    Threads may share it: it embeds one batch at a time.

    Parameters
    ----------
    model
        Network from normalised images (n, 3, input_px, input_px) to (n, dim), in evaluation mode.
    name
        Name of the encoder.
    preprocessing
        What the network wants of a tile.
    precision
        As in ``PathologySpec``; ``auto`` is settled by the first batch.
    device
        As torch names it; None takes the first of :func:`devices`.
    compiler
        What compiles the network.

    Attributes
    ----------
    dim
        Length of an embedding.
    precision
        ``fp32``, ``bf16`` or ``fp16`` once settled, before that ``auto``.
    batch_tiles
        Tiles that go through the network together.

    Raises
    ------
    MissingCompiler
        If the compiler is not installed.
    UnknownEncoder
        If the network does not give one row of numbers for a tile.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        name: str,
        preprocessing: Preprocessing,
        precision: Literal["auto", "fp32", "bf16", "fp16"],
        device: str | None = None,
        compiler: Compiler = "none",
    ) -> None:
        self.device = torch.device(device or devices()[0])
        self.name = name
        self.preprocessing = preprocessing
        self.batch_tiles = _BATCH_TILES[self.device.type]
        self.precision: Literal["auto", "fp32", "bf16", "fp16"] = precision
        self._faster = _faster_precision(self.device)
        if precision == "auto" and self._faster is None:
            self.precision = "fp32"
        size_px = preprocessing.input_px
        sample = torch.rand(1, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))
        model = folded(model.eval(), sample)
        model = model.to(self.device).to(memory_format=torch.channels_last)
        self._exact = eager(model, self.device)
        self._run = runner(model, self.device, compiler, size_px=size_px)
        self._whole_batches = compiler == "inductor"  # it compiles once more for another shape
        # Of a whole row of pixels: three channels at a time would cost four times as much.
        self._mean, self._std = (
            torch.tensor(values, device=self.device).repeat(size_px) * 255
            for values in (preprocessing.mean, preprocessing.std)
        )
        self._pinned = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()
        # What fits at once, by precision; one that was not tried yet is thought to fit whole.
        self._fitting_tiles: dict[str, int] = {}
        with torch.inference_mode():
            features = self._exact(sample.to(self.device), "fp32")
        if features.ndim != 2:
            raise UnknownEncoder(
                f"encoder: {name!r} gives {' x '.join(map(str, features.shape[1:]))} numbers for a "
                "tile, needed one row of them; choose another"
            )
        self.dim = int(features.shape[1])

    def embed(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed tiles (n, tile_px, tile_px, 3) as (n, dim)."""
        rows = [
            self._embed_batch(tiles[i : i + self.batch_tiles])
            for i in range(0, len(tiles), self.batch_tiles)
        ]
        return np.concatenate(rows) if rows else np.empty((0, self.dim), dtype=np.float32)

    def _embed_batch(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        precision = self.precision
        fitting = self._fitting_tiles.get(precision, self.batch_tiles)
        if len(tiles) > fitting:
            parts = [tiles[i : i + fitting] for i in range(0, len(tiles), fitting)]
            return np.concatenate([self._embed_batch(part) for part in parts])
        if self._whole_batches and len(tiles) < fitting:
            missing = ((0, fitting - len(tiles)), (0, 0), (0, 0), (0, 0))
            return self._embed_batch(np.pad(tiles, missing))[: len(tiles)]
        try:
            with self._lock, torch.inference_mode():
                embedded: NDArray[np.float32] = self._features(tiles).cpu().numpy()
            return embedded
        except torch.OutOfMemoryError:
            if len(tiles) == 1:
                raise
        # Outside of the handler, whose traceback would hold the memory.
        torch.cuda.empty_cache()
        while fitting >= len(tiles):  # by halves of a batch, so that all are cut at the same tiles
            fitting //= 2
        self._fitting_tiles[precision] = fitting
        return self._embed_batch(tiles)

    def _features(self, tiles: NDArray[np.uint8]) -> torch.Tensor:
        images = self._normalised(tiles)
        if self.precision == "auto":
            return self._settle_precision(images)
        return self._run(images, self.precision)

    def _normalised(self, tiles: NDArray[np.uint8]) -> torch.Tensor:
        images = self._sized(self._uploaded(tiles))
        n, side = images.shape[:2]
        rows = images.reshape(n * side, 3 * side).float()
        rows.sub_(self._mean).div_(self._std)
        # Permuting the axes of (n, h, w, 3) is channels_last already: no copy.
        return rows.view(n, side, side, 3).permute(0, 3, 1, 2)

    def _sized(self, tiles: torch.Tensor) -> torch.Tensor:
        """Bring (n, h, w, 3) to what the network sees."""
        wanted = self.preprocessing
        side = wanted.resize_px or wanted.input_px
        if tiles.shape[1] != side:
            images = torch.nn.functional.interpolate(
                tiles.permute(0, 3, 1, 2).float(), size=(side, side), mode=wanted.interpolation,
                antialias=True,
            )  # fmt: skip
            tiles = images.clamp_(0, 255).permute(0, 2, 3, 1)
        margin = (side - wanted.input_px) // 2
        return tiles[:, margin : side - margin, margin : side - margin]

    def _uploaded(self, tiles: NDArray[np.uint8]) -> torch.Tensor:
        host = torch.from_numpy(np.require(tiles, requirements=["C", "W"]))
        if self.device.type == "cpu":
            return host
        # One page-locked buffer: the copy to the device needs no detour. It is free again, because
        # every batch ends with reading its features back.
        if self._pinned.numel() < host.numel():
            self._pinned = torch.empty(host.numel(), dtype=torch.uint8, pin_memory=True)
        staged = self._pinned[: host.numel()].view(host.shape)
        staged.copy_(host)
        return staged.to(self.device, non_blocking=True)

    def _settle_precision(self, images: torch.Tensor) -> torch.Tensor:
        exact = self._exact(images, "fp32")
        if self._faster is None:
            self.precision = "fp32"
            return exact
        fast = self._run(images, self._faster)
        cosine = torch.nn.functional.cosine_similarity(exact, fast, dim=1).min().item()
        self.precision = self._faster if cosine >= _LEAST_COSINE else "fp32"
        # Of one function throughout, so that the first batch is like the others.
        return fast if self.precision != "fp32" else self._run(images, "fp32")


def devices() -> tuple[str, ...]:
    """Give every device that tiles can be embedded on: the GPUs, or else the processor."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(f"cuda:{i}" for i in range(n_gpus)) or ("cpu",)


def build_encoder(
    spec: PathologySpec,
    *,
    weights: Path | None = None,
    device: str | None = None,
    compiler: Compiler = "none",
) -> TileEncoder:
    """Build the encoder of a spec whose name is known.

    Raises
    ------
    UnknownEncoder
        If it does not turn a square tile into one row of numbers.
    MissingWeights, WrongWeights
        If its weights are not at hand, or do not fit.
    MissingCompiler
        If the compiler is not installed.
    """
    with _BUILDS:
        model, preprocessing = network_of(spec, weights)
        return TileEncoder(
            model,
            name=spec.encoder,
            preprocessing=preprocessing,
            precision=spec.precision,
            device=device,
            compiler=compiler,
        )


def _faster_precision(device: torch.device) -> Precision | None:
    """Give the lower precision that a device computes in itself; None where it only emulates."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # it speaks of the current one
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp16"
    capabilities = torch.cpu.get_capabilities()
    native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return "bf16" if native else None
