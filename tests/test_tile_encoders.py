from __future__ import annotations

import re
import socket
import sys
import threading
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data as pictures

from modalities import pathology
from modalities.files import digest_path
from modalities.pathology import PathologySpec, architectures, devices, network, sources
from modalities.pathology.compiled import eager
from modalities.pathology.encoder_names import KNOWN_ENCODERS, canonical_name, known_encoder
from modalities.pathology.folding import folded
from modalities.pathology.weights import load_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modalities.pathology.encoder import Compiler
    from modalities.pathology.encoder_names import KnownEncoder
    from modalities.pathology.network import TileEncoder

# A network of timm's own tests: random weights, 160 px, a millisecond a tile.
TINY = PathologySpec(encoder="test_efficientnet", pretrained=False, precision="fp32")
# Two blocks of twelve channels each, with random weights and what the library transformers makes
# of two images with them.
GOLDEN = Path(__file__).parent / "golden" / "transformers_vits.safetensors"
RUNNABLE = [row for row in KNOWN_ENCODERS if not row.needs]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small batches lose more to waiting threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny() -> TileEncoder:
    return pathology.load_tile_encoder(TINY)


@pytest.fixture(scope="module")
def default() -> TileEncoder:
    return pathology.load_tile_encoder(PathologySpec(precision="fp32"))


def noise(n: int, side_px: int = 224, *, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side_px, side_px, 3), dtype=np.uint8)


@pytest.mark.parametrize("known", RUNNABLE, ids=lambda row: row.name)
def test_every_known_network_builds_and_is_as_large_as_published(known: KnownEncoder) -> None:
    with torch.device("meta"):
        model = architectures.pooled(architectures.bare_network(known).eval(), known)
        images = torch.zeros(2, 3, known.input_px, known.input_px)
        # Embedding itself is skipped where it would take long: shapes tell all that is asked.
        features = model(images)
    assert features.shape == (2, known.dim)
    n_parameters = sum(p.numel() for p in model.parameters()) / 1e6
    assert n_parameters == pytest.approx(known.million_parameters, abs=0.06)


def test_known_encoders_have_names_of_their_own() -> None:
    spellings = [x for row in KNOWN_ENCODERS for x in (row.name, *row.aliases)]
    assert len({canonical_name(x) for x in spellings}) == len(KNOWN_ENCODERS)
    assert all(known_encoder(x) is not None for x in spellings)
    for row in KNOWN_ENCODERS:
        assert row.licence
        assert row.tile_px >= 224
        assert (row.needs == "") == (row.architecture != "")


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("uni", "uni_v1"),
        ("UNI2-h", "uni_v2"),
        ("h-optimus-1", "hoptimus1"),
        ("phikonv2", "phikon_v2"),
        ("conch_v1.5", "conch_v15"),
        ("hibou-l", "hibou_l"),
        ("hf-hub:paige-ai/Virchow2", "virchow2"),
        ("hf-hub:MahmoodLab/uni", "uni_v1"),
        ("hf-hub:somebody/else", "hf-hub:somebody/else"),
        ("timm:resnet18", "resnet18"),
        ("timm:resnet50", "timm:resnet50"),
        ("resnet50", "resnet50"),
        ("resnet18.a1_in1k", "resnet18.a1_in1k"),
    ],
)
def test_an_encoder_has_one_spelling(typed: str, name: str) -> None:
    assert canonical_name(typed) == name
    spec = PathologySpec(encoder=typed)
    assert spec.encoder == name
    assert spec.fingerprint() == PathologySpec(encoder=name).fingerprint()


