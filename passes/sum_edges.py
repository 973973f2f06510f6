"""Sums of edges that each fill one row of a value: the rows beside each other, instead of addends of full size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from lrp_compiler.passes.program import first_argument, tensor_of

if TYPE_CHECKING:
    from lrp_compiler.passes.trace import Emitter

aten = torch.ops.aten


def beside_each_other(emitter: Emitter, edges: list[tuple[fx.Node, Any]]) -> list[tuple[fx.Node, Any]]:
    """The edges at one node, (edge, kind), with those that fill single rows made one where they are half of all rows.

    A loop that reads a sequence step by step sends such edges; one by one they cost its length squared.
    """
    groups: dict[tuple[int, Any], list[fx.Node]] = {}
    for edge, kind in edges:
        if edge.target is aten.select_backward.default:
            groups.setdefault((_dimension(edge), kind), []).append(edge)
    made: dict[fx.Node, tuple[fx.Node, Any]] = {}
    gone: set[fx.Node] = set()
    for (dim, kind), rows in groups.items():
        count = tensor_of(rows[0]).shape[dim]
        if isinstance(count, int) and len(rows) > 1 and 2 * len({_index(row, count) for row in rows}) >= count:
            made[rows[0]] = (_stacked(emitter, rows, dim, count), kind)
            gone.update(rows)
    return [made.get(pair[0], pair) for pair in edges if pair[0] in made or pair[0] not in gone]


def _dimension(edge: fx.Node) -> int:
    dim = edge.args[2]
    assert isinstance(dim, int)
    return dim % tensor_of(edge).dim()


def _index(edge: fx.Node, count: int) -> int:
    index = edge.args[3]
    assert isinstance(index, int)
    return index % count


def _stacked(emitter: Emitter, edges: list[fx.Node], dim: int, count: int) -> fx.Node:
    """What the edges hold of ``count`` rows of a dimension, zeros where they hold none."""
    rows: dict[int, fx.Node] = {}
    for edge in edges:
        index, row = _index(edge, count), first_argument(edge)
        rows[index] = emitter.call(aten.add.Tensor, rows[index], row) if index in rows else row
    empty = None if len(rows) == count else emitter.call(aten.zeros_like.default, first_argument(edges[0]))
    return emitter.call(aten.stack.default, [rows.get(index, empty) for index in range(count)], dim)
