"""Attention O = softmax(s Q K^T + M) V in dense form: what relevance keeps from its rows (RULES.md 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_scores(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """s Q K^T of shape (..., L, S), keys repeated over the query heads they serve."""
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return (query @ repeat_heads(key, query).transpose(-2, -1)) * factor


def repeat_heads(shared: Tensor, query: Tensor) -> Tensor:
    """Keys or values of grouped-query attention, one per query head."""
    if shared.dim() < 3 or shared.shape[-3] == query.shape[-3]:
        return shared
    return shared.repeat_interleave(query.shape[-3] // shared.shape[-3], -3)


def additive_mask(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """The mask as numbers added to ``scores``: -inf where nothing may attend."""
    added = torch.zeros_like(scores)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        added = added.masked_fill(~allowed, -torch.inf)
    if mask is None:
        return added
    return added.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else added + mask


def attention_sinks(
    c: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    value_share: float,
    score_share: float,
) -> tuple[Tensor, Tensor]:
    """What attention does not hand to Q, K and V, per query row (..., L): the softmax residual and the mask's.

    ``value_share`` is V's factor on the gradient, ``score_share`` the sum of Q's and K's. Rows that attend to
    nothing carry nothing.
    """
    scores = attention_scores(query, key, scale)
    added = additive_mask(scores, mask, is_causal)
    masked = scores + added
    weights = torch.nan_to_num(torch.softmax(masked, -1), 0.0)
    values = repeat_heads(value, query)
    given = (c * (weights @ values)).sum(-1)
    c_scores = weights * (c @ values.transpose(-2, -1) - given.unsqueeze(-1))
    # A masked score is -inf times a coefficient of exactly zero.
    on_mask = torch.where(c_scores == 0, 0, c_scores * added).sum(-1)
    on_scores = (c_scores * scores).sum(-1)
    softmax = (1 - value_share) * given - score_share * (on_scores + on_mask)
    return softmax, score_share * on_mask
