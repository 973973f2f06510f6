"""Attention restated: an explicit softmax over all columns of one head, and torch's own derivative of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _weights_of_head(
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    logit: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """(L, S): one row after the other; the softcap's quotient is a constant, as under AttnLRP's identity rule."""
    rows = []
    for i in range(query.shape[0]):
        x = scale * (key @ query[i])
        if softcap:
            capped = softcap * torch.tanh(x / softcap)
            x = x * torch.where(x == 0, 1.0, capped / x).detach()
        seen = [j for j in range(key.shape[0]) if not (is_causal and j > i) and not (window and j <= i - window)]
        if bias.dtype == torch.bool:
            seen = [j for j in seen if bias[i, j]]
            added = torch.zeros(len(seen), dtype=x.dtype)
        else:
            added = bias[i, seen]
        logits = x[seen] + added
        row = torch.zeros_like(x)
        if len(seen) and float(logits.detach().max()) > -torch.inf:
            columns = logits if logit is None else torch.cat([logits, logit.reshape(1)])
            top = columns.detach().max()
            parts = torch.exp(columns - top)
            row = row.index_put((torch.tensor(seen),), parts[: len(seen)] / parts.sum())
        rows.append(row)
    return torch.stack(rows) if rows else query @ key.T


def _heads(query: Tensor, key: Tensor, bias: Tensor | None) -> Any:
    """(batch, query head, key head, bias of that head) one by one."""
    batch, heads, length = query.shape[:3]
    none = torch.zeros(length, key.shape[2], dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            all_biases = None if bias is None else torch.broadcast_to(bias, (batch, heads, length, key.shape[2]))
            yield b, h, h * key.shape[1] // heads, none if all_biases is None else all_biases[b, h]


def attention_lrp_bwd(
    c: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    logsumexp: Tensor | None,
    bias: Tensor | None,
    sink: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int,
    softcap: float,
    query_share: float,
    key_share: float,
    value_share: float,
) -> tuple[Tensor, ...]:
    """Shares times autograd's gradient of every head's softmax(...) V (Achtibat et al. 2024, section 3.3)."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (query, key, value)]
    shares = (query_share, key_share, value_share)
    total = sum((leaf.sum() * 0 for leaf in leaves), torch.zeros((), dtype=query.dtype))
    for b, h, shared, added in _heads(query, key, bias):
        q, k, v = leaves[0][b, h], leaves[1][b, shared], leaves[2][b, shared]
        logit = None if sink is None else sink[h]
        weights = _weights_of_head(q, k, added, logit, is_causal, scale, window, softcap)
        total = total + (c[b, h] * (weights @ v)).sum()
    gradients = torch.autograd.grad(total, leaves)
    return tuple(
        share * gradient if share else gradient.new_zeros(0) for share, gradient in zip(shares, gradients, strict=True)
    )


def attention_lrp_map(
    c: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor | None,
    bias: Tensor | None,
    sink: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int,
    softcap: float,
    share: float,
) -> Tensor:
    """Element by element share * P_ij * sum_d c_id V_jd: what each weight adds to the relevance of its row."""
    made = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.float64)
    for b, h, shared, added in _heads(query, key, bias):
        logit = None if sink is None else sink[h]
        weights = _weights_of_head(query[b, h], key[b, shared], added, logit, is_causal, scale, window, softcap)
        for i in range(query.shape[2]):
            for j in range(key.shape[2]):
                made[b, h, i, j] = share * weights[i, j] * (c[b, h, i] * value[b, shared, j]).sum()
    return made


def attention_lrp_heads(c: Tensor, out: Tensor, share: float) -> Tensor:
    """The contraction of each row with its activations: R = sum_d a_d c_d."""
    return share * torch.einsum("bhld,bhld->bhl", c, out)


RESTATED_ATTENTION: dict[str, Callable[..., Any]] = {
    "attention_lrp_bwd": attention_lrp_bwd,
    "attention_lrp_map": attention_lrp_map,
    "attention_lrp_heads": attention_lrp_heads,
}
