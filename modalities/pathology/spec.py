"""What a study asks of the slide extractor."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from modalities import files
from modalities.pathology.encoder_names import canonical_name

EXTRACTOR_VERSION = 3
"""Raised whenever the same slide and spec would give other coordinates or features."""

DEFAULT_ENCODER = "tf_efficientnet_lite0"

STAIN_SHAPES = {"macenko": (2, 4), "reinhard": (2, 3)}
"""Rows and columns of a reference of each normalisation; ``stain`` says what stands in them."""

_USUAL_METHODS = frozenset({"otsu", "none"})


class PathologySpec(BaseModel):
    """Slides to tile embeddings: which encoder sees which tiles, at which physical scale.

    The default encoder is an ImageNet network for trying things out; that its embeddings carry
    prognosis is not shown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str = Field(
        default=DEFAULT_ENCODER,
        min_length=1,
        description="a known tile encoder (`consilium extract pathology --list-encoders`), a timm "
        "model name, or hf-hub:owner/name",
    )
    weights_sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of the file of the encoder's weights; None takes those of its source",
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
    tissue: str = Field(
        default="otsu",
        description="how tissue is found: otsu, on saturation, or none, which takes every tile",
    )
    min_tissue_fraction: float = Field(
        default=0.5, ge=0, le=1, description="least share of a kept tile that is tissue"
    )
    max_tiles: int | None = Field(
        default=None, ge=1, description="keep at most so many tiles, spread evenly over the grid"
    )
    max_blur: float = Field(
        default=0.95, ge=0, le=1, description="most blur of a good tile, 1 without any detail"
    )
    max_pen: float = Field(
        default=0.3, ge=0, le=1, description="largest share of a good tile under pen ink"
    )
    max_white: float = Field(
        default=0.9, ge=0, le=1, description="largest share of a good tile that is bare glass"
    )
    only_good: bool = Field(
        default=False, description="keep good tiles only; else all, with what was found of each"
    )
    min_good_tiles: int = Field(default=1, ge=0, description="fewer good tiles set a slide aside")
    stain: Literal["none", "macenko", "reinhard"] = Field(
        default="none", description="normalisation of the stain, fitted once per slide"
    )
    stain_reference: tuple[tuple[float, ...], ...] | None = Field(
        default=None,
        description="macenko: per dye its density in red, green and blue, and its largest amount; "
        "reinhard: means, then spreads, of three channels; None: a usual one",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="auto takes bf16, or fp16 on a GPU without it, where it is native and agrees "
        "with fp32 on the first batch",
    )

    @field_validator("encoder")
    @classmethod
    def _in_one_spelling(cls, name: str) -> str:
        return canonical_name(name)

    @field_validator("tissue")
    @classmethod
    def _is_a_method(cls, name: str) -> str:
        if name not in _USUAL_METHODS:
            # Further ones are looked up where they are, which takes a while to import.
            from modalities.pathology.tissue import METHODS

            if name not in METHODS:
                raise ValueError(f"found {name!r}, needed one of {', '.join(sorted(METHODS))}")
        return name

    @model_validator(mode="after")
    def _has_a_reference_of_its_shape(self) -> Self:
        if self.stain_reference is None:
            return self
        shape = STAIN_SHAPES.get(self.stain)
        if shape is None:
            raise ValueError("stain_reference: found one, needed none, since stain is none")
        n_rows, n_columns = shape
        if [len(row) for row in self.stain_reference] != [n_columns] * n_rows:
            raise ValueError(
                f"stain_reference: needed {n_rows} rows of {n_columns} numbers for {self.stain}"
            )
        return self

    def fingerprint(self) -> str:
        """SHA-256 of this spec and the extractor's version, as 64 hex digits."""
        return files.fingerprint(
            {"extractor": EXTRACTOR_VERSION, "spec": self.model_dump(mode="json")}
        )
