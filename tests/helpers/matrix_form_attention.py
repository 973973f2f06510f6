"""Attention, fused and spelled out, and its restatement as a chain of rules (AttnLRP and CP-LRP, see matrix_form)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matrix_form import Restatement, Tensors, halved_matmul, softmax_relevance
from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionCase:
    """A call of scaled_dot_product_attention: heads of Q and of K and V, lengths, mask, scale."""

    heads: int = 2
    shared_heads: int = 2
    queries: int = 4
    keys: int = 4
    dim: int = 3
    mask: str = "none"
    scale: float | None = None

    def inputs(self, batch: int = 2) -> Tensors:
        shared = (batch, self.shared_heads, self.keys, self.dim)
        return (
            torch.randn(batch, self.heads, self.queries, self.dim),
            torch.randn(shared),
            torch.randn(shared),
        )

    def mask_tensor(self) -> Tensor | None:
        """A bool or a float mask with every row attending to something."""
        if self.mask == "bool":
            keep = torch.rand(self.queries, self.keys) > 0.4
            keep[:, 0] = True
            return keep
        return torch.randn(self.queries, self.keys) if self.mask == "float" else None

    def added(self, mask: Tensor | None) -> Tensor:
        """The mask as numbers added to the scores."""
        if self.mask == "causal":
            return torch.full((self.queries, self.keys), -torch.inf).triu(1)
        if mask is None:
            return torch.zeros(self.queries, self.keys)
        if mask.dtype == torch.bool:
            return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        return mask

    def factor(self) -> float:
        return 1 / math.sqrt(self.dim) if self.scale is None else self.scale


class FusedAttention(nn.Module):
    """One call of F.scaled_dot_product_attention."""

    def __init__(self, case: AttentionCase, mask: Tensor | None) -> None:
        super().__init__()
        self.case = case
        self.register_buffer("mask", mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        case = self.case
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            self.mask,
            is_causal=case.mask == "causal",
            scale=case.scale,
            enable_gqa=case.heads != case.shared_heads,
        )


class OpenAttention(nn.Module):
    """The same attention spelled out as two products and a softmax."""

    def __init__(self, case: AttentionCase, mask: Tensor | None) -> None:
        super().__init__()
        self.case = case
        self.register_buffer("added", case.added(mask))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = self.case.heads // self.case.shared_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = (q @ k.transpose(-2, -1)) * self.case.factor() + self.added
        return torch.softmax(scores, -1) @ v


def attention_restatement(case: AttentionCase, mask: Tensor | None, value_only: bool = False) -> Restatement:
    """Attention as the chain bmm, scale, mask, softmax, bmm in relevance space.

    AttnLRP: Prop. 3.3 at both products, Prop. 3.1 at the softmax, eq. 8 where a float mask is added. With
    ``value_only`` the attention map is a constant (CP-LRP, AH-rule).
    """
    added = case.added(mask)
    groups = case.heads // case.shared_heads

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        q, k, v = inputs[0], *(x.repeat_interleave(groups, 1) for x in inputs[1:])
        scores = case.factor() * q @ k.mT
        masked = scores + added
        weights = torch.softmax(masked, -1)
        if value_only:
            on_v = v * (weights.mT @ (relevance / (weights @ v)))
            return torch.zeros_like(q), torch.zeros_like(inputs[1]), collected(on_v)
        on_weights, on_v = halved_matmul((weights, v), relevance)
        on_masked = softmax_relevance(masked, on_weights)
        on_scores = torch.where(torch.isneginf(masked), 0, scores * on_masked / masked)
        on_q, on_k = halved_matmul((q, k.mT), on_scores)
        return on_q, collected(on_k.mT), collected(on_v)

    def collected(per_head: Tensor) -> Tensor:
        return per_head.unflatten(1, (case.shared_heads, groups)).sum(2)

    return restatement
