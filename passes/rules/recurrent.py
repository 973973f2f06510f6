"""Recurrent modules as one op: gates stop and the signal takes all, through every time step (RULES.md 1.8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrp_compiler.kernels.linear import masked_product
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.recurrent import carried, has_biases, is_cell, recurrent_edges
from lrp_compiler.passes.rules.base import Edges, Rule, Sinks
from lrp_compiler.passes.site import Site

NAMES = ("input", "h0", "c0")
"""What the leaves of a recurrent op's arguments are, as its sinks are called."""


@dataclass(frozen=True)
class Recurrent(Rule):
    """LSTM, GRU and RNN after Arras et al. 2017: gates are constants, tanh and ReLU follow the identity rule.

    Linear maps inside follow LRP-0, whatever the composite says of linear layers.
    """

    name: ClassVar[str] = "recurrent"

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return tuple(operand for operand in carried(op) if operand in op.flowing)

    def propagate(self, site: Site, edge: Any) -> Edges:
        made = recurrent_edges(site, edge, gradient=False)
        return {operand: made[operand.leaf] for operand in self.receivers(site.op)}

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        """The biases of the candidates, (layers * directions, B, H), and what is constant of input and states."""
        made = recurrent_edges(site, edge, gradient=False)
        found: Sinks = {"bias": made[-1]} if has_biases(site.op) else {}
        for operand in carried(site.op):
            if operand not in edges:
                found[NAMES[operand.leaf]] = site.emit(masked_product, made[operand.leaf], operand.node)
        return found


def recurrent_remainder(given: list[Any], taken: list[Any], batch_first: bool) -> Tensor:
    """c y - c_x x per sample (B,), from pairs (c, value); the sequence comes first in both, the states after it."""
    total = torch.zeros_like(given[0][1].sum((1, 2) if batch_first else (0, 2)))
    for sign, pairs in ((1, given), (-1, taken)):
        for position, (c, value) in enumerate(pairs):
            if c is not None:
                others = (1, 2) if position == 0 and batch_first else (0, 2)
                total = total + sign * (c * value).sum(others)
    return total


def step_remainder(given: list[Any], taken: list[Any]) -> Tensor:
    """c y - c_x x per sample (B,) of one step, from pairs (c, value)."""
    total = torch.zeros_like(given[0][1].sum(-1))
    for sign, pairs in ((1, given), (-1, taken)):
        for c, value in pairs:
            if c is not None:
                total = total + sign * (c * value).sum(-1)
    return total


def recurrent_sinks(site: Site, edge: Any, edges: Edges) -> Sinks:
    """What the derivative of the whole recurrence leaves: sum c (f(x) - J x), as sum c f(x) - sum x J^T c."""
    several = isinstance(edge, list)
    given = [[c, site.output(index)] for index, c in enumerate(edge)] if several else [[edge, site.node]]
    taken = [[edges.get(operand), operand.node] for operand in carried(site.op)]
    if is_cell(site.op):
        return {"gradient": site.emit(step_remainder, given, taken)}
    return {"gradient": site.emit(recurrent_remainder, given, taken, site.op.args[8])}
