"""Where a site's own attention network looks: maps of slides, made and kept at the site."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flows.board_figures import attention_figure
from flows.embedding import SlideInput, embed_slides, means_of
from flows.extraction import bag_path
from flows.loading import about_encoder
from flows.sealed import note
from flows.site_registry import WEIGHTS, encoder_folder, registered_encoders
from flows.snapshots import FEATURES, is_withdrawn, released
from flows.terminal import UsageError
from flows.tile_maps import TileMap, geometry_of, overview_of, shown_from, slide_of
from modalities.cohort import DataError, read_cohort, read_manifest, rows_of
from modalities.files import digest_path, replacing
from modalities.pathology import (
    PathologySpec,
    check_features,
    digest_slide,
    is_current,
    is_features,
    read_bag,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow import MlflowClient
    from mudata import MuData

    from flows.protocol import StudyProtocol
    from fusion.encoders import FittedEncoder
    from infra.settings import SiteSettings

FOLDER: Final = "explained"
_WEIGHED: Final = "gated_attention"
_LOGGED: Final = ("highest", "middle", "lowest")


class ExplanationRefused(UsageError):
    """A map that cannot be made, or must not be."""


@dataclass(frozen=True)
class Explained:
    """A map on the disk.

    Attributes
    ----------
    n_tiles
        That carry a value.
    picture, outlines
        The overlay as PNG, and the tiles as GeoJSON in pixels of level 0, which QuPath opens.
    """

    n_tiles: int
    picture: Path
    outlines: Path


def explain_slide(
    settings: SiteSettings,
    protocol: StudyProtocol,
    slide: Path,
    *,
    modality: str,
    model: str | None = None,
    out: Path,
) -> Explained:
    """Write where a site's attention network looks on one slide.

    Parameters
    ----------
    slide
        A slide, or features of one. What the site has extracted of it is used; else it is embedded
        now, into ``out``.
    model
        Name, or NAME/VERSION, of an encoder in the site's own registry, or a folder that holds one;
        None takes what the site trained last.

    Raises
    ------
    ExplanationRefused
        If the patient was withdrawn, or there is no such network.
    DataError
        If the slide or its features cannot be used.
    """
    spec = protocol.modality[modality]
    if not isinstance(spec, PathologySpec):
        raise ExplanationRefused(f"{modality}: found no slides in it, needed a modality of slides")
    slide = slide.resolve()
    bags = _bags_of(settings, slide, modality)
    encoder = find_encoder(settings, modality, model)
    bag, raw = _features_of(settings, spec, slide, bags, modality=modality, out=out)
    tiles = map_of(encoder, bag, raw, modality=modality)
    return write_map(tiles, out, slide.stem)


def find_encoder(settings: SiteSettings, modality: str, model: str | None) -> FittedEncoder:
    """Read an attention network of a site's own.

    Raises
    ------
    ExplanationRefused
        If there is none, it is damaged, or it weighs no tiles.
    """
    from fusion.encoders import FittedEncoder  # torch takes seconds to import

    folder = _model_folder(settings, modality, model)
    try:
        encoder = FittedEncoder.from_bytes((folder / WEIGHTS).read_bytes())
    except OSError:
        raise ExplanationRefused(
            f"model: found no encoder of {modality} there, needed one that this site trained; run "
            "`consilium site train`"
        ) from None
    except ValueError as error:
        raise ExplanationRefused(str(error)) from None
    if encoder.spec.model != _WEIGHED:
        raise ExplanationRefused(
            f"model: found {encoder.spec.model}, which reads the mean of a patient's tiles, needed "
            f"{_WEIGHED}, which weighs them; say so in the study's [encoder.{modality}]"
        )
    return encoder


def map_of(encoder: FittedEncoder, bag: Path, slide: Path | None, *, modality: str) -> TileMap:
    """Map the attention over the tiles of one bag, of which it sums to one.

    Parameters
    ----------
    slide
        What the bag was made of, for the picture below the map.

    Raises
    ------
    DataError
        If the bag is damaged or its tiles are not those that the network was trained on.
    """
    tiles = read_bag(bag)
    side_px, size_px = geometry_of(bag, tiles.coords)
    return TileMap(
        modality=modality,
        coords=tiles.coords,
        side_px=side_px,
        size_px=size_px,
        share=None,
        attention=encoder.attention([tiles.features])[0],
        attention_is_the_models=True,
        overview=overview_of(slide),
        n_slides=1,
        shown_from=shown_from(slide),
    )


def write_map(tiles: TileMap, out: Path, name: str) -> Explained:
    """Write a map as ``<name>-attention.png`` and ``<name>-attention.geojson``, for its owner."""
    picture, outlines = (out / f"{name}-attention{x}" for x in (".png", ".geojson"))
    image = attention_figure(tiles).partition(",")[2]
    _write(picture, base64.b64decode(image))
    _write(outlines, json.dumps(as_geojson(tiles), separators=(",", ":")).encode())
    return Explained(len(tiles.coords), picture, outlines)


def as_geojson(tiles: TileMap) -> dict[str, Any]:
    """Give the tiles as squares in pixels of level 0, with their attention as measurements.

    Counted from where a viewer begins. ``Attention`` sums to one over the slide; ``Attention to
    even`` is 1 where a tile counts as much as it would if all counted alike.
    """
    assert tiles.attention is not None
    even = tiles.attention * len(tiles.attention) / (tiles.attention.sum() or 1.0)
    corners = tiles.coords - tiles.shown_from
    rows = zip(corners.tolist(), tiles.attention.tolist(), even.tolist(), strict=True)
    return {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [_square(x, y, tiles.side_px)]},
                "properties": {
                    "objectType": "tile",
                    "measurements": {"Attention": weight, "Attention to even": ratio},
                },
            }
            for (x, y), weight, ratio in rows
        ],
    }


def write_training_maps(
    settings: SiteSettings,
    protocol: StudyProtocol,
    cohort: MuData,
    features: Path,
    *,
    modality: str,
    out: Path,
) -> int:
    """Write the maps of three patients: of the highest, the middle and the lowest log hazard.

    Parameters
    ----------
    cohort, features
        What the encoder was trained on, and the folder that its bag references count from.

    Returns
    -------
    int
        Number of maps; 0 where the encoder weighs no tiles. A patient whose slide or bag cannot be
        read any more is left out.
    """
    spec = protocol.encoder[modality]
    if spec.model != _WEIGHED or not isinstance(protocol.modality[modality], PathologySpec):
        return 0
    encoder = find_encoder(settings, modality, None)
    n_written = 0
    for name, patient_id, bag in _told(settings, cohort, features, modality):
        try:
            slide = slide_of(settings, modality, patient_id, bag)
            write_map(map_of(encoder, bag, slide, modality=modality), out, name)
            n_written += 1
        except (DataError, OSError):
            continue
    return n_written


def log_training_maps(
    client: MlflowClient,
    run_id: str,
    settings: SiteSettings,
    protocol: StudyProtocol,
    modality: str,
) -> None:
    """Keep a few maps beside a trained encoder, in the site's own store; none is no fault."""
    try:
        snapshot = released(settings, protocol)
        with TemporaryDirectory() as folder:
            n_written = write_training_maps(
                settings,
                protocol,
                read_cohort(snapshot.cohort),
                snapshot.features,
                modality=modality,
                out=Path(folder),
            )
            if n_written:
                client.log_artifacts(run_id, folder, "attention")
    except (DataError, ExplanationRefused, OSError) as error:
        note(error)


