"""Tile encoders by the names that laboratories type, with what is known of each.

The names are those of common slide tools, so that a study can be asked for in the words that its
existing features were made with. Nothing here is imported from torch: listing takes no time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

Pooling = Literal["model", "token", "token+mean", "third_stage"]
Triple = tuple[float, float, float]

_IMAGENET: Final[tuple[Triple, Triple]] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_OPENAI: Final[tuple[Triple, Triple]] = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
_HALF: Final[tuple[Triple, Triple]] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_BIOPTIMUS: Final[tuple[Triple, Triple]] = (
    (0.707223, 0.578729, 0.703617),
    (0.211883, 0.230117, 0.177517),
)
_LUNIT: Final[tuple[Triple, Triple]] = (
    (0.70322989, 0.53606487, 0.66096631),
    (0.21716536, 0.26081574, 0.20723464),
)
_HIBOU: Final[tuple[Triple, Triple]] = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))

_NON_COMMERCIAL: Final = "CC-BY-NC-ND-4.0"
_SAFETENSORS_OR_BIN: Final = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class KnownEncoder:
    """One tile encoder, as its authors published it.

    Parameters
    ----------
    name
        As it is typed and recorded.
    repository
        Where its weights are published, as owner/name on the public model hub.
    dim
        Length of an embedding.
    million_parameters
        Of the network as it is used here, rounded; None where that is not known.
    licence
        Of the weights.
    gated
        Whether its owner hands the weights out on request only.
    architecture, options
        Name of the network in timm, and what its authors changed; empty where timm has none.
    swiglu
        Whether its blocks have a packed SwiGLU in place of the usual two layers.
    pooling
        What of the network's output is the embedding: what the network pools itself, the class
        token, the class token with the mean of the patch tokens, or the mean of a ResNet's third
        stage.
    form
        How tensors are named in the published file: as timm does, or as another library of vision
        transformers does.
    files
        Names of the file of weights, best first.
    normalisation
        Mean and standard deviation of its inputs, per channel from 0 to 1.
    input_px
        Side of what the network sees.
    resize_px
        Side that a tile is brought to, of which the middle ``input_px`` are seen; None takes the
        whole tile.
    interpolation
        How a tile is brought to that side.
    tile_px, mpp
        Tiles that its authors recommend.
    needs
        What is missing here to run it; empty where nothing is.
    aliases
        Other spellings. Case, hyphens, points and underscores never count.
    """

    name: str
    repository: str
    dim: int
    million_parameters: float | None
    licence: str
    gated: bool
    architecture: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    swiglu: bool = False
    pooling: Pooling = "model"
    form: Literal["timm", "transformers"] = "timm"
    files: tuple[str, ...] = _SAFETENSORS_OR_BIN
    normalisation: tuple[Triple, Triple] = _IMAGENET
    input_px: int = 224
    resize_px: int | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    tile_px: int = 224
    mpp: float = 0.5
    needs: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def access(self) -> str:
        """How its weights are had, in a few words."""
        return "on request from its owner" if self.gated else "public"


_VIRCHOW: Final = {"init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "", "img_size": 224,
                   "dynamic_img_size": True}  # fmt: skip
_H_OPTIMUS: Final = {"init_values": 1e-5, "img_size": 224, "global_pool": "token"}
_KAIKO: Final = {"img_size": 224, "dynamic_img_size": True}
_OWN_LIBRARY: Final = "the library transformers, which runs the code that its repository ships"
_NOT_HERE: Final = "the code that its repository ships"
_KAIKO_LICENCE: Final = "Kaiko, non-commercial"
_LUNIT_LICENCE: Final = "Lunit, non-commercial"
_OWKIN_LICENCE: Final = "Owkin, non-commercial"


def _kaiko(name: str, network: str, dim: int, million: float, **more: Any) -> KnownEncoder:
    return KnownEncoder(
        name=name,
        repository=f"1aurent/{network}.kaiko_ai_towards_large_pathology_fms",
        dim=dim,
        million_parameters=million,
        licence=_KAIKO_LICENCE,
        gated=False,
        architecture=network,
        normalisation=_HALF,
        interpolation="bilinear",
        tile_px=256,
        **{"options": _KAIKO} | more,
    )


def _lunit(name: str, network: str, tag: str, *, alias: str) -> KnownEncoder:
    is_resnet = network == "resnet50"
    return KnownEncoder(
        name=name,
        repository=f"1aurent/{network}.{tag}",
        dim=2048 if is_resnet else 384,
        million_parameters=23.5 if is_resnet else 21.7,
        licence=_LUNIT_LICENCE,
        gated=False,
        architecture=network,
        normalisation=_LUNIT,
        aliases=(alias,),
    )


def _virchow2(name: str, pooling: Pooling, dim: int) -> KnownEncoder:
    return KnownEncoder(
        name, "paige-ai/Virchow2", dim, 631.2, _NON_COMMERCIAL, gated=True,
        architecture="vit_huge_patch14_224", options=_VIRCHOW | {"reg_tokens": 4}, swiglu=True,
        pooling=pooling,
    )  # fmt: skip


def _h0_mini(name: str, pooling: Pooling, dim: int) -> KnownEncoder:
    return KnownEncoder(
        name, "bioptimus/H0-mini", dim, 85.7, _NON_COMMERCIAL, gated=True,
        architecture="vit_base_patch14_reg4_dinov2", swiglu=True, pooling=pooling,
        options={"init_values": 1e-5, "mlp_ratio": 5.33334, "global_pool": "", "img_size": 224},
        normalisation=_BIOPTIMUS,
    )  # fmt: skip


def _midnight(name: str, pooling: Pooling, dim: int) -> KnownEncoder:
    return KnownEncoder(
        name, "kaiko-ai/midnight", dim, 1134.8, "MIT", gated=False,
        architecture="vit_giant_patch14_dinov2", options={"img_size": 224, "global_pool": ""},
        pooling=pooling, form="transformers", files=("model.safetensors",), normalisation=_HALF,
        interpolation="bilinear",
    )  # fmt: skip


KNOWN_ENCODERS: Final[tuple[KnownEncoder, ...]] = (
    KnownEncoder(
        "uni_v1", "MahmoodLab/UNI", 1024, 303.4, _NON_COMMERCIAL, gated=True,
        architecture="vit_large_patch16_224",
        options={"init_values": 1e-5, "img_size": 224, "dynamic_img_size": True},
        interpolation="bilinear", tile_px=256, aliases=("uni",),
    ),
    KnownEncoder(
        "uni_v2", "MahmoodLab/UNI2-h", 1536, 681.4, _NON_COMMERCIAL, gated=True,
        architecture="vit_giant_patch14_224", swiglu=True,
        options={
            "img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5,
            "embed_dim": 1536, "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8,
            "dynamic_img_size": True,
        },
        interpolation="bilinear", tile_px=256, aliases=("uni2", "uni2-h"),
    ),
    KnownEncoder(
        "virchow", "paige-ai/Virchow", 2560, 631.2, "Apache-2.0", gated=True,
        architecture="vit_huge_patch14_224", options=_VIRCHOW, swiglu=True, pooling="token+mean",
    ),
    _virchow2("virchow2", "token+mean", 2560),
    _virchow2("virchow2-cls", "token", 1280),
    KnownEncoder(
        "gigapath", "prov-gigapath/prov-gigapath", 1536, 1134.9, "Apache-2.0, with conditions",
        gated=True, architecture="vit_giant_patch14_dinov2", files=("pytorch_model.bin",),
        options={"img_size": 224, "patch_size": 16, "mlp_ratio": 5.33334,
                 "dynamic_img_size": True},
        resize_px=256, tile_px=256, aliases=("prov-gigapath",),
    ),
    KnownEncoder(
        "gigapath-flash", "prov-gigapath/prov-gigapath-flash", 384, 21.7, "Apache-2.0",
        gated=True, architecture="vit_small_patch16_224", swiglu=True, files=("pytorch_model.bin",),
        options={"img_size": 224, "mlp_ratio": 2048 / 384, "init_values": 1e-5,
                 "dynamic_img_size": True},
        resize_px=256, tile_px=256,
    ),
    KnownEncoder(
        "hoptimus0", "bioptimus/H-optimus-0", 1536, 1134.8, "Apache-2.0", gated=True,
        architecture="vit_giant_patch14_reg4_dinov2", options=_H_OPTIMUS,
        normalisation=_BIOPTIMUS, aliases=("h-optimus-0",),
    ),
    KnownEncoder(
        "hoptimus1", "bioptimus/H-optimus-1", 1536, 1134.8, _NON_COMMERCIAL, gated=True,
        architecture="vit_giant_patch14_reg4_dinov2", options=_H_OPTIMUS,
        normalisation=_BIOPTIMUS, aliases=("h-optimus-1",),
    ),
    _h0_mini("h0-mini", "token", 768),
    _h0_mini("h0-mini-mean", "token+mean", 1536),
    KnownEncoder(
        "phikon", "owkin/phikon", 768, 85.8, _OWKIN_LICENCE, gated=False,
        architecture="vit_base_patch16_224", options={"img_size": 224}, form="transformers",
        interpolation="bilinear",
    ),
    KnownEncoder(
        "phikon_v2", "owkin/phikon-v2", 1024, 303.4, _OWKIN_LICENCE, gated=False,
        architecture="vit_large_patch16_224", options={"img_size": 224, "init_values": 1.0},
        form="transformers", interpolation="bilinear",
    ),
    _midnight("midnight12k", "token", 1536),
    _midnight("midnight", "token+mean", 3072),
    KnownEncoder(
        "openmidnight", "SophontAI/OpenMidnight", 1536, 1134.8, "Apache-2.0", gated=True,
        architecture="vit_giant_patch14_reg4_dinov2", files=("teacher_checkpoint_load.pt",),
        options={"img_size": 224, "global_pool": "token"}, interpolation="bilinear",
    ),
    KnownEncoder(
        "gpfm", "majiabo/GPFM", 1024, 303.2, "CC-BY-NC-ND-4.0 (hub: MIT)", gated=False,
        files=("GPFM.pth",),
        architecture="vit_large_patch14_dinov2", options={"img_size": 224, "init_values": 1e-5},
    ),
    KnownEncoder(
        "digepath", "xtxx/Digepath", 1024, 303.4, "CC-BY-NC-4.0", gated=True,
        architecture="vit_large_patch16_224", interpolation="bilinear", tile_px=256,
        options={"init_values": 1e-5, "img_size": 224, "dynamic_img_size": True},
    ),
    _kaiko("kaiko-vits8", "vit_small_patch8_224", 384, 21.7),
    _kaiko("kaiko-vits16", "vit_small_patch16_224", 384, 21.7),
    _kaiko("kaiko-vitb8", "vit_base_patch8_224", 768, 85.8),
    _kaiko("kaiko-vitb16", "vit_base_patch16_224", 768, 85.8),
    _kaiko("kaiko-vitl14", "vit_large_patch14_reg4_dinov2", 1024, 304.4,
           options={"img_size": 518, "dynamic_img_size": True}),
    _lunit("lunit-vits8", "vit_small_patch8_224", "lunit_dino", alias="lunit-dino-s8"),
    _lunit("lunit-vits16", "vit_small_patch16_224", "lunit_dino", alias="lunit-dino-s16"),
    _lunit("lunit-bt", "resnet50", "lunit_bt", alias="lunit-resnet50-bt"),
    _lunit("lunit-mocov2", "resnet50", "lunit_mocov2", alias="lunit-resnet50-mocov2"),
    _lunit("lunit-swav", "resnet50", "lunit_swav", alias="lunit-resnet50-swav"),
    KnownEncoder(
        "resnet50", "timm/resnet50.tv_in1k", 1024, 8.5, "BSD-3-Clause", gated=False,
        architecture="resnet50", pooling="third_stage", interpolation="bilinear", tile_px=256,
    ),
    KnownEncoder(
        "conch_v1", "MahmoodLab/CONCH", 512, None, _NON_COMMERCIAL, gated=True, input_px=448,
        normalisation=_OPENAI,
        tile_px=512, aliases=("conch",), needs="its authors' package conch",
    ),
    KnownEncoder(
        "conch_v15", "MahmoodLab/conchv1_5", 768, None, _NON_COMMERCIAL, gated=True,
        input_px=448, tile_px=512, aliases=("conch_v1.5", "conchv1_5"), needs=_NOT_HERE,
    ),
    KnownEncoder(
        "musk", "xiangjx/musk", 1024, None, _NON_COMMERCIAL, gated=True, input_px=384,
        tile_px=384, normalisation=_HALF, needs="its authors' package musk",
    ),
    KnownEncoder(
        "ctranspath", "", 768, None, "GPL-3.0", gated=False, tile_px=256, mpp=1.0,
        aliases=("ctranspath-chief", "chief"),
        needs="the convolutional stem of its authors, whose licence does not allow it here",
    ),
    KnownEncoder(
        "hibou_l", "histai/hibou-L", 1024, 303.7, "Apache-2.0", gated=True,
        normalisation=_HIBOU, needs=_OWN_LIBRARY,
    ),
    KnownEncoder(
        "hibou_b", "histai/hibou-b", 768, 85.7, "Apache-2.0", gated=True, normalisation=_HIBOU,
        needs=_OWN_LIBRARY,
    ),
    KnownEncoder(
        "keep", "Astaxanthin/KEEP", 768, None, "MIT", gated=False, tile_px=256,
        needs=_OWN_LIBRARY,
    ),
    KnownEncoder(
        "genbio-pathfm", "genbio-ai/genbio-pathfm", 4608, None, "GenBio AI Community",
        gated=False, normalisation=((0.697, 0.575, 0.728), (0.188, 0.240, 0.187)),
        needs=_NOT_HERE,
    ),
    KnownEncoder(
        "phaet", "wearewaiv/phaet", 1024, None, "Waiv, non-commercial", gated=True,
        needs=_OWN_LIBRARY,
    ),
    KnownEncoder(
        "mascaret", "wearewaiv/mascaret", 1536, None, "Waiv, non-commercial", gated=True,
        normalisation=_HALF, needs=_OWN_LIBRARY,
    ),
)  # fmt: skip


def _key(name: str) -> str:
    return re.sub(r"[-_.\s]", "", name.casefold())


_BY_KEY: Final = {
    _key(spelling): row for row in KNOWN_ENCODERS for spelling in (row.name, *row.aliases)
}
# The plain name of a repository would load without what its authors changed in the network.
_BY_REPOSITORY: Final = {
    row.repository.casefold(): row for row in reversed(KNOWN_ENCODERS) if row.repository
}
_HUB: Final = re.compile(r"hf[-_]hub:([\w.-]+/[\w.-]+)")


def known_encoder(name: str) -> KnownEncoder | None:
    """Find an encoder by its name, an alias, or where its weights are published.

    Examples
    --------
    >>> known_encoder("H-optimus-0").name
    'hoptimus0'
    >>> known_encoder("timm:resnet50") is None
    True
    """
    hub = _HUB.fullmatch(name)
    if hub is not None:
        return _BY_REPOSITORY.get(hub[1].casefold())
    return None if ":" in name else _BY_KEY.get(_key(name))


def canonical_name(name: str) -> str:
    """Give the one spelling of an encoder under which it is recorded.

    Examples
    --------
    >>> canonical_name("UNI2"), canonical_name("timm:resnet18"), canonical_name("timm:resnet50")
    ('uni_v2', 'resnet18', 'timm:resnet50')
    """
    known = known_encoder(name)
    if known is not None:
        return known.name
    bare = name.removeprefix("timm:")
    return bare if known_encoder(bare) is None else name
