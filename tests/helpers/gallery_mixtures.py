"""Mixtures of experts, state-space models and adapted models of the gallery."""

from __future__ import annotations

import functools
from dataclasses import replace

import transformers
from gallery import Call
from gallery_text import SPECIAL, VOCABULARY, decoder, generator, modern
from torch import Tensor, nn


def mixtral(experts: str | None = None) -> Call:
    config = transformers.MixtralConfig(**modern(num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2))
    config._experts_implementation = experts
    return generator(transformers.MixtralForCausalLM, config)


def qwen3_moe() -> Call:
    routing = {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "norm_topk_prob": True}
    config = transformers.Qwen3MoeConfig(**modern(**routing, num_hidden_layers=1))
    return generator(transformers.Qwen3MoeForCausalLM, config)


def mamba() -> Call:
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=2, **SPECIAL
    )
    return generator(transformers.MambaForCausalLM, config)


def mamba2() -> Call:
    config = transformers.Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_heads=4,
        head_dim=8,
        state_size=4,
        n_groups=2,
        num_hidden_layers=1,
        chunk_size=4,
        **SPECIAL,
    )
    return generator(transformers.Mamba2ForCausalLM, config)


class LowRank(nn.Module):
    """A frozen linear map plus a trained one of low rank: W x + s B A x (Hu et al. 2021)."""

    def __init__(self, frozen: nn.Linear, rank: int = 2, scaling: float = 2.0) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.a = nn.Linear(frozen.in_features, rank, bias=False)
        self.b = nn.Linear(rank, frozen.out_features, bias=False)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.frozen(x) + self.b(self.a(x)) * self.scaling
        return adapted


def lora() -> Call:
    """A decoder with tied embeddings whose query and value projections are adapted."""
    config = transformers.LlamaConfig(**modern(tie_word_embeddings=True, num_hidden_layers=1))
    call = generator(transformers.LlamaForCausalLM, config)
    for layer in call.model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
        layer.self_attn.v_proj = LowRank(layer.self_attn.v_proj)
    return call


ENTRIES = {
    "mixtral": decoder(mixtral),
    "mixtral_looping": replace(
        decoder(functools.partial(mixtral, "eager")),
        rounding="a loop over the chosen experts cannot be traced; products by groups add up in another order",
    ),
    "mixtral_batched": decoder(functools.partial(mixtral, "batched_mm")),
    "qwen3_moe": decoder(qwen3_moe),
    "mamba": decoder(mamba),
    "mamba2": decoder(mamba2),
    "lora": decoder(lora),
}
