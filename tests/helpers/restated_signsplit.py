"""Sign-split rules of a linear layer restated: every output's terms one by one, sorted by their signs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NOISE = 16 * 2.0**-23
"""A sum of the terms of one sign below this share of all terms' sizes counts as no such terms."""


def _stabilised(value: float, epsilon: float) -> float:
    return value - epsilon if value < 0 else value + epsilon


def _share(relevance: float, terms: Tensor, sign: int, bias: float, epsilon: float) -> float:
    """R over the terms of one sign and the bias of that sign; nothing without such terms."""
    chosen = float(terms[terms * sign > 0].sum())
    if abs(chosen) <= NOISE * float(terms.abs().sum()):
        return 0.0
    return relevance / _stabilised(chosen + (bias if bias * sign > 0 else 0.0), epsilon)


def _one_output(
    c: float, terms: Tensor, bias: float, z: float, method: str, first: float, second: float, epsilon: float
) -> tuple[float, float]:
    """(ratio, aside) of the output that is the sum of ``terms`` and ``bias``."""
    relevance = c * z
    if method == "z_plus":
        return _share(relevance, terms, 1, bias, epsilon) / 2, 0.0
    if method == "alpha_beta":
        positive, negative = (_share(relevance, terms, sign, bias, epsilon) for sign in (1, -1))
        return first * positive / 2, second * negative / 2
    if z == 0:
        return 0.0, 0.0
    every = torch.cat([terms, torch.tensor([bias], dtype=torch.float64)])
    favoured = every * torch.where(every * z > 0, 1 + first, 1)
    return relevance / _stabilised(float(favoured.sum()), epsilon), float(z < 0)


def signsplit_linear_fwd(
    c: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    method: str,
    first: float,
    second: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Montavon et al. 2019 (gamma, in its form for outputs of either sign), Bach et al. 2015 eq. 60 (alpha-beta)."""
    outputs = weight.shape[0]
    pairs = torch.zeros(*c.shape, 2, dtype=torch.float64)
    rows = x.shape[:-1].numel()
    flat, inputs, cs = pairs.view(rows, outputs, 2), x.reshape(rows, x.shape[-1]), c.reshape(rows, outputs)
    for row in range(rows):
        for out in range(outputs):
            terms = inputs[row] * weight[out]
            b = 0.0 if bias is None else float(bias[out])
            value = float(terms.sum()) + b
            flat[row, out] = torch.tensor(
                _one_output(float(cs[row, out]), terms, b, value, method, first, second, epsilon), dtype=torch.float64
            )
    ratio, aside = pairs.unbind(-1)
    if method == "gamma":
        return ratio, _bytes(aside)
    return ratio, aside if method == "alpha_beta" else torch.zeros(0, dtype=torch.float64)


def _bytes(flags: Tensor) -> Tensor:
    """Eight flags of a row to a byte, the first in the lowest bit."""
    size = flags.shape[-1]
    made = torch.zeros(*flags.shape[:-1], (size + 7) // 8, dtype=torch.float64)
    for place in range(size):
        made[..., place // 8] += flags[..., place] * 2 ** (place % 8)
    return made


def signsplit_linear_bwd(
    ratio: Tensor,
    aside: Tensor,
    x: Tensor,
    weight: Tensor,
    method: str,
    first: float,
    second: float,
    as_relevance: bool,
) -> Tensor:
    """Each input's terms by their sign, each with its output's share of that sign; at x = 0 the mean of both sides."""
    outputs = weight.shape[0]
    rows = x.shape[:-1].numel()
    made = torch.zeros(rows, x.shape[-1], dtype=torch.float64)
    xs, ratios = x.reshape(rows, x.shape[-1]), ratio.reshape(rows, outputs)
    sides = {sign: torch.zeros_like(made) for sign in (1, -1)}
    for out in range(outputs if rows else 0):
        raising, lowering = _gains(ratios[:, out], aside, out, method, first)
        for side, given in sides.items():
            raises = weight[out] * side > 0
            given += torch.where(raises, raising.unsqueeze(1), lowering.unsqueeze(1)) * weight[out]
    made = torch.where(xs > 0, sides[1], torch.where(xs < 0, sides[-1], (sides[1] + sides[-1]) / 2))
    return (made * xs if as_relevance else made).reshape(x.shape)


def _gains(ratio: Tensor, aside: Tensor, out: int, method: str, first: float) -> tuple[Tensor, Tensor]:
    """What terms that raise and that lower an output are multiplied by, per row."""
    if method == "z_plus":
        return 2 * ratio, torch.zeros_like(ratio)
    if method == "alpha_beta":
        return 2 * ratio, -2 * aside.reshape(ratio.shape[0], -1)[:, out]
    negative = (aside.reshape(ratio.shape[0], -1)[:, out // 8].to(torch.int64) >> (out % 8)) % 2 == 1
    favoured, plain = (1 + first) * ratio, ratio
    return torch.where(negative, plain, favoured), torch.where(negative, favoured, plain)


RESTATED_SIGNSPLIT: dict[str, Callable[..., Any]] = {
    "signsplit_linear_fwd": signsplit_linear_fwd,
    "signsplit_linear_bwd": signsplit_linear_bwd,
}
