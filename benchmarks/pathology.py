"""Processor time per tile of reading, embedding and writing slides, against the usual loop.

The usual loop is a data set that asks OpenSlide for one region per tile, turns it into a tensor
through Pillow, and a loader that stacks batches. Both take turns in one process, so that they see
the same machine; processor seconds of all threads count, since the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import openslide
import simplejpeg
from cross_validation import Figures, run, whole
from PIL import Image

from modalities.cohort import DataError
from modalities.pathology import PathologySpec, SlideJob, extract_slides, load_tile_encoder
from modalities.pathology.openslide_reader import OpenSlideReader
from modalities.pathology.planning import Plan, plan_slide
from modalities.pathology.reader import open_slide
from modalities.pathology.reading import tile_reader
from modalities.pathology.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    Coords = NDArray[np.int64]
    Pixels = NDArray[np.uint8]

_TILE_PX, _MPP = 224, 0.5
_BATCH = 32
_STORED_PX = 256
_DOWNSAMPLES = (1, 4, 16)
_JPEG_QUALITY = 80
_GLASS = 243
_PIECE_PX = (1024, 544)
_TISSUE = 0.75  # of a made slide, about
_LARGE_PX, _SMALL_PX = 30_000, 6_000
_REAL_SLIDE = "slide_cmu1_small/cmu_small_region.svs"
_TARGETS = {
    "raw_read_20x": 0.35,
    "raw_read_40x": 0.25,
    "null_pipeline": 0.40,
    "pipeline_over_encoder": 1.10,
    "default_over_fp32_loop": 0.45,
}


def make_slide(path: Path, side_px: int) -> Path:
    """Write a pyramid of JPEG tiles, 4:2:0: one section, mirrored copies of a piece of tissue."""
    import tifffile

    piece = _piece()
    mirrored = np.concatenate([piece, piece[::-1]])
    mirrored = np.concatenate([mirrored, mirrored[:, ::-1]], axis=1)
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for downsample in _DOWNSAMPLES:
            level = np.asarray(Image.fromarray(mirrored).reduce(downsample))
            side = side_px // downsample
            writer.write(
                _tiles(level, side),
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(_STORED_PX, _STORED_PX),
                compression="jpeg",
                photometric="ycbcr",
                subsampling=(2, 2),
                subfiletype=int(downsample > 1),
                resolution=(1e4 / _MPP / downsample,) * 2,
                resolutionunit="centimeter",
                metadata=None,
                maxworkers=1,
            )
    return path


def _piece() -> Pixels:
    """Real tissue where there is some at hand, else simulated; sides are multiples of 16."""
    data = Path(os.environ.get("CONSILIUM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    real = data / _REAL_SLIDE
    if real.is_file():
        with openslide.OpenSlide(real) as slide:
            picture = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    else:
        from modalities.synthetic.slides import draw_slide, site_stain

        picture = draw_slide(np.zeros(2), site_stain(1, 0), np.random.default_rng(1))
    height, width = (side // 16 * 16 for side in _PIECE_PX)
    tissue = picture.min(axis=2) < _GLASS - 23
    sums = np.pad(tissue.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width]
    y, x = np.unravel_index(np.argmax(inside + sums[:-height, :-width]), inside.shape)
    return picture[y : y + height, x : x + width]


def _tiles(level: Pixels, side_px: int) -> Iterator[bytes]:
    """Yield the tiles of a square, encoded: ``level`` over and over, with a margin of glass."""
    rows, columns = (np.arange(side_px + _STORED_PX) % n for n in level.shape[:2])
    middle = (np.arange(side_px + _STORED_PX) - side_px / 2) / (0.45 * side_px)
    for top in range(0, side_px, _STORED_PX):
        down = slice(top, top + _STORED_PX)
        band = level[rows[down]]
        for left in range(0, side_px, _STORED_PX):
            across = slice(left, left + _STORED_PX)
            tile = np.ascontiguousarray(band[:, columns[across]])
            tile[middle[down, None] ** 4 + middle[None, across] ** 4 > 1] = _GLASS
            yield simplejpeg.encode_jpeg(tile, quality=_JPEG_QUALITY, colorsubsampling="420")


@dataclass(frozen=True)
class Setting:
    """What is measured on."""

    slide: Path
    spec: PathologySpec
    coords: Coords
    folder: Path
    repeats: int


class NullEncoder:
    """Gives the mean of a few pixels, in no time."""

    name, dim, precision, batch_tiles = "null", 8, "fp32", _BATCH

    def embed(self, tiles: Pixels) -> NDArray[np.float32]:
        """Embed tiles (n, tile_px, tile_px, 3) as (n, 8)."""
        few = tiles[:, ::64, ::64, :1].mean(axis=(1, 2), dtype=np.float32)
        return np.repeat(few, self.dim, axis=1)


def raw_ours(setting: Setting, mpp: float) -> int:
    """Read tiles as the extractor does."""
    with open_slide(setting.slide) as slide:
        coords = _fitting(setting.coords, slide.size_px, mpp)
        with tile_reader(slide, tile_px=_TILE_PX, mpp=mpp, n_threads=1) as reader:
            reader.expect(coords, tile_px=_TILE_PX, mpp=mpp)
            for at in range(0, len(coords), _BATCH):
                reader.read_tiles(coords[at : at + _BATCH], tile_px=_TILE_PX, mpp=mpp)
    return len(coords)


def raw_openslide(setting: Setting, mpp: float) -> int:
    """Read tiles one by one through OpenSlide, and resize them with Pillow."""
    with openslide.OpenSlide(setting.slide) as slide:
        coords = _fitting(setting.coords, slide.dimensions, mpp)
        for at in range(0, len(coords), _BATCH):
            np.stack([_one(slide, xy, mpp) for xy in coords[at : at + _BATCH]])
    return len(coords)


def _one(slide: openslide.OpenSlide, xy: Coords, mpp: float) -> Pixels:
    field_px = round(_TILE_PX * mpp / _MPP)
    tile = slide.read_region(tuple(xy), 0, (field_px, field_px)).convert("RGB")
    return np.asarray(tile if field_px == _TILE_PX else tile.resize((_TILE_PX, _TILE_PX)))


def _fitting(coords: Coords, size_px: tuple[int, int], mpp: float) -> Coords:
    """Leave every other tile and row away at twice the scale, as a grid of larger tiles would."""
    step = round(mpp / _MPP)
    grid = coords // _TILE_PX
    inside = (coords + _TILE_PX * step <= size_px).all(axis=1) & (grid % step == 0).all(axis=1)
    return coords[inside]


def usual_loop(setting: Setting, model: Any) -> int:
    """Read through a data set and a loader, and embed in fp32."""
    import torch
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    prepared = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )

    class Tiles(Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.slide = openslide.OpenSlide(setting.slide)

        def __len__(self) -> int:
            return len(setting.coords)

        def __getitem__(self, i: int) -> tuple[torch.Tensor, Coords]:
            xy = setting.coords[i]
            tile = self.slide.read_region(tuple(xy), 0, (_TILE_PX, _TILE_PX)).convert("RGB")
            return prepared(tile), xy

    with torch.inference_mode():
        rows = [model(images).numpy() for images, _ in DataLoader(Tiles(), batch_size=_BATCH)]
    np.save(setting.folder / "usual.npy", np.concatenate(rows))
    return len(setting.coords)


def pipeline(setting: Setting, encoder: Any) -> int:
    """Extract the slide from its bytes to a bag: digest, tissue, grid, tiles, embeddings."""
    out = setting.folder / "bag.h5"
    out.unlink(missing_ok=True)
    ((_, outcome),) = extract_slides([SlideJob(setting.slide, out)], setting.spec, lambda: encoder)
    if outcome.outcome != "done":
        raise DataError(outcome.code, outcome.reason)
    return outcome.n_tiles


def measure(
    cases: dict[str, Callable[[], int]], repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median processor and wall milliseconds per tile of cases that take turns."""
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    wall: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            spent, began = time.process_time(), time.perf_counter()
            n_tiles = case()
            cpu[name].append((time.process_time() - spent) / n_tiles * 1e3)
            wall[name].append((time.perf_counter() - began) / n_tiles * 1e3)
    cpu_ms, wall_ms = (
        {name: round(statistics.median(x), 4) for name, x in found.items()} for found in (cpu, wall)
    )
    return cpu_ms, wall_ms


