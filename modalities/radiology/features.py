"""Radiomic features of one region, by pyradiomics on the smallest box that leaves them exact."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from modalities.cohort import DataError
from modalities.radiology.masks import check_same_grid, check_voxels
from modalities.radiology.volumes import grid_of

if TYPE_CHECKING:
    import SimpleITK as sitk
    from numpy.typing import NDArray

    from modalities.radiology.spec import RadiologySpec

NORMALISED_SD = 100.0
_SPLINE_PAD_PX = 32  # a cubic spline forgets its border by 0.27 per voxel: below rounding
_FILTER_PAD_PX = 2
_WAVELET_PAD_PX = 10  # coif1 has 6 taps; even, so that the pairs of the transform stay
_LOG_PAD_SIGMAS = 12.0  # relative error 3e-8; 8 sigmas give 1e-6
_WAVELETS = ("LLH", "LHL", "LHH", "HLL", "HLH", "HHL", "HHH", "LLL")


def feature_names(spec: RadiologySpec) -> tuple[str, ...]:
    """(p,) names of the features of ``spec``, as pyradiomics spells them, in a fixed order.

    Shape comes first, then every image type with its feature classes, in the spec's order and
    alphabetical within a class.
    """
    intensity = [name for name in spec.feature_classes if name != "shape"]
    shape = _class_features("original", "shape") if "shape" in spec.feature_classes else ()
    return (
        *shape,
        *(
            name
            for image in _image_names(spec)
            for feature_class in intensity
            for name in _class_features(image, feature_class)
        ),
    )


def extract_volume(
    volume: sitk.Image, mask: sitk.Image, spec: RadiologySpec
) -> NDArray[np.float64]:
    """Features of the region where ``mask`` is not 0.

    Parameters
    ----------
    volume
        Scan with finite voxels, from `read_volume`.
    mask
        Region on the same grid, from `read_mask`.
    spec
        Settings.

    Returns
    -------
    (p,) values in the order of `feature_names`.

    Raises
    ------
    DataError
        ``mask_geometry``; ``empty_mask``; ``mask_too_small``; ``flat_scan`` if a scan to normalise
        has no contrast; ``extraction_failed`` if a feature is missing or not finite.
    """
    import SimpleITK as sitk

    check_same_grid(grid_of(mask), grid_of(volume))
    inside = sitk.GetArrayViewFromImage(mask) != 0
    check_voxels(int(np.count_nonzero(inside)), spec)
    image, region = _prepare(volume, mask, inside, spec)
    check_voxels(int(np.count_nonzero(sitk.GetArrayViewFromImage(region))), spec)
    found = _execute(image, region, spec)
    values = np.array([float(found.get(name, np.nan)) for name in feature_names(spec)])
    if (bad := int(np.count_nonzero(~np.isfinite(values)))) > 0:
        raise DataError(
            "extraction_failed",
            f"features: found {bad} of {len(values)} not finite, needed all finite; "
            "look at the region, which may be flat or a line",
        )
    return values


@functools.cache
def _library() -> Any:
    """Import pyradiomics on first use, because that takes a second, and shut its log."""
    import radiomics.featureextractor

    # it logs per feature, and tracebacks where one fails; failures reach us as values
    logging.getLogger("radiomics").setLevel(logging.CRITICAL + 1)
    return radiomics


def _execute(image: sitk.Image, region: sitk.Image, spec: RadiologySpec) -> dict[str, Any]:
    extractor = _library().featureextractor.RadiomicsFeatureExtractor(
        binWidth=spec.bin_width,
        voxelArrayShift=spec.voxel_array_shift,
        sigma=list(spec.log_sigmas_mm),
        interpolator=None,
        additionalInfo=False,
    )
    extractor.disableAllImageTypes()
    for image_type in spec.image_types:
        extractor.enableImageTypeByName(image_type)
    extractor.disableAllFeatures()
    for feature_class in spec.feature_classes:
        extractor.enableFeatureClassByName(feature_class)
    return dict(extractor.execute(image, region))


def _image_names(spec: RadiologySpec) -> list[str]:
    names = {
        "Original": ["original"],
        # spelt as pyradiomics does, so that a width of 2.0 reads log-sigma-2-0-mm-3D
        "LoG": [f"log-sigma-{str(s).replace('.', '-')}-mm-3D" for s in spec.log_sigmas_mm],
        "Wavelet": [f"wavelet-{name}" for name in _WAVELETS],
    }
    return [name for image_type in spec.image_types for name in names[image_type]]


def _class_features(image: str, feature_class: str) -> tuple[str, ...]:
    features = _library().getFeatureClasses()[feature_class].getFeatureNames()
    return tuple(
        f"{image}_{feature_class}_{name}" for name in sorted(features) if not features[name]
    )


def _prepare(
    volume: sitk.Image, mask: sitk.Image, inside: NDArray[np.bool_], spec: RadiologySpec
) -> tuple[sitk.Image, sitk.Image]:
    """Cut out the box around the region, normalise and resample: intensities and region."""
    import SimpleITK as sitk

    first, extent = _bounds(inside)
    acquired_mm = np.asarray(volume.GetSpacing())
    analysed_mm = _analysed_spacing_mm(acquired_mm, extent, spec)
    pad_px = _padding_px(analysed_mm, spec)
    resampled = not np.allclose(acquired_mm, analysed_mm)
    margin_px = pad_px
    if resampled:
        margin_px = np.ceil(pad_px * analysed_mm / acquired_mm).astype(int) + _SPLINE_PAD_PX
    box = _box(first - margin_px, first + extent + margin_px, volume.GetSize())
    image = _normalised(sitk.Cast(_cut(volume, *box), sitk.sitkFloat64), volume, spec)
    region = sitk.Cast(_cut(mask, *box) != 0, sitk.sitkUInt32)
    region.CopyInformation(image)  # the grids may differ by a rounding error, which ITK refuses
    if resampled:
        target = _target(volume, first, extent, analysed_mm=analysed_mm, pad_px=pad_px)
        # float32 afterwards, so that rounding noise below 25.0 does not change the bin
        image = sitk.Resample(
            image, target, sitk.Transform(), sitk.sitkBSpline, 0, sitk.sitkFloat32
        )
        image = sitk.Cast(image, sitk.sitkFloat64)
        region = sitk.Resample(region, target, sitk.Transform(), sitk.sitkNearestNeighbor)
    return image, region


def _bounds(inside: NDArray[np.bool_]) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """First voxel and extent (x, y, z) of the region in a (z, y, x) array."""
    spans = [np.flatnonzero(inside.any(axis=axes)) for axes in ((0, 1), (0, 2), (1, 2))]
    first = np.array([span[0] for span in spans])
    return first, np.array([span[-1] for span in spans]) - first + 1


def _analysed_spacing_mm(
    acquired_mm: NDArray[np.float64], extent: NDArray[np.int_], spec: RadiologySpec
) -> NDArray[np.float64]:
    if spec.spacing_mm is None:
        return acquired_mm
    # across a region of a single slice there is nothing to interpolate
    return np.where(extent == 1, acquired_mm, spec.spacing_mm)


def _padding_px(spacing_mm: NDArray[np.float64], spec: RadiologySpec) -> NDArray[np.int_]:
    """Voxels that the filters read beyond the region, (3,) as x, y, z."""
    padding = np.full(3, _FILTER_PAD_PX)
    if "Wavelet" in spec.image_types:
        padding = np.maximum(padding, _WAVELET_PAD_PX)
    if "LoG" in spec.image_types:
        reach_mm = _LOG_PAD_SIGMAS * max(spec.log_sigmas_mm)
        padding = np.maximum(padding, np.ceil(reach_mm / spacing_mm).astype(int))
    return padding


def _box(
    low: NDArray[np.int_], high: NDArray[np.int_], size: tuple[int, ...]
) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    low, high = np.maximum(low, 0), np.minimum(high, size)
    return low, high - low


def _cut(image: sitk.Image, first: NDArray[np.int_], size: NDArray[np.int_]) -> sitk.Image:
    import SimpleITK as sitk

    return sitk.RegionOfInterest(image, size.tolist(), first.tolist())


def _normalised(image: sitk.Image, volume: sitk.Image, spec: RadiologySpec) -> sitk.Image:
    if not spec.normalise:
        return image
    import SimpleITK as sitk

    statistics = sitk.StatisticsImageFilter()
    statistics.Execute(volume)
    if not (sd := statistics.GetSigma()) > 0:
        raise DataError(
            "flat_scan", "scan: found a single intensity everywhere, needed contrast; check it"
        )
    return (image - statistics.GetMean()) * (NORMALISED_SD / sd)


def _target(
    volume: sitk.Image,
    first: NDArray[np.int_],
    extent: NDArray[np.int_],
    *,
    analysed_mm: NDArray[np.float64],
    pad_px: NDArray[np.int_],
) -> sitk.Image:
    """Empty image whose voxels are the analysed box: the region and its padding.

    Its voxels are counted from the outer corner of the whole scan, not of the box that was cut
    out, as in pyradiomics: padding never moves them.
    """
    import SimpleITK as sitk

    acquired_mm = np.asarray(volume.GetSpacing())
    ratio = acquired_mm / analysed_mm
    last = np.ceil(np.asarray(volume.GetSize()) * ratio) - 1
    low = np.maximum(np.floor((first - 0.5) * ratio - pad_px), 0)
    high = np.minimum(np.ceil((first + extent - 0.5) * ratio + pad_px), last)
    target = sitk.Image((high - low + 1).astype(int).tolist(), sitk.sitkUInt8)
    start = (low + 0.5) / ratio - 0.5  # centre of the first voxel, in acquired voxels
    target.SetOrigin(volume.TransformContinuousIndexToPhysicalPoint(start.tolist()))
    target.SetSpacing(analysed_mm.tolist())
    target.SetDirection(volume.GetDirection())
    return target
