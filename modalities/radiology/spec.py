"""What the radiology extractor computes: the part of a study protocol that this modality reads."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modalities.files import fingerprint

EXTRACTOR_VERSION = "1"
"""Raised whenever the same spec would give other numbers."""

FeatureClass = Literal["shape", "firstorder", "glcm", "glrlm", "glszm", "gldm", "ngtdm"]
ImageType = Literal["Original", "LoG", "Wavelet"]
Millimetres = Annotated[float, Field(gt=0, le=50, allow_inf_nan=False)]


class RadiologySpec(BaseModel):
    """Settings of the radiomic features, the same at every site of a study.

    Notes
    -----
    Features of texture and shape depend on the voxel size, and slice thickness differs between
    scanners more than anything else. Hence the default resamples every scan to isotropic 2 mm:
    between the 1 mm in the plane and the 3 to 5 mm across it that are usual in oncology, and the
    size of the resampled configurations of the Image Biomarker Standardisation Initiative [1]_.

    References
    ----------
    .. [1] Zwanenburg et al., The Image Biomarker Standardization Initiative, Radiology 295 (2020).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bin_width: float = Field(
        default=25.0,
        gt=0,
        allow_inf_nan=False,
        description="Width of a grey-level bin, in image units (HU for CT); edges are multiples",
    )
    spacing_mm: tuple[Millimetres, Millimetres, Millimetres] | None = Field(
        default=(2.0, 2.0, 2.0),
        description="Voxel size (x, y, z) that scans are resampled to; None keeps theirs",
    )
    feature_classes: tuple[FeatureClass, ...] = Field(
        default=("shape", "firstorder", "glcm", "glrlm", "glszm", "gldm", "ngtdm"),
        min_length=1,
        description="Families of features, in the order of the columns",
    )
    image_types: tuple[ImageType, ...] = Field(
        default=("Original",),
        min_length=1,
        description="Images that intensity features are taken from: as is, or filtered",
    )
    log_sigmas_mm: tuple[Millimetres, ...] = Field(
        default=(2.0, 4.0),
        min_length=1,
        description="Widths of the Laplacian of Gaussian; read only if image_types has LoG",
    )
    voxel_array_shift: float = Field(
        default=0.0,
        allow_inf_nan=False,
        description="Added to intensities, in image units, before energy and root mean square",
    )
    normalise: bool = Field(
        default=False,
        description=(
            "Scale each volume to mean 0 and standard deviation 100 first, for scans without units "
            "such as MR; bin_width then counts hundredths of a standard deviation (5 is usual)"
        ),
    )
    min_voxels: int = Field(
        default=64, ge=2, description="Fewest voxels in a region, as acquired and as resampled"
    )
    roi: str = Field(
        default="GTV",
        min_length=1,
        max_length=64,
        description=(
            "Region in a structure set, in any case; * and ? stand for any letters (GTV*), and "
            "exactly one region must match"
        ),
    )
    label: int = Field(default=1, ge=1, le=65535, description="Value of the region in a label map")

    @model_validator(mode="after")
    def _check_lists(self) -> Self:
        for field in ("feature_classes", "image_types", "log_sigmas_mm"):
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise ValueError(f"{field}: found a repeated entry, needed each one once")
        return self

    def fingerprint(self) -> str:
        """SHA-256 over these settings and the extractor's version, as 64 hex digits."""
        return fingerprint(
            {"extractor": EXTRACTOR_VERSION, "radiology": self.model_dump(mode="json")}
        )
