"""The reference's formulas for sign-split and terminal rules: every product written out (RULES.md 1.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lrp_compiler.passes.linear_map import LinearMap, linear_map
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.rules.base import Rule
from lrp_compiler.passes.rules.signsplit import AlphaBeta, Gamma, ZPlus
from lrp_compiler.passes.rules.terminal import TERMINAL_EPSILON, Flat, WSquare, ZBox

Values = dict[fx.Node, Any]
Relevances = dict[Operand, Tensor]


def maybe(node: fx.Node | None, values: dict[fx.Node, Any]) -> Tensor | None:
    """The value of an argument that may be left out."""
    return None if node is None else values[node]


def quotient(relevance: Tensor, z: Tensor) -> Tensor:
    """R / z, nothing where z is zero; a complex z is a pair of real numbers, and its R holds that of either."""
    if z.is_complex():
        return torch.complex(quotient(relevance.real, z.real), quotient(relevance.imag, z.imag))
    return torch.where(z == 0, 0, relevance / torch.where(z == 0, 1, z))


def times(value: Tensor, share: Tensor) -> Tensor:
    """R = a c, of a complex number for either of its parts."""
    if value.is_complex():
        return torch.complex(value.real * share.real, value.imag * share.imag)
    return value * share


class _Linear:
    """An op's input, weight and bias as numbers, and products with parts of them."""

    def __init__(self, op: Operation, values: Values) -> None:
        self.map: LinearMap = linear_map(op)
        args, kwargs = fx.map_arg((op.args, op.kwargs), lambda node: values[node])
        self.operands = [list(args), dict(kwargs)]
        fold = [values[part] if isinstance(part, fx.Node) else part for part in op.fold()]
        self.x, self.weight, self.bias = self.map.parts(self.operands, fold)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.map(self.operands, x, weight)

    def back(self, x: Tensor, weight: Tensor, ratio: Tensor) -> Tensor:
        """x * W^T ratio."""
        return x * self.map.transpose(self.operands, x, weight, ratio)


def _stabilised(z: Tensor, epsilon: float) -> Tensor:
    return z + epsilon * torch.where(z >= 0, 1.0, -1.0)


def alpha_beta(rule: Rule, op: Operation, outputs: list[Tensor], values: Values) -> Relevances:
    """alpha (x+ W+ and x- W-) / (their sum + b+) minus beta (x+ W- and x- W+) / (their sum + b-)."""
    assert isinstance(rule, (AlphaBeta, ZPlus))
    alpha, beta = (rule.alpha, rule.beta) if isinstance(rule, AlphaBeta) else (1.0, 0.0)
    lin = _Linear(op, values)
    up, down = lin.x.clamp(min=0), lin.x.clamp(max=0)
    raising, lowering = lin.weight.clamp(min=0), lin.weight.clamp(max=0)
    found = torch.zeros_like(lin.x)
    sides = ((alpha, raising, lowering, lin.bias.clamp(min=0)), (-beta, lowering, raising, lin.bias.clamp(max=0)))
    for factor, of_up, of_down, bias in sides:
        part = lin.forward(up, of_up) + lin.forward(down, of_down)
        ratio = factor * outputs[0] / _stabilised(part + bias, rule.epsilon)
        found = found + lin.back(up, of_up, ratio) + lin.back(down, of_down, ratio)
    return {op.flowing_factors[0]: found}


def gamma(rule: Rule, op: Operation, outputs: list[Tensor], values: Values) -> Relevances:
    """Terms of the sign of z count 1 + gamma times, the others once."""
    assert isinstance(rule, Gamma)
    lin, z = _Linear(op, values), values[op.node]
    up, down = lin.x.clamp(min=0), lin.x.clamp(max=0)
    raising, lowering = lin.weight.clamp(min=0), lin.weight.clamp(max=0)
    found = torch.zeros_like(lin.x)
    for positive in (True, False):
        of_up, of_down = (raising, lowering) if positive else (lowering, raising)
        bias = lin.bias.clamp(min=0) if positive else lin.bias.clamp(max=0)
        terms = [(up, lin.weight + rule.gamma * of_up), (down, lin.weight + rule.gamma * of_down)]
        total = sum((lin.forward(x, w) for x, w in terms), lin.bias + rule.gamma * bias)
        here = z > 0 if positive else z < 0
        ratio = torch.where(here, outputs[0] / _stabilised(total, rule.epsilon), 0)
        found = found + sum((lin.back(x, w, ratio) for x, w in terms), torch.zeros_like(lin.x))
    return {op.flowing_factors[0]: found}


def terminal(rule: Rule, op: Operation, outputs: list[Tensor], values: Values) -> Relevances:
    """Flat, w^2 and z-box as their papers state them."""
    lin = _Linear(op, values)
    ones = torch.ones_like(lin.x)
    if isinstance(rule, ZBox):
        low, high = (
            ones * (ones.new_tensor(b).view([-1] + [1] * (ones.dim() - 2)) if isinstance(b, tuple) else b)
            for b in (rule.low, rule.high)
        )
        raising, lowering = lin.weight.clamp(min=0), lin.weight.clamp(max=0)
        z = lin.forward(lin.x, lin.weight) - lin.forward(low, raising) - lin.forward(high, lowering)
        ratio = outputs[0] / _stabilised(z, TERMINAL_EPSILON)
        found = lin.back(lin.x, lin.weight, ratio) - lin.back(low, raising, ratio) - lin.back(high, lowering, ratio)
    else:
        flat = isinstance(rule, Flat)
        weight = torch.ones_like(lin.weight) if flat else lin.weight.square()
        offset = 0 * lin.bias if flat else lin.bias.square()
        ratio = outputs[0] / _stabilised(lin.forward(ones, weight) + offset, TERMINAL_EPSILON)
        found = lin.back(ones, weight, ratio)
    return {op.flowing_factors[0]: found}


LINEAR_FORMULAS: dict[type[Rule], Any] = {
    AlphaBeta: alpha_beta,
    ZPlus: alpha_beta,
    Gamma: gamma,
    Flat: terminal,
    WSquare: terminal,
    ZBox: terminal,
}
"""Rule -> its formula in relevance space."""
