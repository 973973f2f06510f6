"""Vision, audio and vision-language models of the gallery."""

from __future__ import annotations

import torch
import transformers
from gallery import Call, Entry


def vit() -> Call:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    return Call(transformers.ViTForImageClassification(config), (), {"pixel_values": torch.randn(2, 3, 16, 16)})


ENTRIES = {"vit": Entry(vit, 1, ("pixel_values",))}