def tissue_grid(setting: Setting) -> tuple[float, bool]:
    """Median processor seconds from opening a slide to its grid, and whether all runs agree."""
    spent, plans = [], []
    for _ in range(setting.repeats + 2):
        began = time.process_time()
        with open_slide(setting.slide) as slide:
            plans.append(plan_slide(slide, setting.spec))
        spent.append(time.process_time() - began)
    return round(statistics.median(spent), 4), len({_bytes_of(x) for x in plans}) == 1


def _bytes_of(plan: Plan) -> bytes:
    return plan.coords.tobytes() + plan.mask.tobytes()


def largest_difference(setting: Setting) -> tuple[int, str]:
    """Largest difference of any pixel from OpenSlide's at either scale, and who reads."""
    largest, name = 0, ""
    with open_slide(setting.slide) as slide:
        plain = OpenSlideReader(slide, Workers(1))
        for mpp in (_MPP, 2 * _MPP):
            coords = _fitting(setting.coords, slide.size_px, mpp)
            with tile_reader(slide, tile_px=_TILE_PX, mpp=mpp) as reader:
                name = reader.name
                for at in range(0, len(coords), _BATCH):
                    part = coords[at : at + _BATCH]
                    one, two = (
                        x.read_tiles(part, tile_px=_TILE_PX, mpp=mpp).pixels.astype(np.int16)
                        for x in (reader, plain)
                    )
                    shown = one if mpp != _MPP else _shown(setting.slide, part)
                    largest = max(largest, *(int(np.abs(one - x).max()) for x in (two, shown)))
    return largest, name