@pytest.mark.parametrize(
    "names",
    [
        "conch_v1 conch_v15 uni_v1 uni_v2 digepath ctranspath phikon phikon_v2 resnet50 keep "
        "gigapath gigapath-flash virchow virchow2 virchow2-cls hoptimus0 hoptimus1 h0-mini phaet "
        "mascaret musk openmidnight gpfm hibou_l kaiko-vitb8 kaiko-vitb16 kaiko-vits8 "
        "kaiko-vits16 kaiko-vitl14 "
        "lunit-vits8 genbio-pathfm",
        "uni uni2 virchow virchow2 gigapath h-optimus-0 h-optimus-1 h0-mini phikon phikonv2 conch "
        "conch_v1.5 hibou-b hibou-l midnight gpfm musk lunit-bt lunit-mocov2 lunit-swav "
        "lunit-dino-s8 lunit-dino-s16",
    ],
    ids=["trident", "lazyslide"],
)
def test_the_names_of_other_slide_tools_are_known(names: str) -> None:
    for name in names.split():
        pathology.check_encoder_name(name)
        assert known_encoder(name) is not None, name


def test_the_default_weights_know_a_cat(default: TileEncoder) -> None:
    """An independent check of the renamed weights: ImageNet's classes 281-285 are cats."""
    assert (default.dim, default.preprocessing.input_px) == (1280, 224)
    assert default.preprocessing.mean == default.preprocessing.std == (0.5, 0.5, 0.5)
    cat = Image.fromarray(pictures.chelsea()).crop((80, 0, 380, 300)).resize((224, 224))
    embedding = torch.from_numpy(default.embed(np.asarray(cat)[None]))
    state = torch.load(sources.packaged_weights(), map_location="cpu", weights_only=True)
    scores = embedding @ state["_fc.weight"].T + state["_fc.bias"]
    assert 281 <= int(scores.argmax()) <= 285


def test_embedding_is_timms_own_pooled_feature(default: TileEncoder) -> None:
    pixels = noise(3)
    model = architectures.default_model().eval()
    transform = timm.data.create_transform(
        input_size=224, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, is_training=False
    )
    images = torch.stack([transform(Image.fromarray(tile)) for tile in pixels])
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images), pre_logits=True).numpy()
    np.testing.assert_allclose(default.embed(pixels), expected, atol=1e-4)


def test_embeddings_do_not_depend_on_batches(tiny: TileEncoder) -> None:
    pixels = noise(tiny.batch_tiles + 5, seed=2)
    together = tiny.embed(pixels)
    assert together.shape == (len(pixels), tiny.dim)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together[-2:], tiny.embed(pixels[-2:]), atol=1e-4)
    assert tiny.embed(pixels[:0]).shape == (0, tiny.dim)


def test_random_weights_are_the_same_everywhere() -> None:
    state = torch.random.get_rng_state()
    one, two = (pathology.load_tile_encoder(TINY) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    pixels = np.full((1, 224, 224, 3), 90, dtype=np.uint8)
    np.testing.assert_array_equal(one.embed(pixels), two.embed(pixels))


def encoder_of(
    model: torch.nn.Module, *, compiler: Compiler = "none", **changes: Any
) -> TileEncoder:
    wanted = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "input_px": 32} | changes
    preprocessing = architectures.Preprocessing(**wanted)
    return network.TileEncoder(
        model, name="x", preprocessing=preprocessing, precision="fp32", compiler=compiler
    )


def test_the_middle_of_a_larger_tile_is_seen_where_an_encoder_wants_that() -> None:
    tiles = np.zeros((1, 40, 40, 3), dtype=np.uint8)
    tiles[:, 4:36, 4:36] = 255
    whole = encoder_of(torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten()))
    middle = encoder_of(
        torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten()), resize_px=40
    )
    assert float(whole.embed(tiles).max()) < 0.9
    np.testing.assert_allclose(middle.embed(tiles), 1.0, atol=1e-6)


