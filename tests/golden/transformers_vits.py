"""Made once with transformers 5.24.0: three small vision transformers and what they give.

Usage: python tests/golden/transformers_vits.py, where transformers is installed.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel, ViTConfig, ViTModel

_SIZE = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


def models() -> dict[str, PreTrainedModel]:
    plain = ViTConfig(**_SIZE, image_size=32, intermediate_size=48)
    dino = Dinov2Config(**_SIZE, image_size=32, mlp_ratio=4)
    swiglu = Dinov2Config(**_SIZE, image_size=56, mlp_ratio=4, use_swiglu_ffn=True)
    return {
        "vit": ViTModel(plain, add_pooling_layer=False),
        "dino": Dinov2Model(dino),
        "swiglu": Dinov2Model(swiglu),
    }


def main() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    golden = {"images": images}
    for name, model in models().items():
        generator = torch.Generator().manual_seed(1)
        for tensor in model.parameters():
            start = 0.5 if tensor.ndim == 1 else 0.0
            tensor.data = start + 0.3 * torch.randn(tensor.shape, generator=generator)
        with TemporaryDirectory() as folder, torch.no_grad():
            tokens = model.eval()(pixel_values=images).last_hidden_state
            model.save_pretrained(folder)
            saved = load_file(Path(folder) / "model.safetensors")
        golden |= {f"{name}/{key}": value.contiguous() for key, value in saved.items()}
        golden[f"{name}:tokens"] = tokens.contiguous()
    save_file(golden, Path(__file__).with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
