"""A site's slides to bags of embeddings: on how many devices at once, with which weights."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from modalities.cohort import DataError, Exclusion
from modalities.pathology import (
    PathologySpec,
    SlideJob,
    WrongWeights,
    import_features,
    is_features,
    load_tile_encoder,
)
from modalities.pathology.devices import extract_over, found_devices

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from infra.settings import SiteSettings
    from modalities.pathology import TileEncoder

# Batches wait for each other, since each of them takes all the slots that the site gives.
_EMBEDS = threading.Lock()
_LOADS = threading.Lock()


@dataclass(frozen=True)
class Means:
    """What a site embeds its slides with.

    Attributes
    ----------
    slots
        Slides that are embedded at once.
    weights
        File of the encoder's weights; None takes those of its source.
    """

    slots: int = 1
    weights: Path | None = None


ONE_SLIDE = Means()


@dataclass(frozen=True)
class SlideInput:
    """One slide, or features of one that were made elsewhere.

    Attributes
    ----------
    digest
        Of the file.
    marks
        By which its bag is recognised.
    """

    patient_id: str
    path: Path
    digest: str
    bag: Path
    marks: Mapping[str, str]


def means_of(settings: SiteSettings, modality: str, spec: object) -> Means:
    """Give what a site embeds the slides of a modality with.

    Raises
    ------
    WrongWeights
        If the site names weights that the study does not pin: sites would embed differently.
    """
    found = settings.weights.get(modality)
    if found is None or not isinstance(spec, PathologySpec):
        return Means(settings.gpu_slots)
    if spec.weights_sha256 is None:
        raise WrongWeights(
            f"weights: found a file for {modality} in site.toml and no weights_sha256 in the "
            "study, needed it there, so that all sites embed alike; ask the study lead"
        )
    return Means(settings.gpu_slots, settings.path(found))


def embed_slides(
    inputs: Sequence[SlideInput], spec: PathologySpec, modality: str, means: Means = ONE_SLIDE
) -> list[Exclusion]:
    """Write the bag of every input, and give those that cannot be used."""
    slides = {x.bag: x for x in inputs if not is_features(x.path)}
    excluded = list(_imported([x for x in inputs if is_features(x.path)], spec, modality))
    # A batch that is tried again goes on with the slides that it had not come to.
    jobs = [
        SlideJob(x.path, x.bag, input_digest=x.digest, marks=x.marks, reuse=True)
        for x in slides.values()
    ]
    if not jobs:
        return excluded
    found = found_devices()
    devices = [found[i % len(found)] for i in range(min(means.slots, len(jobs)))]
    with _EMBEDS:
        load = partial(_tile_encoder, spec, means.weights)
        for job, outcome in extract_over(devices, jobs, spec, load):
            if outcome.outcome == "failed":
                excluded += [
                    Exclusion(x.patient_id, modality, outcome.code, outcome.reason)
                    for x in inputs
                    if x.bag == job.out_h5  # of several patients, where a manifest says so
                ]
    return excluded


def _imported(
    inputs: Sequence[SlideInput], spec: PathologySpec, modality: str
) -> Iterator[Exclusion]:
    for one in inputs:
        try:
            import_features(one.path, one.bag, spec, input_digest=one.digest, marks=one.marks)
        except DataError as fault:
            yield Exclusion(one.patient_id, modality, fault.code, str(fault))


def _tile_encoder(spec: PathologySpec, weights: Path | None, device: str | None) -> TileEncoder:
    with _LOADS:  # two slides at once would both load it
        return _loaded(spec, weights, device)


@lru_cache(maxsize=8)
def _loaded(spec: PathologySpec, weights: Path | None, device: str | None) -> TileEncoder:
    return load_tile_encoder(spec, weights=weights, device=device)
