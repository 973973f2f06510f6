"""Decoders of the gallery: language models that predict the next token, Hugging Face definitions from tiny configs."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from gallery import Call, Entry
from torch import Tensor

from lrp_compiler import Token

VOCABULARY = 99
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def ids(batch: int = 2, tokens: int = 6) -> Tensor:
    return torch.randint(5, VOCABULARY - 5, (batch, tokens))


def padding(tokens: Tensor, *, left: bool = False) -> Tensor:
    """An attention mask that pads the end, or the start, of the last sample."""
    mask = torch.ones_like(tokens)
    mask[-1, slice(2) if left else slice(-2, None)] = 0
    return mask


def generator(
    model: type[Any], config: Any, *, left: bool = False, attention: str | None = None, tokens: int = 6
) -> Call:
    """A decoder with a batch of two, the second padded."""
    config._attn_implementation = attention
    batch = ids(tokens=tokens)
    return Call(model(config), (), {"input_ids": batch, "attention_mask": padding(batch, left=left)})


def gpt2() -> Call:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, **SPECIAL)
    return generator(transformers.GPT2LMHeadModel, config)


def modern(**more: Any) -> dict[str, Any]:
    """What the configs of decoders with rotary positions, grouped queries and gated MLPs have in common."""
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
    }
    return {**shared, **SPECIAL, **more}


def llama(attention: str | None = None, *, left: bool = False, layers: int = 2) -> Call:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    config = transformers.LlamaConfig(**modern(rope_parameters=scaling, num_hidden_layers=layers))
    return generator(transformers.LlamaForCausalLM, config, attention=attention, left=left)


def qwen3() -> Call:
    return generator(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**modern()))


LAYERS = ["sliding_attention", "full_attention"]


def gemma3() -> Call:
    config = transformers.Gemma3TextConfig(
        **modern(
            sliding_window=3,
            layer_types=LAYERS,
            query_pre_attn_scalar=4,
            attn_logit_softcapping=20.0,
            final_logit_softcapping=10.0,
        )
    )
    return generator(transformers.Gemma3ForCausalLM, config)


def gemma2() -> Call:
    config = transformers.Gemma2Config(**modern(sliding_window=3, layer_types=LAYERS, query_pre_attn_scalar=4))
    return generator(transformers.Gemma2ForCausalLM, config, attention="eager")


def bloom(*, left: bool = False) -> Call:
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **SPECIAL)
    return generator(transformers.BloomForCausalLM, config, left=left, attention="eager")


def decoder(build: Any) -> Entry:
    return Entry(build, Token(3, 7), ("input_ids",), mask="attention_mask")


def padded_left(build: Any) -> Entry:
    return Entry(functools.partial(build, left=True), Token(-1, 7), ("input_ids",), mask="attention_mask")


ENTRIES = {
    "gpt2": decoder(gpt2),
    "llama": decoder(llama),
    "llama_eager": decoder(functools.partial(llama, "eager", layers=1)),
    "llama_padded_left": padded_left(llama),
    "llama_eager_padded_left": padded_left(functools.partial(llama, "eager", layers=1)),
    "qwen3": decoder(qwen3),
    "gemma3": decoder(gemma3),
    "gemma2": decoder(gemma2),
    "bloom": decoder(bloom),
    "bloom_padded_left": padded_left(bloom),
}