def _shown(path: Path, coords: Coords) -> NDArray[np.int16]:
    with openslide.OpenSlide(path) as slide:
        return np.stack([_one(slide, xy, _MPP) for xy in coords]).astype(np.int16)


class NowAndThen:
    """An encoder that embeds one batch of sixteen, so that it needs its memory and little time."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._n_batches = 0
        self.name, self.dim, self.batch_tiles = encoder.name, encoder.dim, encoder.batch_tiles

    @property
    def precision(self) -> str:
        """Of the encoder."""
        return str(self._encoder.precision)

    def embed(self, tiles: Pixels) -> NDArray[np.float32]:
        """Embed tiles (n, tile_px, tile_px, 3) as (n, dim), or say nothing of them."""
        self._n_batches += 1
        if self._n_batches % 16 == 1:
            return np.asarray(self._encoder.embed(tiles))
        return np.zeros((len(tiles), self.dim), dtype=np.float32)


def peak_memory(slide: Path, encoder: str) -> float:
    """Largest resident size, in MiB, of a process that extracts a slide."""
    command = [sys.executable, __file__, str(slide), "--encoder", encoder, "--only-peak-memory"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def own_peak_memory(slide: Path, encoder: str) -> float:
    """Largest resident size of this process, after extracting a slide.

    What the system counts as a process's largest includes its parent's, before it became another.
    """
    found: Any = NullEncoder()
    if encoder != found.name:
        import torch

        torch.set_num_threads(1)
        found = NowAndThen(load_tile_encoder(PathologySpec(encoder=encoder, pretrained=False)))
    with TemporaryDirectory(prefix="consilium-") as folder:
        pipeline(
            Setting(slide, PathologySpec(), np.empty((0, 2), np.int64), Path(folder), 1), found
        )
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def encoder_figures(
    setting: Setting, name: str, pixels: Pixels
) -> tuple[dict[str, float], dict[str, float], Figures]:
    """Time the encoder alone, the pipeline in both precisions, and the usual loop."""
    import timm
    import torch

    torch.manual_seed(0)
    spec = setting.spec.model_copy(update={"encoder": name, "pretrained": False})
    fp32, default = (
        load_tile_encoder(spec.model_copy(update={"precision": x})) for x in ("fp32", "auto")
    )
    model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    exact, fast = (x.embed(pixels) for x in (fp32, default))
    cosine = np.sum(exact * fast, axis=1) / np.prod(
        [np.linalg.norm(x, axis=1) for x in (exact, fast)], axis=0
    )
    cpu, wall = measure(
        {
            "encoder_fp32": lambda: len(fp32.embed(pixels)),
            "encoder_default": lambda: len(default.embed(pixels)),
            "pipeline_fp32": lambda: pipeline(setting, fp32),
            "pipeline_default": lambda: pipeline(setting, default),
            "usual_loop_fp32": lambda: usual_loop(setting, model),
        },
        setting.repeats,
    )
    return cpu, wall, {
        "min_cosine": round(float(cosine.min()), 6), "precision": default.precision
    }  # fmt: skip


# Each as its own documentation has it. What is imported first counts for nobody's tiles.
PEERS = {
    "lazyslide": (
        "import lazyslide as zs\nfrom wsidata import open_wsi",
        """
