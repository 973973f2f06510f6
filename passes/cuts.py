"""Cuts: some rows of one dimension of a value, and taking them out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from lrp_compiler.passes.program import tensor_of, value_of
from lrp_compiler.passes.sizes import as_number, expression
from lrp_compiler.passes.trace import Emitter

aten = torch.ops.aten


@dataclass(frozen=True)
class Window:
    """``count`` rows: ``start``, ``start + step``, ... below ``stop``; a negative ``start`` counts from the end."""

    start: int
    stop: int
    count: int
    step: int = 1

    def __str__(self) -> str:
        return "_".join(str(number).replace("-", "m") for number in (self.start, self.count, self.step))


@dataclass(frozen=True)
class Picked:
    """``count`` rows whose numbers the graph input ``indices`` holds; the same one may be there twice."""

    indices: str
    count: int

    def __str__(self) -> str:
        return self.indices


@dataclass(frozen=True)
class Cut:
    """``rows`` of the ``size`` ones along a dimension of ``outer`` x size x ``inner`` entries.

    Both are 1 where the dimension is that of the rows; merging it with others, as a reshape does, makes them more.
    Sizes are expressions, of which nothing is settled.
    """

    dim: int
    rows: Window | Picked
    size: sympy.Expr
    outer: sympy.Expr = sympy.S.One
    inner: sympy.Expr = sympy.S.One

    @property
    def is_plain(self) -> bool:
        """Whether the rows are those of the dimension itself."""
        return bool(self.outer == 1 and self.inner == 1)

    def at(self, dim: int) -> Cut:
        """The same rows along another dimension of the same size."""
        return Cut(dim, self.rows, self.size, self.outer, self.inner)


Cuts = frozenset[Cut]
WHOLE: Cuts = frozenset()


def shape_of(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """The shape of a value, of an op with several outputs that of the first."""
    value = value_of(node)
    first = value[0] if isinstance(value, (tuple, list)) else value
    return tuple(map(expression, first.shape))


def cut_shape(node: fx.Node, cuts: Cuts) -> list[Any]:
    """The shape of a value of which cuts leave some rows, in numbers that ops take."""
    shape = list(tensor_of(node).shape)
    for cut in cuts:
        rest = [as_number(part, tensor_of(node)) for part in (cut.outer, cut.inner)]
        shape[cut.dim] = math.prod(rest) * cut.rows.count
    return shape


def take(emitter: Emitter, node: fx.Node, cut: Cut, nodes: dict[str, fx.Node]) -> fx.Node:
    """Emit the rows of ``node`` that a cut leaves: a view where they are a window."""
    if cut.is_plain:
        return _rows(emitter, node, cut.dim, cut.rows, nodes)
    shape = list(tensor_of(node).shape)
    parts = [as_number(part, tensor_of(node)) for part in (cut.outer, cut.size, cut.inner)]
    opened = emitter.call(aten.reshape.default, node, [*shape[: cut.dim], *parts, *shape[cut.dim + 1 :]])
    taken = _rows(emitter, opened, cut.dim + 1, cut.rows, nodes)
    merged = [*shape[: cut.dim], math.prod((parts[0], cut.rows.count, parts[2])), *shape[cut.dim + 1 :]]
    return emitter.call(aten.reshape.default, taken, merged)


def _rows(emitter: Emitter, node: fx.Node, dim: int, rows: Window | Picked, nodes: dict[str, fx.Node]) -> fx.Node:
    if isinstance(rows, Window):
        return emitter.call(aten.slice.Tensor, node, dim, rows.start, rows.stop, rows.step)
    return emitter.call(aten.index_select.default, node, dim, nodes[rows.indices])
