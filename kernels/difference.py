"""Differences from a reference run: multipliers c with (y - y0) = sum of (x - x0) * c, exact op by op (DeepLIFT).

Shrikumar et al. 2017 for the rescale rule; Captum's cross maxima for pooling; README.md derives the products,
quotients, norms and softmax.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lrp_compiler.kernels.attention import additive_mask, attention_scores, repeat_heads
from lrp_compiler.kernels.gates import smooth_ratio
from lrp_compiler.kernels.linear import relevance_of

SMALL = 1e-10
"""Captum's smallest difference that is divided by; below it the derivative takes the quotient's place."""


def difference(value: Tensor, reference: Tensor) -> Tensor:
    """a - a0, zero where both are the same infinity (a masked score)."""
    return torch.where(value == reference, 0, value - reference)


def midpoint(value: Tensor, reference: Tensor) -> Tensor:
    """(a + a0) / 2."""
    return (value + reference) / 2


def quotient(numerator: Tensor, denominator: Tensor, limit: Tensor) -> Tensor:
    """numerator / denominator, ``limit`` where the denominator is too small to divide by."""
    # <= rather than <: in float16 SMALL is zero.
    small = denominator.abs() <= SMALL
    return torch.where(small, limit, numerator / torch.where(small, 1, denominator))


def rescaled(c: Tensor, gradient: Tensor, x: Tensor, x0: Tensor, y: Tensor, y0: Tensor) -> Tensor:
    """c (y - y0) / (x - x0) elementwise; ``gradient``, c f'(x), where x is x0."""
    return quotient(c * difference(y, y0), difference(x, x0), gradient)


def numerator_share(c: Tensor, a: Tensor, b: Tensor, b0: Tensor) -> Tensor:
    """c_a = c (1/b + 1/b0) / 2 of a / b, summed to a's shape."""
    return (c * (1 / b + 1 / b0) / 2).sum_to_size(a.shape)


def denominator_share(c: Tensor, a: Tensor, a0: Tensor, b: Tensor, b0: Tensor) -> Tensor:
    """c_b = -c (a + a0) / (2 b b0) of a / b, summed to b's shape."""
    return (-c * (a + a0) / (2 * b * b0)).sum_to_size(b.shape)


def normalised(c: Tensor, x: Tensor, x0: Tensor, rstd: Tensor, rstd0: Tensor, dims: list[int], centred: bool) -> Tensor:
    """c_x of y = u rstd, u = x - mean(x) if ``centred`` else x, rstd = (mean(u^2) + eps)^(-1/2) over ``dims``.

    ``rstd`` has size 1 along ``dims``. The product is taken at midpoints and rstd - rstd0 written as its exact multiple
    of mean(u^2) - mean(u0^2), so that nothing is divided by a difference.
    """
    middle = midpoint(x, x0)
    if centred:
        middle = middle - middle.mean(dims, keepdim=True)
    slope = -2 * (rstd * rstd0).square() / (rstd + rstd0)
    made = c * midpoint(rstd, rstd0) + middle * slope * (c * middle).mean(dims, keepdim=True)
    return made - made.mean(dims, keepdim=True) if centred else made


def layer_normalised(
    c: Tensor, weight: Tensor | None, x: Tensor, x0: Tensor, rstd: Tensor, rstd0: Tensor, normalised_dims: int
) -> Tensor:
    """c_x of layer norm over the last ``normalised_dims`` dimensions."""
    weighted = c if weight is None else c * weight
    return normalised(weighted, x, x0, rstd, rstd0, list(range(-normalised_dims, 0)), True).to(x.dtype)


def group_normalised(
    c: Tensor, weight: Tensor | None, x: Tensor, x0: Tensor, rstd: Tensor, rstd0: Tensor, groups: int
) -> Tensor:
    """c_x of group norm; ``x`` (N, C, ...), ``rstd`` (N, groups)."""
    weighted = c if weight is None else c * weight.view([-1 if dim == 1 else 1 for dim in range(x.dim())])
    split = [value.reshape(x.shape[0], groups, -1) for value in (weighted, x, x0)]
    scales = (rstd.unsqueeze(-1), rstd0.unsqueeze(-1))
    return normalised(split[0], split[1], split[2], *scales, [-1], True).reshape(x.shape).to(x.dtype)


