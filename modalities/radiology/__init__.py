"""Scans to radiomic features: a volume, a mask, and the numbers that describe the region."""

from modalities.radiology.features import extract_volume, feature_names
from modalities.radiology.masks import read_mask
from modalities.radiology.scans import (
    ScanRow,
    check_scan,
    extract,
    extract_scan,
    extract_scans,
    read_scan_manifest,
    scan_digest,
)
from modalities.radiology.spec import EXTRACTOR_VERSION, RadiologySpec
from modalities.radiology.volumes import read_volume

__all__ = [
    "EXTRACTOR_VERSION",
    "RadiologySpec",
    "ScanRow",
    "check_scan",
    "extract",
    "extract_scan",
    "extract_scans",
    "extract_volume",
    "feature_names",
    "read_mask",
    "read_scan_manifest",
    "read_volume",
    "scan_digest",
]
