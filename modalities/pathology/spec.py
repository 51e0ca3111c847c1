"""What a study asks of the slide extractor."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from modalities import files

EXTRACTOR_VERSION = 1
"""Raised whenever the same slide and spec would give other coordinates or features."""

DEFAULT_ENCODER = "tf_efficientnet_lite0"


class PathologySpec(BaseModel):
    """Slides to tile embeddings: which encoder sees which tiles, at which physical scale.

    The default encoder is an ImageNet network for trying things out; that its embeddings carry
    prognosis is not shown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str = Field(
        default=DEFAULT_ENCODER,
        min_length=1,
        description="a timm model name, or hf-hub:owner/name",
    )
    pretrained: bool = Field(
        default=True, description="False gives seeded random weights, for trying the pipeline only"
    )
    tile_px: int = Field(default=224, ge=32, le=4096, description="side of a tile, in pixels")
    tile_mpp: float = Field(
        default=0.5, ge=0.05, le=20, description="scale of a tile, in micrometres per pixel"
    )
    stride_px: int | None = Field(
        default=None, ge=1, le=65536, description="step of the grid in tile pixels; None: tile_px"
    )
    min_tissue_fraction: float = Field(
        default=0.5, ge=0, le=1, description="least share of a kept tile that is tissue"
    )
    max_tiles: int | None = Field(
        default=None, ge=1, description="keep at most so many tiles, spread evenly over the grid"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="auto takes bf16 where it is native and agrees with fp32 on the first batch",
    )

    def fingerprint(self) -> str:
        """SHA-256 of this spec and the extractor's version, as 64 hex digits."""
        return files.fingerprint(
            {"extractor": EXTRACTOR_VERSION, "spec": self.model_dump(mode="json")}
        )
