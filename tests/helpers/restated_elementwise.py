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


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SCALARS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "reciprocal": lambda a: 1 / a,
    "abs": abs,
    "sign": lambda a: (a > 0) - (a < 0),
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "rsqrt": lambda a: 1 / math.sqrt(a),
    "tanh": math.tanh,
    "sigmoid": lambda a: (1 + math.tanh(a / 2)) / 2,
    "silu": lambda a: a * (1 + math.tanh(a / 2)) / 2,
    "erf": math.erf,
    "erfc": math.erfc,
    "relu": lambda a: a if a > 0 else 0.0,
    "clamp_min": max,
    "clamp_max": min,
    "minimum": min,
    "maximum": max,
    "threshold_backward": lambda a, b, c: a if b > c else 0.0,
    "where": lambda a, b, c: b if a else c,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "logical_and": lambda a, b: bool(a and b),
    "logical_or": lambda a, b: bool(a or b),
    "logical_not": lambda a: not a,
}
"""Every instruction on Python's own numbers."""


def elementwise_chain(inputs: list[Tensor], program: str) -> list[Tensor]:
    """One element after the other, in Python's numbers, which are float64."""
    spread = torch.broadcast_tensors(*inputs)
    results: dict[int, list[float]] = {}
    for values in zip(*(one.flatten().tolist() for one in spread), strict=True):
        registers = list(values)
        for line, words in enumerate(text.split() for text in program.split("\n")):
            if words and words[0] == "out":
                results.setdefault(line, []).append(registers[int(words[1])])
            elif words and words[0] == "cast":
                registers.append(float(torch.tensor(registers[int(words[1])]).to(DTYPES[words[2]])))
            elif words:
                given = [registers[int(one)] if one.isdigit() else float(one) for one in words[1:]]
                registers.append(SCALARS[words[0]](*given))
    wanted = program.split().count("out")
    made = list(results.values()) or [[]] * wanted
    return [torch.tensor(one, dtype=torch.float64).reshape(spread[0].shape) for one in made]


RESTATED_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "gated_mlp_bwd": gated_mlp_bwd,
    "softmax_bwd": softmax_bwd,
    "rope_bwd": rope_bwd,
    "elementwise_chain": elementwise_chain,
}
