"""Where on a patient's slides a risk comes from: a value per tile, over the slide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from modalities.cohort import DataError, read_manifest
from modalities.pathology import PathologySpec, read_bag
from modalities.pathology.layouts import read_grid
from modalities.pathology.overview import thumbnail
from modalities.pathology.reader import open_slide

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from flows.site_scoring import SiteScorer
    from fusion.encoders import FittedEncoder
    from infra.settings import SiteSettings

    Floats = NDArray[np.float64]

_OVERVIEW_PX: Final = 900.0
_EVEN: Final = 1.05
_DIGEST_CHARACTERS: Final = 9  # of a bag's name after that of its slide: "-0123abcd"


@dataclass(frozen=True)
class TileMap:
    """The tiles of one slide, with what was made of each.

    Attributes
    ----------
    modality
        Whose slide it is.
    coords
        (n_tiles, 2) upper left corners at level 0, x then y.
    side_px
        Side of a tile at level 0.
    size_px
        (width, height) of the slide at level 0.
    share
        (n_tiles,) log hazard of a patient all of whose tiles were like this one; the patient's own
        is their mean. None where the model reads tiles in another way.
    attention
        (n_tiles,) weight of the tile in the site's own attention network; all tiles of the patient
        sum to one. None where the site has no such network.
    attention_is_the_models
        Whether the model reads that network, or a linear encoder beside it.
    overview
        (h, w, 3) of the slide; None where it cannot be read here.
    n_slides
        Of the patient; this is the one with most tiles.
    shown_from
        Corner (x, y) at level 0 from which viewers of the slide count.
    """

    modality: str
    coords: NDArray[np.int64]
    side_px: float
    size_px: tuple[float, float]
    share: Floats | None
    attention: Floats | None
    attention_is_the_models: bool
    overview: NDArray[np.uint8] | None
    n_slides: int
    shown_from: tuple[int, int] = (0, 0)

    @property
    def is_even(self) -> bool:
        """Whether the network looks at all tiles alike, as one that learned no better does."""
        if self.attention is None:
            return False
        return float(self.attention.max()) < _EVEN * float(self.attention.min())


def tile_map(scorer: SiteScorer, patient_id: str) -> TileMap | None:
    """Map the tiles of a patient's largest slide; None without a slide, or nothing to show of it.

    Parameters
    ----------
    scorer
        What gave the patient's risk.
    """
    for name, spec in scorer.protocol.modality.items():
        tables = scorer.cohort.mod if isinstance(spec, PathologySpec) else {}
        if name in tables and patient_id in tables[name].obs_names:
            return _of_modality(scorer, name, patient_id)
    return None


def _of_modality(scorer: SiteScorer, name: str, patient_id: str) -> TileMap | None:
    references = str(scorer.cohort.mod[name].obs.loc[patient_id, "bag"]).split(";")
    bags = [read_bag(scorer.features / reference) for reference in references]
    whole = np.concatenate([bag.features for bag in bags])
    share = scorer.tile_log_hazards(name, whole)
    attention = _attention(scorer.own_encoder(name), whole)
    if share is None and attention is None:
        return None
    sizes = [len(bag.coords) for bag in bags]
    largest = int(np.argmax(sizes))
    own = slice(sum(sizes[:largest]), sum(sizes[: largest + 1]))
    path, coords = scorer.features / references[largest], bags[largest].coords
    side_px, size_px = geometry_of(path, coords)
    return TileMap(
        modality=name,
        coords=coords,
        side_px=side_px,
        size_px=size_px,
        share=None if share is None else share[own],
        attention=None if attention is None else attention[own],
        attention_is_the_models=scorer.protocol.encoder[name].sharing == "local",
        overview=overview_of(slide_of(scorer.settings, name, patient_id, path)),
        n_slides=len(bags),
    )


def _attention(encoder: FittedEncoder | None, tiles: NDArray[np.float32]) -> Floats | None:
    if encoder is None or encoder.spec.model != "gated_attention":
        return None
    return encoder.attention([tiles])[0]


def geometry_of(bag: Path, coords: NDArray[np.int64]) -> tuple[float, tuple[float, float]]:
    """Side of a tile and size of the slide at level 0, as noted in the bag or else guessed."""
    grid = read_grid(bag)
    noted, side = grid.attrs, float(grid.side_px or _step(coords))
    width, height = (
        max(float(noted.get(f"level0_{name}", 0.0)), float(coords[:, at].max()) + side)
        for at, name in enumerate(("width", "height"))
    )
    return side, (width, height)


def _step(coords: NDArray[np.int64]) -> float:
    """Smallest distance between tiles along an axis."""
    steps = [np.diff(np.unique(axis)) for axis in coords.T]
    found = [float(step.min()) for step in steps if len(step)]
    return min(found, default=1.0)


def slide_of(settings: SiteSettings, name: str, patient_id: str, bag: Path) -> Path | None:
    """Find the slide that a patient's bag was made of; None where the manifest has it no more."""
    try:
        rows, _ = read_manifest(settings.path(settings.manifest), [name])
    except (DataError, OSError):
        return None
    stem = bag.stem[:-_DIGEST_CHARACTERS]
    mine = [r.path for r in rows if r.patient_id == patient_id and r.path.stem == stem]
    return mine[0] if len(mine) == 1 else None


def shown_from(slide: Path | None) -> tuple[int, int]:
    """Corner (x, y) at level 0 from which viewers count; that of the slide where none is known."""
    try:
        if slide is None:
            return 0, 0
        with open_slide(slide) as opened:
            return opened.shown_from
    except (DataError, OSError):
        return 0, 0


def overview_of(slide: Path | None) -> NDArray[np.uint8] | None:
    """Read a slide in coarse, (h, w, 3); None where that cannot be done."""
    try:
        if slide is None:
            return None
        with open_slide(slide) as opened:
            downsample = max(1.0, math.ceil(max(opened.size_px) / _OVERVIEW_PX))
            return thumbnail(opened, downsample).rgb
    except (DataError, OSError):
        return None
