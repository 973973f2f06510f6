"""The reference's formulas for recurrent modules, step by step and divided by each output (RULES.md 1.8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.recurrent import has_biases, is_cell
from lrp_compiler.passes.reference_linear import quotient
from lrp_compiler.passes.rules.base import Rule


@dataclass(frozen=True)
class _Weights:
    """Of one direction of one layer; biases are zero where there are none."""

    w: Tensor
    u: Tensor
    w_bias: Tensor
    u_bias: Tensor
    projection: Tensor | None


class _LSTMStep:
    """c = f c_before + i tanh(p), h = projection (o tanh(c))."""

    def __init__(self, weights: _Weights, x: Tensor, before: Tensor, c_before: Tensor) -> None:
        self.weights, self.x, self.before, self.c_before = weights, x, before, c_before
        terms = x @ weights.w.T + before @ weights.u.T + weights.w_bias + weights.u_bias
        on_i, on_f, self.p, on_o = terms.chunk(4, -1)
        self.kept = on_f.sigmoid() * c_before
        self.new = on_i.sigmoid() * self.p.tanh()
        self.c = self.kept + self.new
        self.signal = on_o.sigmoid() * self.c.tanh()
        self.h = self.signal if weights.projection is None else self.signal @ weights.projection.T

    def back(self, r_h: Tensor, r_c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(R_x, R_before, R_c_before): gates get nothing, each sum is shared by its terms."""
        if self.weights.projection is not None:
            r_h = self.signal * (quotient(r_h, self.h) @ self.weights.projection)
        share = quotient(r_c + r_h, self.c)
        ratio = quotient(self.new * share, self.p)
        w, u = (weight.chunk(4)[2] for weight in (self.weights.w, self.weights.u))
        return self.x * (ratio @ w), self.before * (ratio @ u), self.kept * share


