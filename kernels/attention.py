"""Attention O = softmax(s Q K^T + M) V in dense form: what relevance keeps from its rows (RULES.md 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lrp_compiler.kernels.linear import masked_product


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


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """softmax(s Q K^T + M), (..., L, S); rows that attend to nothing are zero."""
    scores = attention_scores(query, key, scale)
    return torch.nan_to_num(torch.softmax(scores + additive_mask(scores, mask, is_causal), -1), 0.0)


def attention_map_relevance(
    c: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    share: float,
) -> Tensor:
    """share * P * (c V^T): the relevance of the attention map P, (..., L, S), its factor of O = P V given ``share``."""
    weights = attention_weights(query, key, mask, is_causal, scale)
    return share * weights * (c @ repeat_heads(value, query).transpose(-2, -1))


def attention_mask_coefficient(
    c: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    is_causal: bool,
    scale: float | None,
    share: float,
) -> Tensor:
    """share * P * (c V^T - sum(P * c V^T)) at the shape of the additive mask M."""
    weights = attention_weights(query, key, mask, is_causal, scale)
    on_weights = c @ repeat_heads(value, query).transpose(-2, -1)
    c_scores = weights * (on_weights - (weights * on_weights).sum(-1, keepdim=True))
    return (share * c_scores).sum_to_size(mask.shape)


def attention_backward(
    c: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor | None,
    logsumexp: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of fused attention at Q, K, V by plain products, which torch can differentiate in turn.

    Arguments and results are those of the fused backward op it stands in for; ``dropout_p`` is always 0 there. What
    fused attention gave is computed anew: to autograd its ``logsumexp`` is a constant.
    """
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    keys, values = repeat_heads(key, query), repeat_heads(value, query)
    scores = attention_scores(query, key, scale)
    masked = scores + additive_mask(scores, attn_mask, is_causal)
    # A row that attends to nothing would have NaN for a softmax, and for its derivative too.
    nothing = (masked == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(masked.masked_fill(nothing, 0), -1).masked_fill(nothing, 0)
    on_weights = c @ values.transpose(-2, -1)
    c_scores = weights * (on_weights - (weights * on_weights).sum(-1, keepdim=True)) * factor
    per_key, per_value = c_scores.transpose(-2, -1) @ query, weights.transpose(-2, -1) @ c
    return c_scores @ keys, shared_heads(per_key, key), shared_heads(per_value, value)


def shared_heads(repeated: Tensor, shared: Tensor) -> Tensor:
    """The transpose of ``repeat_heads``: what arrives at a key or value from all query heads it serves."""
    if repeated.shape == shared.shape:
        return repeated
    heads, *rest = shared.shape[-3:]
    members = repeated.shape[-3] // max(heads, 1)
    return repeated.reshape(*repeated.shape[:-3], heads, members, *rest).sum(-3)


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
    on_mask = masked_product(c_scores, added).sum(-1)
    on_scores = (c_scores * scores).sum(-1)
    softmax = (1 - value_share) * given - score_share * (on_scores + on_mask)
    return softmax, score_share * on_mask
