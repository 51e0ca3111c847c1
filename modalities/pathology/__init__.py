"""Whole-slide images to bags of tile embeddings.

The line: ``reader`` opens a slide and knows its scale, ``tissue`` tells tissue from glass,
``tiles`` lays the grid and reads it, ``encoder`` and ``network`` embed, ``bags`` writes,
``slides`` runs it all.
"""

from typing import TYPE_CHECKING

from modalities.pathology.bags import Bag, is_current, read_bag, read_marks
from modalities.pathology.encoder import (
    MissingWeights,
    UnknownEncoder,
    check_encoder_name,
    load_tile_encoder,
)
from modalities.pathology.slides import (
    SlideOutcome,
    check_slide,
    digest_slide,
    extract,
    extract_slide,
    find_slides,
)
from modalities.pathology.spec import EXTRACTOR_VERSION, PathologySpec

if TYPE_CHECKING:
    # Importing torch takes seconds, so the class is there for annotations only.
    from modalities.pathology.network import TileEncoder as TileEncoder

__all__ = [
    "EXTRACTOR_VERSION",
    "Bag",
    "MissingWeights",
    "PathologySpec",
    "SlideOutcome",
    "UnknownEncoder",
    "check_encoder_name",
    "check_slide",
    "digest_slide",
    "extract",
    "extract_slide",
    "find_slides",
    "is_current",
    "load_tile_encoder",
    "read_bag",
    "read_marks",
]