def batch_normalised(c: Tensor, weight: Tensor | None, x: Tensor, x0: Tensor, rstd: Tensor, rstd0: Tensor) -> Tensor:
    """c_x of batch norm by the batch's own statistics, which couple its samples; ``rstd`` (C,)."""
    shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
    weighted = c if weight is None else c * weight.view(shape)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    return normalised(weighted, x, x0, rstd.view(shape), rstd0.view(shape), dims, True).to(x.dtype)


def self_normalised(
    c: Tensor, x: Tensor, x0: Tensor, scale: Tensor, scale0: Tensor, dims: list[int], centred: bool, divides: bool
) -> Tensor:
    """c_x of u rstd, u = x - mean(x) if ``centred`` else x; ``scale`` is rstd, or its inverse that ``divides``."""
    rstd, rstd0 = (1 / scale, 1 / scale0) if divides else (scale, scale0)
    return normalised(c, x, x0, rstd, rstd0, dims, centred).to(x.dtype)


def logarithmic_mean(log_p: Tensor, log_p0: Tensor) -> Tensor:
    """(p - p0) / (log p - log p0), p where both are equal; zero where either is."""
    # From the larger of both, so that the exponential cannot overflow.
    step = -difference(log_p, log_p0).abs()
    # Rows that are masked whole have NaN for their logarithms.
    return torch.nan_to_num(torch.maximum(log_p, log_p0).exp() * smooth_ratio(torch.expm1(step), step, 1.0, 0.5))


def log_softmax_weights(x: Tensor, x0: Tensor, dim: list[int]) -> tuple[Tensor, Tensor]:
    """(L, w): the logarithmic means of softmax(x) and softmax(x0) over ``dim``, and w = L / sum(L).

    The means of log p make sum(w (x - x0)) the exact difference of log-sum-exp, since the p sum to one in both runs.
    """
    logs = [value - torch.logsumexp(value, dim, keepdim=True) for value in (x, x0)]
    mean = logarithmic_mean(*logs)
    total = mean.sum(dim, keepdim=True)
    return mean, mean / torch.where(total == 0, 1, total)


def softmax_difference(c: Tensor, x: Tensor, x0: Tensor, dim: int) -> Tensor:
    """c_x = L (c - sum(w c)): softmax's derivative with logarithmic means of both runs in place of probabilities."""
    mean, weights = log_softmax_weights(x.to(c.dtype), x0.to(c.dtype), [dim])
    return (mean * (c - (weights * c).sum(dim, keepdim=True))).to(x.dtype)


def log_softmax_difference(c: Tensor, x: Tensor, x0: Tensor, dim: int) -> Tensor:
    """c_x = c - w sum(c)."""
    _, weights = log_softmax_weights(x.to(c.dtype), x0.to(c.dtype), [dim])
    return (c - weights * c.sum(dim, keepdim=True)).to(x.dtype)


