"""What is known of each encoder against a table that was written from other tools' sources.

TRIDENT's and LazySlide's loaders, slide2vec's, and the authors' own: a wrong mean, crop or pooling
gives embeddings that look right and are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from timm.layers import GluMlp

from modalities.pathology import PathologySpec, architectures
from modalities.pathology.encoder_names import KNOWN_ENCODERS, known_encoder

if TYPE_CHECKING:
    from timm.models import VisionTransformer

# name, length, what the embedding is, patch, depth, heads, registers, gated unit, normalisation,
# how a tile is brought to what is seen, recommended tile, licence, handed out on request
TRANSFORMERS = """
uni_v1         1024 cls      16 24 16 0 no  imagenet  bilinear:224     256 CC-BY-NC-ND-4.0 yes
uni_v2         1536 cls      14 24 24 8 yes imagenet  bilinear:224     256 CC-BY-NC-ND-4.0 yes
virchow        2560 cls+mean 14 32 16 0 yes imagenet  bicubic:224      224 Apache-2.0 yes
virchow2       2560 cls+mean 14 32 16 4 yes imagenet  bicubic:224      224 CC-BY-NC-ND-4.0 yes
virchow2-cls   1280 cls      14 32 16 4 yes imagenet  bicubic:224      224 CC-BY-NC-ND-4.0 yes
gigapath       1536 cls      16 40 24 0 yes imagenet  bicubic:256:224  256 Apache-2.0 yes
gigapath-flash 384  cls      16 12 6  0 yes imagenet  bicubic:256:224  256 Apache-2.0 yes
hoptimus0      1536 cls      14 40 24 4 yes bioptimus bicubic:224      224 Apache-2.0 yes
hoptimus1      1536 cls      14 40 24 4 yes bioptimus bicubic:224      224 CC-BY-NC-ND-4.0 yes
h0-mini        768  cls      14 12 12 4 yes bioptimus bicubic:224      224 CC-BY-NC-ND-4.0 yes
h0-mini-mean   1536 cls+mean 14 12 12 4 yes bioptimus bicubic:224      224 CC-BY-NC-ND-4.0 yes
phikon         768  cls      16 12 12 0 no  imagenet  bilinear:224     224 Owkin no
phikon_v2      1024 cls      16 24 16 0 no  imagenet  bilinear:224     224 Owkin no
midnight12k    1536 cls      14 40 24 0 yes half      bilinear:224     224 MIT no
midnight       3072 cls+mean 14 40 24 0 yes half      bilinear:224     224 MIT no
openmidnight   1536 cls      14 40 24 4 yes imagenet  bilinear:224     224 Apache-2.0 yes
gpfm           1024 cls      14 24 16 0 no  imagenet  bicubic:224      224 CC-BY-NC-ND-4.0 no
digepath       1024 cls      16 24 16 0 no  imagenet  bilinear:224     256 CC-BY-NC-4.0 yes
kaiko-vits8    384  cls      8  12 6  0 no  half      bilinear:224     256 Kaiko no
kaiko-vits16   384  cls      16 12 6  0 no  half      bilinear:224     256 Kaiko no
kaiko-vitb8    768  cls      8  12 12 0 no  half      bilinear:224     256 Kaiko no
kaiko-vitb16   768  cls      16 12 12 0 no  half      bilinear:224     256 Kaiko no
kaiko-vitl14   1024 cls      14 24 16 4 no  half      bilinear:224     256 Kaiko no
lunit-vits8    384  cls      8  12 6  0 no  lunit     bicubic:224      224 Lunit no
lunit-vits16   384  cls      16 12 6  0 no  lunit     bicubic:224      224 Lunit no
"""
NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "bioptimus": ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)),
    "lunit": ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464)),
    "hibou": ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816)),
    "genbio": ((0.697, 0.575, 0.728), (0.188, 0.240, 0.187)),
}
# name, length, normalisation, what is seen, recommended tile, micrometres per pixel
ELSEWHERE = """
conch_v1 512 openai 448 512 0.5
conch_v15 768 imagenet 448 512 0.5
musk 1024 half 384 384 0.5
ctranspath 768 imagenet 224 256 1.0
hibou_l 1024 hibou 224 224 0.5
hibou_b 768 hibou 224 224 0.5
keep 768 imagenet 224 256 0.5
genbio-pathfm 4608 genbio 224 224 0.5
phaet 1024 imagenet 224 224 0.5
mascaret 1536 half 224 224 0.5
"""
RESNETS = "resnet50 lunit-bt lunit-mocov2 lunit-swav"


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().splitlines()]


def test_the_tables_are_of_every_encoder() -> None:
    listed = [row[0] for row in rows(TRANSFORMERS) + rows(ELSEWHERE)] + RESNETS.split()
    assert sorted(listed) == sorted(row.name for row in KNOWN_ENCODERS)


@pytest.mark.parametrize("row", rows(TRANSFORMERS), ids=lambda row: row[0])
def test_a_vision_transformer_is_what_its_authors_published(row: list[str]) -> None:
    name, dim, embedding, patch, depth, heads, registers, gated_unit, *_ = row
    known = known_encoder(name)
    assert known is not None
    with torch.device("meta"):
        model = architectures.pooled(architectures.bare_network(known).eval(), known)
        inner: VisionTransformer = getattr(model, "model", model)
        tokens = inner.forward_features(torch.zeros(1, 3, known.input_px, known.input_px))
    width = int(dim) // (2 if embedding == "cls+mean" else 1)
    n_patches = (224 // int(patch)) ** 2
    assert tokens.shape == (1, 1 + int(registers) + n_patches, width)
    assert inner.patch_embed.patch_size == (int(patch), int(patch))
    assert (len(inner.blocks), inner.blocks[0].attn.num_heads) == (int(depth), int(heads))
    assert isinstance(inner.blocks[0].mlp, GluMlp) == (gated_unit == "yes")
    # The last layer's normalisation is of all tokens, never of a mean alone.
    assert isinstance(inner.norm, torch.nn.LayerNorm)
    assert isinstance(inner.fc_norm, torch.nn.Identity)
    if isinstance(model, architectures.ClassToken):
        assert inner.global_pool == ""
        assert model.with_mean == (embedding == "cls+mean")
        assert model.n_prefix == 1 + int(registers)  # registers are no part of the mean
    else:
        assert (inner.global_pool, embedding) == ("token", "cls")


@pytest.mark.parametrize("row", rows(TRANSFORMERS), ids=lambda row: row[0])
def test_a_tile_is_brought_to_it_as_its_authors_do(row: list[str]) -> None:
    normalisation, resize, tile_px, licence, gated = row[-5:]
    known = known_encoder(row[0])
    assert known is not None
    wanted = architectures.preprocessing(known)
    assert (wanted.mean, wanted.std) == NORMALISATIONS[normalisation]
    interpolation, *sides = resize.split(":")
    assert wanted.interpolation == interpolation
    assert [wanted.resize_px or wanted.input_px, wanted.input_px] == [int(sides[0]), int(sides[-1])]
    assert (known.tile_px, known.mpp, known.dim) == (int(tile_px), 0.5, int(row[1]))
    assert known.licence.startswith(licence)
    assert known.gated == (gated == "yes")


@pytest.mark.parametrize("row", rows(ELSEWHERE), ids=lambda row: row[0])
def test_what_is_told_of_encoders_that_run_elsewhere(row: list[str]) -> None:
    name, dim, normalisation, input_px, tile_px, mpp = row
    known = known_encoder(name)
    assert known is not None
    assert known.needs
    assert known.normalisation == NORMALISATIONS[normalisation]
    assert (known.dim, known.input_px, known.tile_px) == (int(dim), int(input_px), int(tile_px))
    assert known.mpp == float(mpp)


def test_the_resnets_give_means_of_their_maps() -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for name in ("resnet50", "lunit-swav"):
        spec = PathologySpec(encoder=name, pretrained=False)
        model, wanted = architectures.network_of(spec, None)
        with torch.inference_mode():
            maps = images
            stages = ["conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3"]
            for stage in [*stages, *([] if name == "resnet50" else ["layer4"])]:
                maps = getattr(model, stage)(maps)
            torch.testing.assert_close(model(images), maps.mean(dim=(2, 3)))
        assert maps.shape[1] == (1024 if name == "resnet50" else 2048)
        expected = "imagenet" if name == "resnet50" else "lunit"
        assert (wanted.mean, wanted.std) == NORMALISATIONS[expected]


def test_the_mean_is_of_patch_tokens_and_nothing_else() -> None:
    class Tokens(torch.nn.Module):
        num_prefix_tokens = 5

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            values = torch.tensor([7.0, 1e6, 1e6, 1e6, 1e6, 1.0, 2.0, 3.0])
            return values[None, :, None].expand(len(images), -1, 2)

    found = architectures.ClassToken(Tokens(), with_mean=True)(torch.zeros(1, 3, 8, 8))
    assert found.tolist() == [[7.0, 7.0, 2.0, 2.0]]
