"""attention_lrp_bwd: coefficients through softmax(Q K^T) V, shares of its gradient at Q, K and V, in O(S) memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lrp_compiler.kernels import gates
from lrp_compiler.kernels.attention import repeat_heads, shared_heads
from lrp_compiler.kernels.dialect.attention_samples import backward_refused, backward_samples, backward_workloads
from lrp_compiler.kernels.spec import FLOATS, KernelSpec, Refusal, Supported, all_supported, known_dtypes, same_device

LARGEST_HEAD = 256
"""Elements of a head, of a query or a value, that one program holds."""

Triple = tuple[Tensor, Tensor, Tensor]


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
) -> Triple:
    """Each share times the gradient of softmax(cap(scale Q K^T) + bias) V at (Q, K, V): RULES.md 4.

    ``query`` (B, H, L, E), ``key`` (B, Hk, S, E), ``value`` (B, Hk, S, Ev) with Hk dividing H, ``c`` and ``out``
    (B, H, L, Ev), all of one dtype. ``logsumexp`` (B, H, L), float32, of all columns that the softmax has, and ``out``
    are computed anew where they are None. ``bias`` broadcasts to (B, H, L, S): added to the scores, or, where it is
    boolean, True for what is attended to. ``sink`` (H,) is the logit of one more column, without a value. ``window``
    0 or the keys that a query sees: those j > i - window, and j <= i where ``is_causal``. ``softcap`` 0 or the c of
    cap(x) = c tanh(x / c), through which coefficients go by the identity rule: times cap(x) / x. Rows whose every score
    is -inf attend to nothing and carry nothing; the least number of a dtype is a number like any other.

    Results have the shapes of Q, K and V, their dimensions in the same order of memory, without gaps; one whose share
    is 0 is not computed and has shape (0,). AttnLRP is (1/4, 1/4, 1/2), CP-LRP (0, 0, 1).
    """
    weights, gate = attention_map(query, key, bias, sink, is_causal, scale, window, softcap)
    to_query, to_key, to_value = (query.new_empty(0) for _ in range(3))
    if value_share:
        to_value = in_order(shared_heads(weights.mT @ c, value) * value_share, value)
    if query_share or key_share:
        on_weights = c @ repeat_heads(value, query).mT
        c_scores = weights * (on_weights - (weights * on_weights).sum(-1, keepdim=True)) * scale
        c_scores = c_scores if gate is None else c_scores * gate
        if query_share:
            to_query = in_order((c_scores @ repeat_heads(key, query)) * query_share, query)
        if key_share:
            to_key = in_order(shared_heads(c_scores.mT @ query, key) * key_share, key)
    return to_query, to_key, to_value


def attention_map(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    sink: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor | None]:
    """(P, the gate of softcap or None), both (B, H, L, S), dense; the softmax in float32 at least."""
    scores = (query @ repeat_heads(key, query).mT) * scale
    gate = gates.softcap(scores, softcap) if softcap else None
    scores = scores if gate is None else scores * gate
    masked = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        masked = masked.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else masked + bias.to(masked.dtype)
    masked = masked.masked_fill(~_visible(masked, is_causal, window), -torch.inf)
    # A row that attends to nothing would have nan for a softmax, and for its derivative too.
    nothing = (masked == -torch.inf).all(-1, keepdim=True)
    columns = masked.masked_fill(nothing, 0)
    if sink is not None:
        logit = sink.to(masked.dtype).view(1, -1, 1, 1).expand(*masked.shape[:3], 1)
        columns = torch.cat([columns, logit], -1)
    weights = torch.softmax(columns, -1)[..., : key.shape[2]]
    return weights.masked_fill(nothing, 0).to(query.dtype), gate


def _visible(scores: Tensor, is_causal: bool, window: int) -> Tensor:
    """(L, S), True where the causal mask and the window let a query see a key."""
    rows = torch.arange(scores.shape[-2], device=scores.device).unsqueeze(-1)
    columns = torch.arange(scores.shape[-1], device=scores.device)
    seen = columns <= rows if is_causal else (columns >= 0).expand(scores.shape[-2:])
    return seen & (rows - window < columns) if window else seen


def memory_order(value: Tensor) -> list[int]:
    """The dimensions of ``value``, the one of the largest steps first."""
    steps = value.stride()
    return sorted(range(value.dim()), key=lambda dim: -steps[dim])


def empty_in_order(like: Tensor) -> Tensor:
    """A new tensor without gaps, its dimensions laid out in memory as those of ``like``."""
    order = memory_order(like)
    made = torch.empty([like.shape[dim] for dim in order], dtype=like.dtype, device=like.device)
    return made.permute([order.index(dim) for dim in range(like.dim())])


def in_order(made: Tensor, like: Tensor) -> Tensor:
    """``made`` laid out as ``empty_in_order(like)``."""
    order = memory_order(like)
    return made.permute(order).contiguous().permute([order.index(dim) for dim in range(like.dim())])


def empty_results(query: Tensor, key: Tensor, value: Tensor, shares: tuple[float, float, float]) -> Triple:
    """Memory for the results."""
    operands = zip((query, key, value), shares, strict=True)
    first, second, third = (empty_in_order(like) if share else like.new_empty(0) for like, share in operands)
    return first, second, third


def _fake(c: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Triple:
    return empty_results(query, key, value, rest[-3:])


def stock_attention_bwd(
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
) -> Triple | None:
    """What ``attention_lrp_bwd`` gives from torch's fused backward and three scalings; None where torch has none.

    The other candidate for a call, to be chosen by measurement. Torch's ops know no sink, softcap or window; a bias is
    not left to them, since a row under it may attend to nothing. Causal attention must be square.
    """
    masked = bias is not None or sink is not None or bool(window) or bool(softcap)
    fused = _fused_backward(query, key, value)
    if masked or fused is None or (is_causal and query.shape[2] != key.shape[2]) or 0 in (*query.shape, *key.shape):
        return None
    operands = [operand if operand.stride(-1) == 1 else operand.contiguous() for operand in (c, query, key, value)]
    gradients = fused(*operands, out, logsumexp, is_causal, scale)
    made = [
        in_order(gradient.mul_(share), like) if share else like.new_empty(0)
        for gradient, share, like in zip(
            gradients, (query_share, key_share, value_share), (query, key, value), strict=True
        )
    ]
    return made[0], made[1], made[2]


def _fused_backward(query: Tensor, key: Tensor, value: Tensor) -> Callable[..., Sequence[Tensor]] | None:
    """Torch's fused backward for these operands, with the arguments of ``_flash_on_cpu``."""
    width, value_width = query.shape[3], value.shape[3]
    if query.device.type == "cpu":
        return _flash_on_cpu if width == value_width else None
    if query.device.type != "cuda" or width % 8 or value_width % 8 or width > LARGEST_HEAD:
        return None
    if query.dtype in (torch.bfloat16, torch.float16) and width == value_width:
        return _flash
    return _efficient if query.shape[1] == key.shape[1] else None


