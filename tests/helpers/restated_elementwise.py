"""Gated MLPs, softmax, rotary embeddings and pointwise chains restated: autograd and plain loops in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "identity": lambda x: x,
}


def gated_mlp_bwd(c: Tensor, gate: Tensor, up: Tensor, activation: str, share: float) -> tuple[Tensor, Tensor]:
    """R_gate = R_up = share R with R = c h (AttnLRP, prop. 3.3), f by the identity rule; coefficients are R / value.

    Where a value is zero the limit is taken: f(x) / x tends to f'(0).
    """
    f = ACTIVATIONS[activation]
    relevance = share * c * f(gate) * up
    slope = f(torch.full_like(gate, 1e-9)) / 1e-9
    far = torch.where(gate == 0, 1, gate)
    at_zero = slope * (activation != "relu")
    over_gate = torch.where(gate == 0, share * c * up * at_zero, share * c * (f(far) / far) * up)
    return over_gate, torch.where(up == 0, share * c * f(gate), relevance / torch.where(up == 0, 1, up))


def softmax_bwd(c: Tensor, s: Tensor, residual: Tensor | None) -> Tensor:
    """Row by row (diag(s) - s s^T) c (AttnLRP, appendix A.3.1), the sum exactly rounded; nan in s is no weight."""
    made = torch.zeros(c.shape, dtype=torch.float64)
    for place in itertools.product(*map(range, c.shape[:-1])):
        weights = torch.where(s[place].isnan(), 0, s[place])
        on_diagonal = weights * c[place]
        made[place] = on_diagonal - weights * math.fsum(on_diagonal.tolist())
    return made if residual is None else made + residual


def rope_bwd(c: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Per token the matrix of x -> x cos + rotated(x) sin, transposed, times c (RoFormer, eq. 34)."""
    batch, heads, tokens, _ = c.shape
    turned = cos.shape[-1]
    angles = [one.expand(batch, heads, tokens, turned) for one in (cos, sin)]
    rotated = torch.zeros(turned, turned, dtype=torch.float64)
    for pair in range(turned // 2):
        one, other = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + turned // 2)
        rotated[one, other], rotated[other, one] = -1, 1
    made = c.clone()
    for place in itertools.product(range(batch), range(heads), range(tokens)):
        matrix = torch.diag(angles[0][place]) + angles[1][place][:, None] * rotated
        made[place][:turned] = (matrix.T * c[place][:turned]).sum(-1)
    return made


RESTATED_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "gated_mlp_bwd": gated_mlp_bwd,
    "softmax_bwd": softmax_bwd,
    "rope_bwd": rope_bwd,
}
