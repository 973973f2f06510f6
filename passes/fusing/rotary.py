"""Rotary embeddings: the transpose of x cos + rotate_half(x) sin, which rules spell in nine ops, in one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lrp_compiler.kernels.dialect.rope import ROPE_BWD
from lrp_compiler.kernels.spec import NotSupportedError
from lrp_compiler.passes.fusing.replacement import Replacement
from lrp_compiler.passes.kernel_use import KernelUse
from lrp_compiler.passes.program import Program, facts, tensor_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Term:
    """sign * c * table, of which the part from ``start`` to ``stop`` of the last dimension stands at ``at`` onwards."""

    c: fx.Node
    table: fx.Node
    sign: int = 1
    start: int = 0
    stop: int = 0
    at: int = 0
    nodes: frozenset[fx.Node] = frozenset()


def fuse_rotary(program: Program) -> list[KernelUse]:
    """Put rope_bwd in the place of every sum that rotates coefficients back."""
    uses = []
    for node in list(program.graph.nodes):
        found = _rotation(node) if node.target is aten.add.Tensor and facts(node).part == "relevance" else None
        if found is not None:
            origin = facts(node).origin
            try:
                uses.append(KernelUse(origin, "rotary", found.apply(program)))
            except NotSupportedError as refused:
                uses.append(KernelUse(origin, "rotary", (), str(refused)))
    return uses


def rope_form(c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of x cos + cat(-x_high, x_low) sin."""
    made: Tensor = ROPE_BWD(c, cos, sin, False)
    return made


def _rotation(total: fx.Node) -> Replacement | None:
    """The sum of c cos and of the halves of c sin, swapped back, one with its sign changed."""
    sums, addends = _addends(total)
    terms = [_term(addend) for addend in addends]
    if len(terms) != 3 or None in terms:
        return None
    whole = [term for term in terms if term is not None and not term.stop]
    parts = sorted((term for term in terms if term is not None and term.stop), key=lambda term: term.start)
    if len(whole) != 1 or len(parts) != 2:
        return None
    (straight,), (low, high) = whole, parts
    size = tensor_of(total).shape[-1]
    half = low.stop
    expected = ((0, half, half, -1), (half, size, 0, 1))
    found = tuple((part.start, part.stop, part.at, part.sign) for part in (low, high))
    same = low.c is high.c is straight.c and low.table is high.table and 2 * half == size
    if not same or found != expected:
        return None
    inside = frozenset(sums).union(low.nodes, high.nodes, straight.nodes)
    if any(user not in inside for node in inside - {total} for user in node.users):
        return None
    return Replacement(rope_form, (straight.c, straight.table, low.table), (total,), inside)


def _addends(total: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The additions that make up a sum, and what they add."""
    sums, addends, waiting = [total], [], [*total.args]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node):
            return sums, []
        if node.target is aten.add.Tensor and not node.kwargs and len(node.users) == 1:
            sums.append(node)
            waiting += node.args
        else:
            addends.append(node)
    return sums, addends


def _term(node: fx.Node) -> Term | None:
    """What an addend is, read from the outside in; None for anything else."""
    nodes, sign, at, part = {node}, 1, 0, None
    arguments: tuple[Any, ...] = node.args
    if node.target is aten.slice_backward.default:
        inner, shape, dim, at, *_ = arguments
        if dim != len(shape) - 1:
            return None
        node, sign = _negated(inner, nodes)
        part = _slice(node)
        if part is None:
            return None
        nodes.add(node)
        node = part[0]
    if node.target is not aten.mul.Tensor or not all(isinstance(factor, fx.Node) for factor in node.args):
        return None
    nodes.add(node)
    c, table = node.all_input_nodes if len(node.all_input_nodes) == 2 else (node, node)
    start, stop = part[1:] if part is not None else (0, 0)
    return Term(c, table, sign, start, stop, at, frozenset(nodes))


def _negated(node: fx.Node, nodes: set[fx.Node]) -> tuple[fx.Node, int]:
    if node.target is not aten.neg.default:
        return node, 1
    nodes.add(node)
    return node.all_input_nodes[0], -1


def _slice(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(value, start, stop) of a slice of the last dimension."""
    if node.target is not aten.slice.Tensor:
        return None
    arguments: tuple[Any, ...] = node.args
    value, dim, start, stop = arguments[:4]
    size = tensor_of(value).shape[-1]
    if dim not in (-1, tensor_of(value).dim() - 1) or arguments[4:] not in ((), (1,)):
        return None
    return value, start or 0, min(stop, size)