def _flash_on_cpu(
    c: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    logsumexp: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Sequence[Tensor]:
    aten = torch.ops.aten
    if out is None or logsumexp is None:
        forward = aten._scaled_dot_product_flash_attention_for_cpu
        out, logsumexp = forward(query, key, value, 0.0, is_causal, scale=scale)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    found: Sequence[Tensor] = backward(c, query, key, value, out, logsumexp, 0.0, is_causal, scale=scale)
    return found


def _flash(
    c: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    logsumexp: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Sequence[Tensor]:
    """FlashAttention, which takes 16-bit operands and grouped heads."""
    aten = torch.ops.aten
    if out is None or logsumexp is None:
        forward = aten._scaled_dot_product_flash_attention
        out, logsumexp = forward(query, key, value, 0.0, is_causal, scale=scale)[:2]
    sizes = query.shape[2], key.shape[2]
    seed = torch.zeros(2, dtype=torch.int64, device=query.device)
    rows = logsumexp.contiguous()
    found: Sequence[Tensor] = aten._scaled_dot_product_flash_attention_backward(
        c, query, key, value, out, rows, None, None, *sizes, 0.0, is_causal, seed, seed, scale=scale
    )
    return found


def _efficient(
    c: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    logsumexp: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Sequence[Tensor]:
    """Memory-efficient attention, which takes float32 and widths that differ."""
    aten = torch.ops.aten
    if out is None or logsumexp is None:
        forward = aten._scaled_dot_product_efficient_attention
        out, logsumexp = forward(query, key, value, None, True, 0.0, is_causal, scale=scale)[:2]
    seed = torch.zeros((), dtype=torch.int64, device=query.device)
    # Its own rows come in blocks of 32, infinite past the end.
    rows = torch.nn.functional.pad(logsumexp, (0, -logsumexp.shape[2] % 32), value=torch.inf).contiguous()
    wanted = [True, True, True, False]
    found: Sequence[Tensor] = aten._scaled_dot_product_efficient_attention_backward(
        c, query, key, value, None, out, rows, seed, seed, 0.0, wanted, is_causal, scale=scale
    )
    return found[:3]


def supports_attention(
    c: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    logsumexp: Tensor | None,
    bias: Tensor | None,
    sink: Tensor | None,
) -> Supported:
    """What all kernels of attention ask of their operands."""
    widest = max(query.shape[3], value.shape[3])
    heads, key_heads = query.shape[1], key.shape[1]
    added = bias is None or bias.dtype in (torch.bool, torch.float32, query.dtype)
    return all_supported(
        (
            same_device(c, query, key, value, out, logsumexp, bias, sink),
            known_dtypes(c, query, key, value, out),
            widest <= LARGEST_HEAD or Refusal(f"a head of {widest} elements: at most {LARGEST_HEAD} fit"),
            heads % max(key_heads, 1) == 0 or Refusal(f"{heads} query heads for {key_heads} heads of keys"),
            logsumexp is None or logsumexp.dtype == torch.float32 or Refusal(f"log-sum-exp of {logsumexp.dtype}"),
            added or Refusal(f"a bias of {bias.dtype if bias is not None else bias} on scores of {query.dtype}"),
            sink is None or sink.dtype in FLOATS or Refusal(f"a sink of {sink.dtype}"),
        )
    )


def _supports(*arguments: Any) -> Supported:
    return supports_attention(*arguments[:8])


def visible_pairs(length: int, key_length: int, is_causal: bool, window: int) -> int:
    """How many (query, key) pairs the causal mask and the window leave."""
    total = 0
    for row in range(length):
        last = min(row, key_length - 1) if is_causal else key_length - 1
        first = max(row - window + 1, 0) if window else 0
        total += max(last - first + 1, 0)
    return total


def _flops(c: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> int:
    """Of the products needed: Q K^T once, and of the others those that the shares ask for."""
    is_causal, window = rest[4], rest[6]
    query_share, key_share, value_share = rest[-3:]
    width, value_width = query.shape[3], value.shape[3]
    # Q K^T and, for Q or K, c V^T; then one product each.
    per_pair = width + value_width * bool(query_share or key_share)
    per_pair += width * bool(query_share) + width * bool(key_share) + value_width * bool(value_share)
    pairs = visible_pairs(query.shape[2], key.shape[2], is_causal, window)
    return 2 * query.shape[0] * query.shape[1] * pairs * per_pair


ATTENTION_LRP_BWD = KernelSpec(
    name="attention_lrp_bwd",
    summary="shares of the gradient of softmax(Q K^T) V at Q, K and V, without the attention map in memory",
    source="Achtibat et al. 2024 (AttnLRP), Ali et al. 2022 (CP-LRP); Dao 2023, algorithm 2; RULES.md 4",
    reference=attention_lrp_bwd,
    fake=_fake,
    supports=_supports,
    samples=backward_samples,
    refused=backward_refused,
    workloads=backward_workloads,
    flops=_flops,
    unread=(4, 5),
    bound="compute",
    stock=stock_attention_bwd,
)