def logsumexp_difference(c: Tensor, x: Tensor, x0: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """c_x = c w."""
    places = sorted(dim % x.dim() for dim in dims)
    for dim in places if not keepdim else []:
        c = c.unsqueeze(dim)
    return c * log_softmax_weights(x, x0, dims)[1]


def normalised_rescale(c: Tensor, gradient: Tensor, x: Tensor, x0: Tensor, y: Tensor, y0: Tensor, dim: int) -> Tensor:
    """Captum's softmax: the rescaled coefficient minus its mean over ``dim`` (Captum's is over the whole batch)."""
    made = rescaled(c, gradient, x, x0, y, y0)
    return made - made.mean(dim, keepdim=True)


def normalised_rescale_residual(c: Tensor, c_x: Tensor, x: Tensor, x0: Tensor, y: Tensor, y0: Tensor) -> Tensor:
    """c (y - y0) - c_x (x - x0): what the mean takes."""
    return c * difference(y, y0) - c_x * difference(x, x0)


def pooled_difference(
    c: Tensor, x: Tensor, x0: Tensor, y: Tensor, y0: Tensor, indices: Tensor, indices0: Tensor, spatial_dims: int
) -> Tensor:
    """c_x of max pooling by Captum's cross maxima: a window's change goes to the winner of the run with the larger one.

    There x - x0 is at least as large as the change and of its sign. Overlapping windows add up; ``indices`` are flat
    over the last ``spatial_dims`` dimensions.
    """
    winners = torch.where(y >= y0, indices, indices0).flatten(-spatial_dims)
    moved = difference(x, x0).flatten(-spatial_dims).gather(-1, winners)
    change = difference(y, y0).flatten(-spatial_dims)
    shares = c.flatten(-spatial_dims) * quotient(change, moved, torch.ones_like(moved))
    flat = c.new_zeros([*x.shape[:-spatial_dims], math.prod(x.shape[-spatial_dims:])])
    return flat.scatter_add(-1, winners, shares).view(x.shape)


def extreme_difference(
    c: Tensor, x: Tensor, x0: Tensor, y: Tensor, y0: Tensor, dims: list[int], keepdim: bool, sign: int
) -> Tensor:
    """c_x of max (``sign`` 1) or min (-1) over ``dims``, all if there are none: as in pooling, one window per row."""
    places = [dim % x.dim() for dim in dims] or list(range(x.dim()))
    last = list(range(x.dim() - len(places), x.dim()))
    if keepdim:
        c, y, y0 = (value.squeeze(places) for value in (c, y, y0))
    rows, rows0 = (value.movedim(places, last).flatten(last[0]) for value in (x, x0))
    winners = torch.where(sign * y >= sign * y0, (sign * rows).argmax(-1), (sign * rows0).argmax(-1)).unsqueeze(-1)
    moved = difference(rows, rows0).gather(-1, winners)
    change = difference(y, y0).unsqueeze(-1)
    shares = c.unsqueeze(-1) * quotient(change, moved, torch.ones_like(moved))
    made = c.new_zeros(rows.shape).scatter(-1, winners, shares)
    return made.view([*rows.shape[:-1], *(x.shape[place] for place in places)]).movedim(last, places)


def larger_shares(
    c: Tensor, a: Tensor, a0: Tensor, b: Tensor, b0: Tensor, y: Tensor, y0: Tensor, sign: int
) -> tuple[Tensor, Tensor]:
    """(c_a, c_b) of the elementwise maximum (``sign`` 1) or minimum (-1) of a and b; ties go to a."""
    first_wins = torch.where(sign * y >= sign * y0, sign * a >= sign * b, sign * a0 >= sign * b0)
    made = []
    for wins, value, reference in ((first_wins, a, a0), (~first_wins, b, b0)):
        moved = difference(value, reference).expand(y.shape)
        share = c * quotient(difference(y, y0), moved, torch.ones_like(moved))
        made.append(torch.where(wins, share, 0).sum_to_size(value.shape))
    return made[0], made[1]


def attention_difference(
    c: Tensor,
    runs: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(c_q, c_k, c_v) of softmax(s Q K^T + M) V as product, softmax and product.

    ``runs`` pairs Q, K and V each with its value in the reference run.
    """
    (query, query0), (key, key0), (value, value0) = runs
    scores = [attention_scores(q, k, scale) for q, k in ((query, key), (query0, key0))]
    masked = [one + additive_mask(one, mask, is_causal) for one in scores]
    weights = [torch.nan_to_num(torch.softmax(one, -1)) for one in masked]
    values = repeat_heads(midpoint(value, value0), query)
    on_scores = softmax_difference(c @ values.transpose(-2, -1), masked[0], masked[1], -1)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    on_query = factor * on_scores @ repeat_heads(midpoint(key, key0), query)
    on_key = factor * on_scores.transpose(-2, -1) @ midpoint(query, query0)
    on_value = midpoint(weights[0], weights[1]).transpose(-2, -1) @ c
    return on_query.sum_to_size(query.shape), _shared(on_key, key), _shared(on_value, value)


def _shared(c: Tensor, value: Tensor) -> Tensor:
    """Sum over the query heads that share one head of ``value``."""
    if c.dim() > 2 and c.shape[-3] != value.shape[-3]:
        c = c.reshape(*c.shape[:-3], value.shape[-3], -1, *c.shape[-2:]).sum(-3)
    return c.sum_to_size(value.shape)


def held_share(c: list[Tensor], values: list[Tensor], references: list[Tensor]) -> Tensor:
    """sum(c (a - a0)) of each value that differs although relevance does not flow to it."""
    parts = zip(c, values, references, strict=True)
    return torch.stack([relevance_of(edge, difference(value, reference)).sum() for edge, value, reference in parts])
