"""What a network gets to see of a tile, what is taken of what it gives, and in which precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from modalities import pathology
from modalities.pathology import PathologySpec, architectures, network
from modalities.pathology.architectures import ClassToken, Preprocessing
from modalities.pathology.encoder_names import known_encoder

TINY = PathologySpec(encoder="test_efficientnet", pretrained=False, precision="fp32")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def noise(n: int, side_px: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (n, side_px, side_px, 3), dtype=np.uint8)


def encoder_of(model: torch.nn.Module, **wanted: Any) -> network.TileEncoder:
    usual = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "input_px": 32}
    precision = wanted.pop("precision", "fp32")
    return network.TileEncoder(
        model, name="x", preprocessing=Preprocessing(**usual | wanted), precision=precision
    )


def test_channels_are_normalised_as_timm_says() -> None:
    """Each channel differs from the others here, which it does not for the default encoder."""
    pixels = noise(3, 160)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet", pretrained=False, num_classes=0).eval()
    transform = timm.data.create_transform(
        input_size=160, mean=IMAGENET[0], std=IMAGENET[1], crop_pct=1.0, is_training=False
    )
    images = torch.stack([transform(Image.fromarray(tile)) for tile in pixels])
    with torch.inference_mode():
        expected = model(images).numpy()
    np.testing.assert_allclose(
        pathology.load_tile_encoder(TINY).embed(pixels), expected, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("uni_v1", Preprocessing(*IMAGENET, 224, None, "bilinear")),
        ("gigapath", Preprocessing(*IMAGENET, 224, 256, "bicubic")),
        (
            "hoptimus1",
            Preprocessing(
                (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517), 224, None, "bicubic"
            ),
        ),
    ],
)
def test_known_encoders_get_what_their_authors_gave_them(name: str, wanted: Preprocessing) -> None:
    known = known_encoder(name)
    assert known is not None
    assert architectures.preprocessing(known) == wanted


@pytest.mark.parametrize("how", ["bicubic", "bilinear"])
def test_a_tile_of_another_size_is_brought_to_it_as_pillow_does(how: str) -> None:
    tiles = noise(2, 80)
    found = encoder_of(torch.nn.Flatten(), interpolation=how).embed(tiles)
    kind = Image.Resampling[how.upper()]
    for tile, row in zip(tiles, found, strict=True):
        expected = np.asarray(Image.fromarray(tile).resize((32, 32), kind), dtype=np.float64)
        shown = 255 * row.reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.abs(shown - expected).max() < 2.0  # Pillow rounds between the axes


def test_register_tokens_are_no_patches() -> None:
    model = timm.create_model(
        "vit_small_patch16_224", pretrained=False, num_classes=0, img_size=32, patch_size=8,
        embed_dim=12, depth=1, num_heads=2, global_pool="", reg_tokens=4,
    ).eval()  # fmt: skip
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        tokens, both = model(images), ClassToken(model, with_mean=True)(images)
    assert tokens.shape == (2, 1 + 4 + 16, 12)
    np.testing.assert_allclose(both[:, :12], tokens[:, 0])
    np.testing.assert_allclose(both[:, 12:], tokens[:, -16:].mean(dim=1), atol=1e-6)


class Rough(torch.nn.Module):
    """Turns the embedding of the last tile by an angle, in lower precision only."""

    def __init__(self, cosine: float) -> None:
        super().__init__()
        self.probe = torch.nn.Linear(1, 1)
        self.cosine = cosine

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.tensor([[1.0, 0.0]]).repeat(len(images), 1)
        if self.probe(torch.zeros(1, 1)).dtype == torch.bfloat16:
            features[-1] = torch.tensor([self.cosine, (1 - self.cosine**2) ** 0.5])
        return features


@pytest.mark.parametrize(("cosine", "settled"), [(0.9992, "bf16"), (0.9985, "fp32")])
def test_lower_precision_is_kept_only_where_every_tile_of_the_first_batch_agrees(
    monkeypatch: pytest.MonkeyPatch, cosine: float, settled: str
) -> None:
    monkeypatch.setattr(network, "_faster_precision", lambda device: "bf16")
    encoder = encoder_of(Rough(cosine), precision="auto")
    found = encoder.embed(noise(16, 32))
    assert encoder.precision == settled
    assert found[-1, 0] == pytest.approx(cosine if settled == "bf16" else 1.0, abs=1e-6)
    np.testing.assert_array_equal(encoder.embed(noise(16, 32)), found)
