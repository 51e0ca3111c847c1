"""Whole-slide images to bags of tile embeddings.

The line: ``slide_files`` knows what belongs to a slide, ``reader`` opens it, ``scale`` knows its
resolution, ``planning`` lays ``tiles`` over ``tissue``, ``reading`` chooses how they are read
(``jpeg_tiff``, ``openslide_reader``), ``quality`` and ``stain`` look at them, ``encoder`` and
``network`` embed, ``partial`` and ``bags`` write, ``pipeline`` runs it all, ``slides`` for whole
folders.
"""

from typing import TYPE_CHECKING

from modalities.pathology.bags import Bag, is_current, read_bag, read_marks
from modalities.pathology.encoder import (
    MissingCompiler,
    MissingWeights,
    UnknownEncoder,
    WrongWeights,
    check_encoder,
    check_encoder_name,
    load_tile_encoder,
)
from modalities.pathology.layouts import check_features, import_features, is_features
from modalities.pathology.pipeline import (
    SlideJob,
    SlideOutcome,
    TileCount,
    extract_slides,
)
from modalities.pathology.planning import check_slide
from modalities.pathology.slide_files import digest_slide, slide_files
from modalities.pathology.slides import Manner, extract, extract_slide, find_slides
from modalities.pathology.spec import EXTRACTOR_VERSION, PathologySpec

if TYPE_CHECKING:
    # Importing torch takes seconds, so the class is there for annotations only.
    from modalities.pathology.network import TileEncoder as TileEncoder

__all__ = [
    "EXTRACTOR_VERSION",
    "Bag",
    "Manner",
    "MissingCompiler",
    "MissingWeights",
    "PathologySpec",
    "SlideJob",
    "SlideOutcome",
    "TileCount",
    "UnknownEncoder",
    "WrongWeights",
    "check_encoder",
    "check_encoder_name",
    "check_features",
    "check_slide",
    "digest_slide",
    "extract",
    "extract_slide",
    "extract_slides",
    "find_slides",
    "import_features",
    "is_current",
    "is_features",
    "load_tile_encoder",
    "read_bag",
    "read_marks",
    "slide_files",
]
