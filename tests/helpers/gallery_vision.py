"""Vision and vision-language models of the gallery: Hugging Face definitions from tiny configs, random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from gallery import Call, Entry
from torch import Tensor

from lrp_compiler import Token

PATCHED: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
"""A tiny transformer over the 16 patches of an image."""

WORDED: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 8,
    "projection_dim": 16,
    "bos_token_id": 48,
    "eos_token_id": 49,
}
"""A tiny text tower."""


def images(size: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size)


def words() -> Tensor:
    """Token ids that end with the end token."""
    ids = torch.randint(3, 48, (2, 5))
    ids[:, -1] = 49
    return ids


def similarity(output: Any) -> Tensor:
    """How well each image fits the text at its own place in the batch."""
    return output.logits_per_image.diagonal()  # type: ignore[no-any-return]


def pooled(output: Any) -> Tensor:
    """One feature of what the attention of a learned probe has pooled."""
    return output.pooler_output[:, 3]  # type: ignore[no-any-return]


def vit() -> Call:
    config = transformers.ViTConfig(**{**PATCHED, "num_hidden_layers": 2})
    return Call(transformers.ViTForImageClassification(config), (), {"pixel_values": images()})


def resnet() -> Call:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], layer_type="bottleneck", num_labels=4
    )
    return Call(transformers.ResNetForImageClassification(config), (), {"pixel_values": images(32)})


def convnext() -> Call:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, layer_scale_init_value=0.5, patch_size=4, num_labels=4
    )
    return Call(transformers.ConvNextForImageClassification(config), (), {"pixel_values": images()})


def swin() -> Call:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, num_labels=4
    )
    return Call(transformers.SwinForImageClassification(config), (), {"pixel_values": images()})


def clip() -> Call:
    config = transformers.CLIPConfig(
        text_config=WORDED, vision_config={**PATCHED, "projection_dim": 16}, projection_dim=16
    )
    ids = words()
    return Call(transformers.CLIPModel(config), (), {"pixel_values": images(), "input_ids": ids})


def siglip() -> Call:
    """SigLIP-2 at fixed resolution is the architecture of the first SigLIP."""
    config = transformers.SiglipConfig(text_config={**WORDED, "projection_size": 32}, vision_config=PATCHED)
    return Call(transformers.SiglipModel(config), (), {"pixel_values": images(), "input_ids": words()})


def naflex() -> Call:
    """Images of 2 x 4 and 3 x 2 patches, padded to 8."""
    config = transformers.Siglip2VisionConfig(**{**PATCHED, "num_patches": 16})
    shapes = torch.tensor([[2, 4], [3, 2]])
    mask = (torch.arange(8) < shapes.prod(1, keepdim=True)).int()
    kwargs = {"pixel_values": torch.randn(2, 8, 48), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return Call(transformers.Siglip2VisionModel(config), (), kwargs)


def pix2struct() -> Call:
    """Flattened patches lead with their row and column, counted from one; padding is all zeros, and so is its mask."""
    text = {"vocab_size": 50, "hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    vision = {"hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"patch_embed_hidden_size": 12, "seq_len": 16}
    config = transformers.Pix2StructConfig(text_config=text, vision_config=vision)
    mask = torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2])
    places = torch.tensor([[row, column] for row in (1.0, 2.0) for column in (1.0, 2.0, 3.0)]).expand(2, 6, 2)
    patches = torch.cat([places, torch.randn(2, 6, 12)], -1) * mask[..., None]
    ids = torch.randint(3, 48, (2, 4))
    kwargs = {"flattened_patches": patches, "attention_mask": mask, "decoder_input_ids": ids}
    return Call(transformers.Pix2StructForConditionalGeneration(config), (), kwargs)


PAIR = ("pixel_values", "input_ids")

ENTRIES = {
    "vit": Entry(vit, 1, ("pixel_values",)),
    "resnet": Entry(resnet, 1, ("pixel_values",)),
    "convnext": Entry(convnext, 1, ("pixel_values",)),
    "swin": Entry(swin, 1, ("pixel_values",)),
    "clip": Entry(clip, similarity, PAIR),
    "siglip": Entry(siglip, similarity, PAIR),
    "naflex": Entry(naflex, pooled, ("pixel_values",), mask="pixel_attention_mask", tokens="pixel_values"),
    "pix2struct": Entry(
        pix2struct,
        Token(2, 7),
        ("flattened_patches", "decoder_input_ids"),
        mask="attention_mask",
        tokens="flattened_patches",
    ),
}