class _Picky(torch.nn.Module):
    """Runs out of memory beyond three images."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError
        return images.mean(dim=(2, 3))


def test_a_batch_that_does_not_fit_is_cut_and_the_next_at_once() -> None:
    model = _Picky()
    encoder = encoder_of(model)
    tiles = noise(11, 32)
    expected = tiles.mean(axis=(1, 2)) / 255
    np.testing.assert_allclose(encoder.embed(tiles), expected, atol=1e-5)
    assert model.seen[-9:] == [11, 8, 4, 2, 2, 2, 2, 2, 1]
    model.seen.clear()
    np.testing.assert_allclose(encoder.embed(tiles), expected, atol=1e-5)
    assert max(model.seen) == 2  # what is known not to fit is not tried again


def test_a_network_of_whole_batches_takes_smaller_ones_where_they_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What inductor would make of it is of no matter here, and takes a minute.
    monkeypatch.setattr(network, "runner", lambda model, device, *_, **__: eager(model, device))
    model = _Picky()
    encoder = encoder_of(model, compiler="inductor")
    tiles = noise(5, 32)
    expected = tiles.mean(axis=(1, 2)) / 255
    np.testing.assert_allclose(encoder.embed(tiles), expected, atol=1e-5)
    assert set(model.seen) == {1, 16, 8, 4, 2}


class _Never(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.std() == 0:
            raise torch.OutOfMemoryError
        return images.mean(dim=(2, 3))


def test_one_tile_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        encoder_of(_Never()).embed(np.zeros((2, 32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "test_efficientnet"])
def test_folding_leaves_no_normalisation_and_changes_nothing(name: str) -> None:
    model = architectures._random_model(name).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # fresh ones do nothing
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 1.5)
        side = timm.data.resolve_model_data_config(model)["input_size"][-1]
        images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(3))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        other = folded(model, images[:1])
        assert other is not model
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in other.modules())
        expected = model(images)
        np.testing.assert_allclose(other(images), expected, atol=1e-3 * float(expected.std()))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class _Shared(torch.nn.Module):
    """Reads the convolution's output twice, so that folding would change the second reading."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 4, 3)
        self.normalisation = torch.nn.BatchNorm2d(4)
        self.normalisation.running_var.fill_(4.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.convolution(images)
        return (self.normalisation(found) + found).mean(dim=(2, 3))


def test_folding_is_given_up_where_it_would_change_the_function() -> None:
    model = _Shared().eval()
    assert folded(model, torch.rand(1, 3, 8, 8)) is model
    linear = torch.nn.Flatten()
    assert folded(linear, torch.rand(1, 3, 8, 8)) is linear


@pytest.mark.parametrize(("least", "settled"), [(-1.0, "bf16"), (1.1, "fp32")])
def test_auto_keeps_bf16_only_where_it_agrees(
    monkeypatch: pytest.MonkeyPatch, least: float, settled: str
) -> None:
    monkeypatch.setattr(network, "_faster_precision", lambda device: "bf16")
    monkeypatch.setattr(network, "_LEAST_COSINE", least)
    encoder = pathology.load_tile_encoder(TINY.model_copy(update={"precision": "auto"}))
    features = encoder.embed(noise(2))
    assert encoder.precision == settled
    assert features.dtype == np.float32
    np.testing.assert_array_equal(encoder.embed(noise(2)), features)


def test_auto_is_fp32_where_nothing_faster_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_faster_precision", lambda device: None)
    encoder = pathology.load_tile_encoder(TINY.model_copy(update={"precision": "auto"}))
    assert encoder.precision == "fp32"
    encoder.precision = "auto"  # as for the next slide
    encoder.embed(noise(1))
    assert encoder.precision == "fp32"


def test_torch_is_asked_for_gpus_where_there_may_be_several(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver, uncounted, two = tmp_path / "gpus", tmp_path / "dxg", ("cuda:0", "cuda:1")
    monkeypatch.setattr(devices, "_DRIVER", driver)
    monkeypatch.setattr(devices, "_UNCOUNTED", (uncounted,))
    monkeypatch.setattr(network, "devices", lambda: two)
    assert devices.found_devices() == (None,)
    (driver / "0000:01").mkdir(parents=True)
    assert devices.found_devices() == (None,)
    uncounted.touch()
    assert devices.found_devices() == two
    uncounted.unlink()
    (driver / "0000:02").mkdir()
    assert devices.found_devices() == two


def test_each_gpu_is_asked_for_its_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [torch.device("cuda:0")]

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        asked.append(device)
        yield
        asked.pop()

    def supported(*, including_emulation: bool) -> bool:
        return not including_emulation and asked[-1].index == 1

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert network._faster_precision(torch.device("cuda:1")) == "bf16"
    assert network._faster_precision(torch.device("cuda:0")) == "fp16"


def test_encoders_for_several_devices_are_built_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random weights come from one generator, and a large network fills the memory once."""
    build, door, met = network.network_of, threading.Barrier(2), []

    def watched(*arguments: Any) -> Any:
        with suppress(threading.BrokenBarrierError):
            met.append(door.wait(timeout=0.2))
        return build(*arguments)

    monkeypatch.setattr(network, "network_of", watched)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda device: pathology.load_tile_encoder(TINY, device=device),
                            ["cpu", "cpu"])  # fmt: skip
    assert met == []
    np.testing.assert_array_equal(one.embed(noise(1)), two.embed(noise(1)))


class _Tokens(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(2)


def test_a_network_without_one_row_per_square_tile_is_refused() -> None:
    with pytest.raises(pathology.UnknownEncoder, match=r"'x' gives 3 x 1024 numbers for a tile"):
        encoder_of(_Tokens())
    spec = PathologySpec(encoder="vit_5b_patch16_sapiens2", pretrained=False)
    with (
        torch.device("meta"),
        pytest.raises(pathology.UnknownEncoder, match="sees 1024 x 768 pixels in 3 channels"),
    ):
        architectures.network_of(spec, None)


def test_a_tile_is_resized_as_a_network_of_timms_wants() -> None:
    found = {}
    for name in ("resnet18.tv_in1k", "resnet18.a1_in1k"):
        spec = PathologySpec(encoder=name, pretrained=False)
        found[name] = architectures.network_of(spec, None)[1].interpolation
    assert found == {"resnet18.tv_in1k": "bilinear", "resnet18.a1_in1k": "bicubic"}


@pytest.mark.parametrize(
    "name",
    ["tf_efficientnet_lite0", "resnet18", "resnet18.a1_in1k", "hf-hub:owner/name", "uni_v2",
     "timm:resnet50", "virchow2", "H-optimus-0"],
)  # fmt: skip
def test_known_encoder_names_pass(name: str) -> None:
    pathology.check_encoder_name(name)


@pytest.mark.parametrize(
    "name", ["resnet_18", "hf-hub:only-a-name", "local-dir:/tmp/x", "??", "virchow3"]
)
def test_an_unknown_encoder_is_named_with_close_ones(name: str) -> None:
    with pytest.raises(pathology.UnknownEncoder, match="needed a timm model name") as error:
        pathology.load_tile_encoder(PathologySpec(encoder=name))
    assert isinstance(error.value, ValueError)
    close = {"resnet_18": "resnet18", "virchow3": "virchow2"}.get(name, "")
    assert close in str(error.value)


def test_an_encoder_of_other_code_says_what_it_needs() -> None:
    with pytest.raises(pathology.UnknownEncoder, match=r"'conch_v15' needs .*manifest"):
        pathology.load_tile_encoder(PathologySpec(encoder="conch_v1.5"))


@pytest.mark.parametrize(
    "cause", [OSError("https://host.example/x"), RuntimeError("No pretrained weights exist")]
)
def test_weights_that_cannot_be_fetched_are_one_clear_sentence(
    monkeypatch: pytest.MonkeyPatch, cause: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise cause

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(pathology.MissingWeights, match="'resnet18'") as error:
        pathology.load_tile_encoder(PathologySpec(encoder="resnet18"))
    assert "host.example" not in str(error.value)
    assert error.value.__suppress_context__


def test_weights_on_request_are_asked_for_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(pathology.MissingWeights) as error:
        pathology.load_tile_encoder(PathologySpec(encoder="uni_v1"))
    text = str(error.value)
    assert "MahmoodLab/UNI (CC-BY-NC-ND-4.0, on request from its owner)" in text
    assert "pytorch_model.bin" in text
    assert "://" not in text


@pytest.mark.parametrize("name", ["uni_v1", "timm:resnet18"])
def test_without_a_network_weights_are_asked_for_at_once_and_in_nothing_but_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("modalities.pathology.sources.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(pathology.MissingWeights, match="found no"):
        pathology.load_tile_encoder(PathologySpec(encoder=name))
    assert capfd.readouterr() == ("", "")
    assert not [x for x in caplog.records if "huggingface" in x.name]
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    "values",
    [
        {"encoder": "uni_v1"},
        {"encoder": "timm:resnet18"},
        {"encoder": "resnet18.no_such_weights"},
        {"encoder": "timm:test_efficientnet_evos"},
        {"encoder": "hf-hub:owner/name"},
        {"encoder": "conch_v15"},
        {"weights_sha256": "0" * 64},
    ],
    ids=lambda values: str(next(iter(values.values())))[:24],
)
def test_a_check_says_what_loading_would_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: dict[str, Any]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spec, told = PathologySpec(**values), []
    for look in (pathology.check_encoder, pathology.load_tile_encoder):
        with pytest.raises((pathology.MissingWeights, pathology.UnknownEncoder)) as error:
            look(spec)
        told.append((error.type, str(error.value)))
    assert told[0] == told[1]


def test_a_check_takes_what_is_here_without_reading_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for folder, name in (
        ("models--MahmoodLab--UNI", "pytorch_model.bin"),
        ("models--timm--resnet18.a1_in1k", "model.safetensors"),
    ):
        (tmp_path / folder / "refs").mkdir(parents=True)
        (tmp_path / folder / "refs" / "main").write_text("0" * 40)
        file = tmp_path / folder / "snapshots" / ("0" * 40) / name
        file.parent.mkdir(parents=True)
        file.write_text("no tensors")
    for encoder in ("uni_v1", "timm:resnet18", "hf-hub:timm/resnet18.a1_in1k"):
        pathology.check_encoder(PathologySpec(encoder=encoder))
    pathology.check_encoder(PathologySpec())
    pathology.check_encoder(PathologySpec(encoder="virchow", pretrained=False))
    with pytest.raises(pathology.WrongWeights, match="SHA-256 is not 000000000000"):
        pathology.check_encoder(PathologySpec(encoder="uni_v1", weights_sha256="0" * 64))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_weights_is_used_and_recorded(tmp_path: Path, suffix: str) -> None:
    model = timm.create_model("test_efficientnet", pretrained=False, num_classes=7)
    path = tmp_path / f"mine{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    else:
        save_file(model.state_dict(), path)
    spec = PathologySpec(encoder="test_efficientnet", weights_sha256=digest_path(path))
    assert spec.fingerprint() != PathologySpec(encoder="test_efficientnet").fingerprint()
    encoder = pathology.load_tile_encoder(
        spec.model_copy(update={"precision": "fp32"}), weights=path
    )
    model.reset_classifier(0)
    other = network.TileEncoder(
        model, name="x", preprocessing=encoder.preprocessing, precision="fp32"
    )
    np.testing.assert_array_equal(encoder.embed(noise(2)), other.embed(noise(2)))
    with pytest.raises(pathology.WrongWeights, match="SHA-256 is not 000000000000"):
        pathology.load_tile_encoder(
            spec.model_copy(update={"weights_sha256": "0" * 64}), weights=path
        )


def test_weights_that_a_study_names_must_be_given(tmp_path: Path) -> None:
    spec = PathologySpec(weights_sha256="0" * 64)
    with pytest.raises(pathology.MissingWeights, match="needed the file with the SHA-256"):
        pathology.load_tile_encoder(spec)
    with pytest.raises(pathology.MissingWeights, match=r"found no file none\.pth"):
        pathology.load_tile_encoder(spec, weights=tmp_path / "none.pth")


def _tagged(tensors: dict[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{k}": v for prefix in prefixes for k, v in tensors.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: _tagged(x, "backbone."),
        lambda x: _tagged(x, "encoder."),
        lambda x: {"state_dict": _tagged(x, "model."), "epoch": 3},
        lambda x: {"state_dict": {**_tagged(x, "model.backbone."), "head.weight": torch.zeros(3)}},
        lambda x: {"teacher": _tagged(x, "module.backbone."), "student": x},
        lambda x: {"model_state_dict": x, "optimizer_state_dict": {"state": {}}},
    ],
    ids=["backbone", "encoder", "lightning", "with-a-head", "teacher", "model_state_dict"],
)
def test_the_usual_wrappings_of_weights_are_understood(
    tmp_path: Path, wrap: Callable[[dict[str, torch.Tensor]], dict[str, Any]]
) -> None:
    with torch.random.fork_rng():
        model = timm.create_model("test_efficientnet", pretrained=False, num_classes=0)
    wrapped, path = wrap(model.state_dict()), tmp_path / "mine.pth"
    torch.save(wrapped, path)
    other = timm.create_model("test_efficientnet", pretrained=False, num_classes=0)
    load_weights(other, path, name="x")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_teacher_as_dinov2_leaves_it_is_understood(tmp_path: Path) -> None:
    """Blocks in chunks, the heads of training beside the backbone, and the token of masks."""
    options = {"img_size": 28, "embed_dim": 12, "depth": 4, "num_heads": 2}
    model, other = (
        timm.create_model("vit_small_patch14_dinov2", num_classes=0, **options) for _ in range(2)
    )
    chunked = {
        re.sub(r"^blocks\.(\d)", lambda x: f"blocks.{int(x[1]) // 2}.{x[1]}", k): v
        for k, v in model.state_dict().items()
    }
    assert "blocks.1.3.norm1.weight" in chunked
    teacher = {f"backbone.{k}": v for k, v in chunked.items()}
    teacher |= {"backbone.mask_token": torch.zeros(1, 12), "dino_head.mlp.0.bias": torch.ones(2)}
    torch.save({"teacher": teacher}, tmp_path / "teacher_checkpoint.pth")
    load_weights(other, tmp_path / "teacher_checkpoint.pth", name="x")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_of_two_networks_in_one_file_none_is_guessed(tmp_path: Path) -> None:
    tensors = timm.create_model("test_efficientnet", pretrained=False, num_classes=0).state_dict()
    model = timm.create_model("test_efficientnet", pretrained=False, num_classes=0)
    torch.save(_tagged(tensors, "encoder_q.", "encoder_k."), tmp_path / "moco.pth")
    with pytest.raises(pathology.WrongWeights, match=r"found 2 networks .*encoder_k., encoder_q."):
        load_weights(model, tmp_path / "moco.pth", name="x")
    save_file(tensors, tmp_path / "renamed.bin")  # known by what is in it, not by its suffix
    load_weights(model, tmp_path / "renamed.bin", name="x")
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(pathology.WrongWeights, match=r"found no tensors in empty\.pth"):
        load_weights(model, tmp_path / "empty.pth", name="x")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    model = timm.create_model("test_efficientnet", pretrained=False, num_classes=0)
    tensors = model.state_dict()
    name = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "short.safetensors")
    with pytest.raises(pathology.WrongWeights, match=rf"1 tensors .*{name}"):
        pathology.load_tile_encoder(TINY, weights=tmp_path / "short.safetensors")


def test_weights_that_are_no_numbers_are_refused_before_any_slide(tmp_path: Path) -> None:
    tensors = timm.create_model("test_efficientnet", pretrained=False, num_classes=0).state_dict()
    tensors["conv_stem.weight"][0, 0, 0, 0] = torch.nan
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(pathology.WrongWeights, match=r"NaN or infinity in conv_stem\.weight"):
        pathology.load_tile_encoder(TINY, weights=tmp_path / "x.safetensors")


def test_a_compiled_network_is_refused_in_nothing_but_a_sentence(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:  # as torch.jit.save writes one
        archive.writestr("x/constants.pkl", b"\x80\x02).")
        archive.writestr("x/data.pkl", b"\x80\x02).")
        archive.writestr("x/version", b"3\n")
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # a warning would end as one, and be caught with the rest
        with pytest.raises(pathology.WrongWeights, match="does not read as tensors"):
            pathology.load_tile_encoder(TINY, weights=tmp_path / "x.pt")
    assert not recwarn.list


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (sys.exit, (3,))


def test_code_in_a_file_of_weights_is_not_run(tmp_path: Path) -> None:
    torch.save({"weight": _Evil()}, tmp_path / "evil.pth")
    (tmp_path / "noise.safetensors").write_bytes(b"no tensors here")
    for path in tmp_path.iterdir():
        with pytest.raises(pathology.WrongWeights, match="does not read as tensors"):
            pathology.load_tile_encoder(TINY, weights=path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("vit", {}),
        ("dino", {"init_values": 1.0}),
        # A grid of 7 x 7 positions, brought to 4 x 4.
        ("swiglu", {"init_values": 1.0, "swiglu": True, "mlp_ratio": 2.66667 * 2}),
    ],
)
def test_vision_transformers_of_the_other_library_give_the_same(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    golden = load_file(GOLDEN)
    changes = dict(options)
    if changes.pop("swiglu", False):
        changes |= {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    model = timm.create_model(
        "vit_small_patch16_224", pretrained=False, num_classes=0, img_size=32, patch_size=8,
        embed_dim=12, depth=2, num_heads=2, global_pool="", **changes,
    ).eval()  # fmt: skip
    mine = {k.removeprefix(f"{kind}/"): v for k, v in golden.items() if k.startswith(f"{kind}/")}
    save_file(mine, tmp_path / "x.safetensors")
    load_weights(model, tmp_path / "x.safetensors", name=kind, form="transformers")
    with torch.inference_mode():
        found = model(golden["images"])
        np.testing.assert_allclose(found, golden[f"{kind}:tokens"], rtol=1e-3, atol=1e-4)
        both = architectures.ClassToken(model, with_mean=True)(golden["images"])
    np.testing.assert_allclose(both[:, :12], found[:, 0])
    np.testing.assert_allclose(both[:, 12:], found[:, 1:].mean(1))


def test_a_compiler_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(pathology.MissingCompiler, match=r"consilium\[openvino\]"):
        pathology.load_tile_encoder(TINY, compiler="openvino")


def test_openvino_gives_what_torch_gives(tiny: TileEncoder) -> None:
    compiled = pathology.load_tile_encoder(TINY, compiler="openvino")
    np.testing.assert_allclose(compiled.embed(noise(5)), tiny.embed(noise(5)), atol=1e-3)


def test_openvino_tells_nobody_of_its_use(tiny: TileEncoder) -> None:
    pathology.load_tile_encoder(TINY, compiler="openvino")
    assert (
        sys.modules["openvino.tools.ovc.telemetry_utils"].tm
        is sys.modules["openvino.tools.ovc.telemetry_stub"]
    )


@pytest.mark.slow
def test_inductor_gives_what_torch_gives(tiny: TileEncoder) -> None:
    compiled = pathology.load_tile_encoder(TINY, compiler="inductor")
    np.testing.assert_allclose(compiled.embed(noise(5)), tiny.embed(noise(5)), atol=1e-3)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_processor_gives(default: TileEncoder) -> None:
    spec = PathologySpec(precision="fp32")
    for device in network.devices():
        other = pathology.load_tile_encoder(spec, device=device)
        assert other.device.type == "cuda"
        np.testing.assert_allclose(other.embed(noise(5)), default.embed(noise(5)), atol=1e-2)