def _told(
    settings: SiteSettings, cohort: MuData, features: Path, modality: str
) -> Iterator[tuple[str, str, Path]]:
    """Name, patient and largest bag of those whose maps are kept."""
    rows = np.flatnonzero(rows_of(cohort, modality) >= 0)
    log_hazard = np.load(settings.path("encoders", modality, "log_hazard.npy"))
    known = np.flatnonzero(np.isfinite(log_hazard)) if len(log_hazard) == len(rows) else rows[:0]
    if not len(known):
        return
    order = known[np.argsort(log_hazard[known])]
    for name, at in zip(_LOGGED, (order[-1], order[len(order) // 2], order[0]), strict=True):
        patient_id = str(cohort.obs_names[rows[at]])
        references = str(cohort.mod[modality].obs.loc[patient_id, "bag"]).split(";")
        yield name, patient_id, max((features / x for x in references), key=_size)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _model_folder(settings: SiteSettings, modality: str, model: str | None) -> Path:
    if model is None:
        return _last_trained(settings, modality)
    if (settings.home / model / WEIGHTS).is_file():  # an absolute path stays as it is
        return settings.home / model
    name, _, version = model.partition("/")
    found = [
        x
        for x in registered_encoders(settings)
        if x.name == name and x.modality == modality and version in {"", str(x.version)}
    ]
    folder = encoder_folder(settings, found[-1]) if found else None
    if folder is None or digest_path(folder / WEIGHTS) != found[-1].weights:
        known = sorted({x.name for x in registered_encoders(settings) if x.modality == modality})
        raise ExplanationRefused(
            f"--model: found no whole encoder {model!r} at this site, needed "
            f"{' or '.join(known) or 'one that it has registered'}, NAME/VERSION or a folder"
        )
    return folder


def _last_trained(settings: SiteSettings, modality: str) -> Path:
    folder = settings.path("encoders", modality)
    about = about_encoder(folder)
    key = None if about is None else about["key"]
    found = [x for x in registered_encoders(settings) if (x.modality, x.key) == (modality, key)]
    if found and digest_path(folder / WEIGHTS) != found[-1].weights:
        raise ExplanationRefused(
            f"model: found weights of {modality} other than those that this site registered, "
            f"needed the same; name {found[-1].name} with --model, or delete encoders/{modality} "
            "and run `consilium site train`"
        )
    return folder


def _bags_of(settings: SiteSettings, slide: Path, modality: str) -> list[Path]:
    """Where the site keeps what it extracted of a slide that its manifest lists."""
    rows, _ = read_manifest(settings.path(settings.manifest), [modality])
    mine = [row for row in rows if row.path.resolve() == slide]
    if any(is_withdrawn(settings, [row.patient_id for row in mine]).values()):
        raise ExplanationRefused(
            "slide: found that of a patient who was withdrawn, needed one who takes part; nothing "
            "may be said of this patient any more"
        )
    return [bag_path(row, settings.path(FEATURES, modality)) for row in mine]


def _features_of(
    settings: SiteSettings,
    spec: PathologySpec,
    slide: Path,
    bags: list[Path],
    *,
    modality: str,
    out: Path,
) -> tuple[Path, Path | None]:
    """Bag of a slide, and the slide where it can be shown."""
    if is_features(slide):
        check_features(slide, spec)
        return slide, None
    target, digest, made_by = out / f"{slide.stem}.h5", digest_slide(slide), spec.fingerprint()
    for bag in bags:
        # The file may be another slide by now.
        if is_current(bag, input_digest=digest, spec_fingerprint=made_by):
            return bag, slide
    if not is_current(target, input_digest=digest, spec_fingerprint=made_by):
        one = SlideInput("", slide, digest, target, {})
        means = replace(means_of(settings, modality, spec), slots=1)
        for fault in embed_slides([one], spec, modality, means):
            raise DataError(fault.code, fault.reason)
    return target, slide


def _square(x: int, y: int, side_px: float) -> list[list[float]]:
    right, bottom = x + side_px, y + side_px
    return [[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]


def _write(target: Path, content: bytes) -> None:
    with replacing(target) as temporary:
        temporary.chmod(0o600)
        temporary.write_bytes(content)
