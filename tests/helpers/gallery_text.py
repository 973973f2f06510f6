"""Language models of the gallery: Hugging Face definitions from tiny configs, random weights."""

from __future__ import annotations

import torch
import transformers
from gallery import Call, Entry
from torch import Tensor

from lrp_compiler import Token

VOCABULARY = 99


def ids(batch: int = 2, tokens: int = 7) -> Tensor:
    return torch.randint(5, VOCABULARY - 5, (batch, tokens))


def padding(tokens: Tensor) -> Tensor:
    """An attention mask that pads the end of the last sample."""
    mask = torch.ones_like(tokens)
    mask[-1, -2:] = 0
    return mask


def gpt2() -> Call:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1
    )
    tokens = ids()
    return Call(transformers.GPT2LMHeadModel(config), (), {"input_ids": tokens, "attention_mask": padding(tokens)})


ENTRIES = {"gpt2": Entry(gpt2, Token(4, 7), ("input_ids",), mask="attention_mask")}