class _GRUStep:
    """h = (1 - z) tanh(p) + z before, p = W x + b + r (U before + b')."""

    def __init__(self, weights: _Weights, x: Tensor, before: Tensor, c_before: Tensor) -> None:
        self.weights, self.x, self.before, self.c = weights, x, before, c_before
        given = (x @ weights.w.T + weights.w_bias).chunk(3, -1)
        recurrent = (before @ weights.u.T + weights.u_bias).chunk(3, -1)
        self.r, z = (given[0] + recurrent[0]).sigmoid(), (given[1] + recurrent[1]).sigmoid()
        self.p = given[2] + self.r * recurrent[2]
        self.new, self.kept = (1 - z) * self.p.tanh(), z * before
        self.h = self.new + self.kept

    def back(self, r_h: Tensor, r_c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(R_x, R_before, nothing)."""
        share = quotient(r_h, self.h)
        ratio = quotient(self.new * share, self.p)
        w, u = (weight.chunk(3)[2] for weight in (self.weights.w, self.weights.u))
        return self.x * (ratio @ w), self.kept * share + self.before * ((self.r * ratio) @ u), r_c


class _RNNStep:
    """h = f(p), p = W x + U before + b."""

    def __init__(self, weights: _Weights, x: Tensor, before: Tensor, c_before: Tensor, relu: bool) -> None:
        self.weights, self.x, self.before, self.c = weights, x, before, c_before
        self.p = x @ weights.w.T + before @ weights.u.T + weights.w_bias + weights.u_bias
        self.h = self.p.relu() if relu else self.p.tanh()

    def back(self, r_h: Tensor, r_c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(R_x, R_before, nothing); an output of zero has nothing to hand on."""
        ratio = quotient(torch.where(self.h == 0, 0, r_h), self.p)
        return self.x * (ratio @ self.weights.w), self.before * (ratio @ self.weights.u), r_c


_Step = _LSTMStep | _GRUStep | _RNNStep


def _step(kind: str, weights: _Weights, x: Tensor, before: Tensor, c_before: Tensor) -> _Step:
    if kind == "lstm":
        return _LSTMStep(weights, x, before, c_before)
    if kind == "gru":
        return _GRUStep(weights, x, before, c_before)
    return _RNNStep(weights, x, before, c_before, relu=kind == "rnn_relu")


def _cells(params: list[Tensor], has_biases: bool, count: int) -> list[_Weights]:
    each = len(params) // count
    found = []
    for start in range(0, len(params), each):
        w, u, *rest = params[start : start + each]
        none = w.new_zeros(w.shape[0])
        w_bias, u_bias = rest[:2] if has_biases else (none, none)
        found.append(_Weights(w, u, w_bias, u_bias, rest[-1] if each % 2 else None))
    return found


def _reading(values: list[Any], direction: int) -> list[Any]:
    """``values`` by time as a direction meets them, and back again."""
    return values[::-1] if direction == 1 else values


def _forward(
    kind: str, cells: list[_Weights], directions: int, xs: list[Tensor], h0: Tensor, c0: Tensor
) -> list[list[_Step]]:
    """Per cell its steps by time; ``xs`` are the inputs of the first layer."""
    runs: list[list[_Step]] = []
    for index, weights in enumerate(cells):
        direction = index % directions
        if direction == 0 and index:
            xs = [torch.cat([step.h for step in at], -1) for at in zip(*runs[-directions:], strict=True)]
        steps: list[_Step] = []
        h, c = h0[index], c0[index]
        for x in _reading(xs, direction):
            steps.append(_step(kind, weights, x, h, c))
            h, c = steps[-1].h, steps[-1].c
        runs.append(_reading(steps, direction))
    return runs


def _backward(
    runs: list[list[_Step]], directions: int, rs: list[Tensor], r_hn: Tensor, r_cn: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """(R of the first layer's inputs, of h0 and of c0), for ``rs`` at the outputs by time."""
    ends: list[tuple[Tensor, Tensor]] = []
    for first in reversed(range(0, len(runs), directions)):
        parts = []
        for direction in range(directions):
            index = first + direction
            own = [r.chunk(directions, -1)[direction] for r in rs]
            found, *end = _walk_back(
                _reading(runs[index], direction), _reading(own, direction), r_hn[index], r_cn[index]
            )
            parts.append(_reading(found, direction))
            ends.insert(direction, (end[0], end[1]))
        rs = [sum(at[1:], at[0]) for at in zip(*parts, strict=True)]
    h_ends, c_ends = zip(*ends, strict=True)
    return rs, torch.stack(h_ends), torch.stack(c_ends)


def _walk_back(steps: list[_Step], rs: list[Tensor], r_h: Tensor, r_c: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """(R_x of every step, R_h0, R_c0) of one cell."""
    found = []
    for step, r in zip(reversed(steps), reversed(rs), strict=True):
        r_x, r_h, r_c = step.back(r_h + r, r_c)
        found.append(r_x)
    return found[::-1], r_h, r_c


def recurrent(rule: Rule, op: Operation, outputs: list[Tensor], values: dict[fx.Node, Any]) -> dict[Operand, Tensor]:
    """Arras et al. 2017 through all layers and directions; relevance at output, h_n and c_n arrives together."""
    if is_cell(op):
        return _one_step(rule, op, outputs, values)
    args = fx.map_arg(op.args, lambda node: values[node])
    x, states, params, has_biases, layers, _, _, bidirectional, batch_first = args
    kind = op_name(op.node).removeprefix("aten::")
    h0, c0 = states if kind == "lstm" else (states, torch.zeros_like(states))
    r_cn = outputs[2] if kind == "lstm" else torch.zeros_like(h0)
    time, directions = int(batch_first), 2 if bidirectional else 1
    cells = _cells(list(params), has_biases, layers * directions)
    runs = _forward(kind, cells, directions, list(x.unbind(time)), h0, c0)
    rs, r_h0, r_c0 = _backward(runs, directions, list(outputs[0].unbind(time)), outputs[1], r_cn)
    found = (torch.stack(rs, time), r_h0, r_c0)
    return {operand: found[operand.leaf] for operand in rule.receivers(op)}


def _one_step(rule: Rule, op: Operation, outputs: list[Tensor], values: dict[fx.Node, Any]) -> dict[Operand, Tensor]:
    """The same for an op that makes one step."""
    x, states, *params = fx.map_arg(op.args, lambda node: values[node])
    kind = op_name(op.node).removeprefix("aten::").removesuffix("_cell")
    h, c = states if kind == "lstm" else (states, torch.zeros_like(states))
    (weights,) = _cells([p for p in params if p is not None], has_biases(op), 1)
    r_c = outputs[1] if kind == "lstm" else torch.zeros_like(h)
    found = _step(kind, weights, x, h, c).back(outputs[0], r_c)
    return {operand: found[operand.leaf] for operand in rule.receivers(op)}