wsi = open_wsi(slide)
zs.pp.find_tissues(wsi)
zs.pp.tile_tissues(wsi, 224, mpp=0.5, slide_mpp=0.5)
zs.tl.feature_extraction(wsi, model=model, transform=transform, device="cpu", pbar=False)
n_tiles = len(wsi.shapes["tiles"])
""",
    ),
    "tiatoolbox": (
        """
import tempfile, zarr
from tiatoolbox.models.architecture.vanilla import TimmBackbone
from tiatoolbox.models.engine.deep_feature_extractor import DeepFeatureExtractor
from tiatoolbox.models.engine.io_config import IOSegmentorConfig
""",
        """
at, side = [{"units": "mpp", "resolution": 0.5}], (224, 224)
config = IOSegmentorConfig(
    input_resolutions=at, output_resolutions=at, patch_input_shape=side, patch_output_shape=side,
    stride_shape=side,
)
extractor = DeepFeatureExtractor(
    model=TimmBackbone(encoder, pretrained=False), batch_size=32, device="cpu", verbose=False
)
with tempfile.TemporaryDirectory() as folder:
    found = extractor.run(
        images=[slide], patch_mode=False, ioconfig=config, save_dir=folder + "/out",
        output_type="zarr",
    )
    (where,) = found.values()
    n_tiles = zarr.open(str(where), mode="r")["coordinates"].shape[0]
""",
    ),
    "trident": (
        """
import tempfile, h5py
from trident import OpenSlideWSI
from trident.patch_encoder_models import encoder_factory
from trident.segmentation_models import segmentation_model_factory
""",
        """
with tempfile.TemporaryDirectory() as folder:
    wsi = OpenSlideWSI(slide_path=slide, lazy_init=False, mpp=0.5)
    wsi.segment_tissue(segmentation_model_factory("otsu"), job_dir=folder, device="cpu")
    coords = wsi.extract_tissue_coords(target_mag=20, patch_size=224, save_coords=folder)
    encoder = encoder_factory(encoder)
    wsi.extract_patch_features(encoder, coords, folder, device="cpu", batch_limit=32)
    with h5py.File(coords) as file:
        n_tiles = len(file["coords"])
