"""Structures are known in Hugging Face's definitions of models, as often as they occur there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import nn

from lrp_compiler import compile_for_lrp

TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "use_cache": False,
}


def language_model(family: str, attention: str = "sdpa", head: str = "ForCausalLM", **config: Any) -> nn.Module:
    made = getattr(transformers, f"{family}Config")(attn_implementation=attention, pad_token_id=0, **config)
    return getattr(transformers, f"{family}{head}")(made)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "llama": (
        lambda: language_model("Llama", **TEXT),
        {"rms_norm": 5, "gated_mlp": 2, "rotary": 4, "grouped_heads": 2},
    ),
    "llama_eager": (
        lambda: language_model("Llama", "eager", **TEXT),
        {"rms_norm": 5, "gated_mlp": 2, "rotary": 4, "grouped_heads": 2},
    ),
    "qwen3_with_norms_of_queries_and_keys": (
        lambda: language_model("Qwen3", **TEXT),
        {"rms_norm": 9, "gated_mlp": 2, "rotary": 4, "grouped_heads": 2},
    ),
    "gemma2_with_caps": (
        lambda: language_model("Gemma2", "eager", **TEXT),
        {"rms_norm": 9, "gated_mlp": 2, "rotary": 4, "grouped_heads": 2, "softcap": 3},
    ),
    "gpt_neox_in_part": (
        lambda: language_model("GPTNeoX", **{k: v for k, v in TEXT.items() if k not in ("num_key_value_heads",)}),
        {"rotary": 4},
    ),
    "gptj_pairs": (
        lambda: language_model(
            "GPTJ", "eager", vocab_size=50, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, use_cache=False
        ),
        {"rotary": 4, "gelu_tanh": 2},
    ),
    "bloom": (
        lambda: language_model("Bloom", "eager", vocab_size=50, hidden_size=32, n_layer=2, n_head=4, use_cache=False),
        {"position_bias": 2, "gelu_tanh": 2},
    ),
    "modernbert_pooled": (
        lambda: language_model(
            "ModernBert",
            head="ForSequenceClassification",
            classifier_pooling="mean",
            **{k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim", "use_cache")},
        ),
        {"masked_mean": 1, "gated_mlp": 2, "rotary": 4},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_structures_of_language_models(name: str) -> None:
    build, expected = MODELS[name]
    model = build().eval()
    with torch.no_grad():
        report = compile_for_lrp(model, "attnlrp").report(input_ids=torch.randint(1, 50, (2, 5)))
    assert report.patterns == expected


def test_structures_of_a_relative_encoder_decoder() -> None:
    """Learned biases reach every self-attention of both stacks, and none reaches attention to the encoder's output."""
    case = zoo.build("t5")
    with torch.no_grad():
        report = compile_for_lrp(case.model, "attnlrp").report(*case.args, **case.kwargs)
    assert report.patterns == {"rms_norm": 12, "gated_mlp": 4, "gelu_tanh": 4, "position_bias": 4}


def test_structures_of_a_windowed_vision_transformer() -> None:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    with torch.no_grad():
        model = transformers.SwinForImageClassification(config).eval()
        report = compile_for_lrp(model, "attnlrp").report(torch.randn(1, 3, 16, 16))
    assert report.patterns == {"position_bias": 2}
