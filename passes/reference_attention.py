"""Attention in relevance space: its products, mask and softmax one by one, for the reference interpreter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.reference_linear import maybe, quotient
from lrp_compiler.passes.rules.attention import Attention, AttentionValueOnly
from lrp_compiler.passes.rules.base import Rule

Relevances = dict[Operand, Tensor]


def attention(rule: Rule, op: Operation, outputs: list[Tensor], values: dict[fx.Node, Any]) -> Relevances:
    """The chain product, mask, softmax, product, each by its own rule in relevance space."""
    operands = {operand.argument: operand for operand in rule.receivers(op)}
    query, key, value = (values[argument] for argument in op.args[:3])
    shared_heads = key.dim() > 3 and key.shape[-3] != query.shape[-3]
    group = query.shape[-3] // key.shape[-3] if shared_heads else 1
    key_full, value_full = (t.repeat_interleave(group, -3) if shared_heads else t for t in (key, value))
    scale = op.kwargs.get("scale") or 1 / math.sqrt(query.shape[-1])
    scores = scale * query @ key_full.mT
    masked = scores + _mask(op, scores, values)
    weights = torch.nan_to_num(torch.softmax(masked, -1))
    result = weights @ value_full
    ratio = quotient(outputs[0], result)
    on_scores = isinstance(rule, Attention) and not isinstance(rule, AttentionValueOnly)
    scored = [side for side in (0, 1) if side in operands]
    split = 2 if 2 in operands and scored and on_scores else 1
    found: Relevances = {}
    if 2 in operands:
        found[operands[2]] = _ungroup(value_full * (weights.mT @ (ratio / split)), group)
    if scored and on_scores:
        r_weights = weights * ((ratio / split) @ value_full.mT)
        share = r_weights - weights * r_weights.sum(-1, keepdim=True)
        r_masked = torch.where(torch.isinf(masked), 0, masked * share)
        r_scores = torch.where(torch.isinf(masked), 0, scores * quotient(r_masked, masked))
        each = scale * quotient(r_scores, scores) / len(scored)
        if 0 in operands:
            found[operands[0]] = query * (each @ key_full)
        if 1 in operands:
            found[operands[1]] = _ungroup(key_full * (each.mT @ query), group)
    return found


def _ungroup(relevance: Tensor, group: int) -> Tensor:
    """Sum over the query heads that share one key or value head."""
    if group == 1:
        return relevance
    return relevance.reshape(*relevance.shape[:-3], -1, group, *relevance.shape[-2:]).sum(-3)


def _mask(op: Operation, scores: Tensor, values: dict[fx.Node, Any]) -> Tensor:
    flash = op_name(op.node) == "aten::_scaled_dot_product_flash_attention_for_cpu"
    mask = maybe(op.kwargs.get("attn_mask") if flash else op.argument(3, "attn_mask"), values)
    is_causal = op.argument(4 if flash else 5, "is_causal", False)
    added = torch.zeros_like(scores)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        added = added.masked_fill(future, -math.inf)
    if mask is not None:
        added = added.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else added + mask
    return added