""",
    ),
}
_PEER = """
import json, resource, sys, time
slide, encoder, n_threads = sys.argv[1:]
import timm, torch
from torchvision import transforms
torch.set_num_threads(int(n_threads))
model = timm.create_model(encoder, pretrained=False, num_classes=0).eval()
transform = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
)
def spent():
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(x)[:2]) for x in both)
{imports}
cpu_s, wall_s = spent(), time.perf_counter()
{recipe}
cpu_s, wall_s = spent() - cpu_s, time.perf_counter() - wall_s
print(json.dumps({{
    "cpu_ms": cpu_s / n_tiles * 1e3, "wall_ms": wall_s / n_tiles * 1e3, "n_tiles": n_tiles
}}))
"""


def peer(name: str, python: str, slide: Path, encoder: str, n_threads: int) -> Figures:
    """Run a peer's own recipe with the Python that has it."""
    imports, recipe = PEERS[name]
    code = _PEER.format(imports=imports, recipe=recipe)
    command = [python, "-c", code, str(slide), encoder, str(n_threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def study(arguments: argparse.Namespace) -> Figures:
    """Run the benchmark that the command line asks for."""
    import torch

    torch.set_num_threads(arguments.threads)
    with TemporaryDirectory(prefix="consilium-", dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        slide = arguments.slide or make_slide(folder / "made.tif", arguments.make)
        setting = _setting(slide, folder, arguments.repeats)
        small = setting
        if arguments.slide is None:
            side_px = round(_TILE_PX * (arguments.tiles / _TISSUE) ** 0.5)
            small = _setting(make_slide(folder / "small.tif", side_px), folder, arguments.repeats)
        found = _reading(setting) | _embedding(small, arguments)
        found["figures"] |= _memory(folder, arguments.encoder) if arguments.memory else {}
        found["figures"]["peers"] = {
            name: peer(name, python, small.slide, arguments.encoder, arguments.threads)
            for name, python in arguments.peer_python
        }
        return _arranged(arguments, setting, found)


def _setting(slide: Path, folder: Path, repeats: int) -> Setting:
    spec = PathologySpec()
    with open_slide(slide) as opened:
        return Setting(slide, spec, plan_slide(opened, spec).coords, folder, repeats)


def _reading(setting: Setting) -> Figures:
    """Raw reads and the pipeline without an encoder, on all tiles of the slide."""
    import torchvision.transforms  # noqa: F401 - what importing costs is nobody's tile

    null = NullEncoder()
    cpu, wall = measure(
        {
            "raw_20x_ours": lambda: raw_ours(setting, _MPP),
            "raw_20x_openslide": lambda: raw_openslide(setting, _MPP),
            "raw_40x_ours": lambda: raw_ours(setting, 2 * _MPP),
            "raw_40x_openslide": lambda: raw_openslide(setting, 2 * _MPP),
            "null_pipeline": lambda: pipeline(setting, null),
            "null_usual_loop": lambda: usual_loop(setting, lambda images: images[:, 0, 0, :8]),
        },
        setting.repeats,
    )
    tissue_s, is_same = tissue_grid(setting)
    difference, reader = largest_difference(setting)
    return {
        "cpu": cpu,
        "wall": wall,
        "tissue_grid_cpu_s": tissue_s,
        "tissue_grid_is_the_same_every_time": is_same,
        "max_pixel_difference": difference,
        "figures": {"reader": reader},
    }


def _embedding(setting: Setting, arguments: argparse.Namespace) -> Figures:
    """Time the encoder and the pipeline with it, on all tiles of a slide of few."""
    with (
        open_slide(setting.slide) as slide,
        tile_reader(slide, tile_px=_TILE_PX, mpp=_MPP) as reader,
    ):
        pixels = reader.read_tiles(setting.coords, tile_px=_TILE_PX, mpp=_MPP).pixels
    cpu, wall, found = encoder_figures(setting, arguments.encoder, pixels)
    return {"encoder_cpu": cpu, "encoder_wall": wall, "n_embedded": len(pixels), **found}


def _memory(folder: Path, encoder: str) -> Figures:
    peaks: dict[str, dict[str, float]] = {encoder: {}, NullEncoder.name: {}}
    for side_px in (_LARGE_PX, _SMALL_PX):
        path = make_slide(folder / f"{side_px}.tif", side_px)
        for name, found in peaks.items():
            found[f"{side_px}_px"] = round(peak_memory(path, name), 1)
        path.unlink()
    return {"peak_memory_mib": peaks}


def _arranged(arguments: argparse.Namespace, setting: Setting, found: Figures) -> Figures:
    cpu = found["cpu"] | found["encoder_cpu"]
    peaks = found["figures"].get("peak_memory_mib", {}).get(arguments.encoder)
    pairs = {
        "raw_read_20x": ("raw_20x_ours", "raw_20x_openslide"),
        "raw_read_40x": ("raw_40x_ours", "raw_40x_openslide"),
        "null_pipeline": ("null_pipeline", "null_usual_loop"),
        "pipeline_over_encoder": ("pipeline_default", "encoder_default"),
        "pipeline_over_encoder_fp32": ("pipeline_fp32", "encoder_fp32"),
        "default_over_fp32_loop": ("pipeline_default", "usual_loop_fp32"),
    }
    return {
        "benchmark": "pathology",
        "encoder": arguments.encoder,
        "n_tiles": len(setting.coords),
        "n_embedded": found["n_embedded"],
        "ratios": {name: _ratio(cpu[one], cpu[two]) for name, (one, two) in pairs.items()},
        **{
            name: found[name]
            for name in (
                "tissue_grid_cpu_s",
                "tissue_grid_is_the_same_every_time",
                "max_pixel_difference",
                "min_cosine",
            )
        },
        "rss_ratio_30k_over_6k": None if peaks is None else _ratio(*peaks.values()),
        "targets": _TARGETS,
        "figures": {
            "precision": found["precision"],
            "cpu_ms_per_tile": cpu,
            "wall_ms_per_tile": found["wall"] | found["encoder_wall"],
            **found["figures"],
        },
    }


def _ratio(one: float, other: float) -> float:
    return round(one / other, 4)


def _named_python(text: str) -> tuple[str, str]:
    name, equals, python = text.partition("=")
    if not equals or name not in PEERS:
        raise argparse.ArgumentTypeError(
            f"found {text!r}, needed NAME=PATH with NAME one of {', '.join(sorted(PEERS))}"
        )
    return name, python


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and print one JSON object."""
    parser = argparse.ArgumentParser(description="What reading and embedding of slides costs.")
    parser.add_argument("slide", type=Path, nargs="?", help="at 0.5 micrometres per pixel")
    parser.add_argument("--make", type=whole(1000), default=12_000, help="side of a slide to make")
    parser.add_argument("--encoder", default="resnet18", help="a timm name, with random weights")
    parser.add_argument("--tiles", type=whole(1), default=400, help="to embed, of a made slide")
    parser.add_argument("--threads", type=whole(1), default=1, help="of torch")
    parser.add_argument("--repeats", type=whole(1), default=3, help="of timings; medians are shown")
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="skip the two large slides"
    )
    parser.add_argument(
        "--peer-python", type=_named_python, action="append", default=[], metavar="NAME=PATH",
        help="a Python that has trident, lazyslide or tiatoolbox",
    )  # fmt: skip
    parser.add_argument("--scratch", type=Path, help="folder for slides that are made")
    parser.add_argument("--only-peak-memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="the only form there is")
    parsed = parser.parse_args(arguments)
    if parsed.only_peak_memory:
        print(own_peak_memory(parsed.slide, parsed.encoder))
        return 0
    return run(parser, study, arguments)


if __name__ == "__main__":
    sys.exit(main())
