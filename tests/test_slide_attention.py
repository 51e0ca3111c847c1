"""A map shows for each tile its own weight, of a network that does not weigh all alike."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from flows.explain import map_of, write_map
from fusion.encoder_spec import EncoderSpec
from fusion.encoders import FittedEncoder, Preparation
from fusion.networks import GatedAttention
from modalities.pathology.bags import Bag, write_bag

if TYPE_CHECKING:
    from pathlib import Path

DIM = 4
SIDE_PX = 512


def looking() -> FittedEncoder:
    """Encoder that was not trained, but looks at some tiles more than at others."""
    spec = EncoderSpec(model="gated_attention", hidden=3)
    generator = torch.Generator().manual_seed(5)
    network = GatedAttention(DIM, spec, generator).eval().requires_grad_(requires_grad=False)
    for weights in network.parameters():
        weights.normal_(std=1.5, generator=generator)
    preparation = Preparation(np.zeros(DIM), np.ones(DIM), np.eye(DIM))
    return FittedEncoder(spec, spec, preparation, (network,), 0.0, 1.0, 40, 20, 10, {})


def published_attention(encoder: FittedEncoder, tiles: np.ndarray) -> np.ndarray:
    """Softmax over tiles of w (tanh(V h) * sigmoid(U h)), by Ilse and others (2018)."""
    (network,) = encoder.networks
    p = {name: values.double().numpy() for name, values in network.state_dict().items()}
    signal = np.tanh(tiles @ p["signal.weight"].T + p["signal.bias"])
    gate = 1 / (1 + np.exp(-(tiles @ p["gate.weight"].T + p["gate.bias"])))
    logits = (signal * gate) @ p["out.weight"][0] + p["out.bias"]
    return np.exp(logits) / np.exp(logits).sum()


def test_each_tile_has_its_own_weight_in_the_file_and_in_the_picture(tmp_path: Path) -> None:
    tiles = np.random.default_rng(2).normal(size=(12, DIM)).astype(np.float32)
    coords = np.array([(x * SIDE_PX, y * SIDE_PX) for y in range(3) for x in range(4)])
    noted = {"patch_size_level0": SIDE_PX, "level0_width": 2048, "level0_height": 1536}
    write_bag(tmp_path / "s.h5", Bag(coords, tiles), coords_attrs=noted, file_attrs={})
    encoder = looking()
    expected = published_attention(encoder, tiles)
    assert expected.max() > 2 * expected.min()
    made = write_map(map_of(encoder, tmp_path / "s.h5", None, modality="m"), tmp_path, "s")
    found = json.loads(made.outlines.read_text())["features"]
    corners = [tile["geometry"]["coordinates"][0][0] for tile in found]
    assert corners == coords.tolist()
    weights = [tile["properties"]["measurements"]["Attention"] for tile in found]
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    with Image.open(made.picture) as picture:
        drawn = np.asarray(picture.convert("L"), dtype=float)
    drawn = drawn[: int(0.9 * len(drawn))]  # without the scale below
    rows, columns = (np.flatnonzero((drawn < 250).mean(axis=1 - at) > 0.5) for at in (0, 1))
    inside = drawn[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    cells = np.asarray(Image.fromarray(inside).resize((12, 9), Image.Resampling.BOX))[1::3, 1::3]
    assert np.corrcoef(cells.ravel(), expected)[0, 1] > 0.95  # lighter is more
