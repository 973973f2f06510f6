"""What norm_bwd takes in: the weight in front of a norm, and the sum with what passes the norm by."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from lrp_compiler.kernels.dialect.norm import NORM_BWD
from lrp_compiler.passes.fusing.replacement import emitter_like
from lrp_compiler.passes.program import Program, tensor_of

aten = torch.ops.aten
RESHAPES = frozenset({aten.reshape.default, aten.view.default, aten.flatten.using_ints})


def only_user(node: fx.Node) -> fx.Node | None:
    """The one reader of ``node``; None where there are several, or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def behind_reshapes(node: fx.Node) -> fx.Node:
    """What ``node`` shows in another shape, as long as nothing else reads it."""
    while node.target in RESHAPES and isinstance(node.args[0], fx.Node) and len(node.args[0].users) == 1:
        node = node.args[0]
    return node


def norm_again(
    c: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    residual: Tensor | None,
    centred: bool,
    groups: int,
    divides: bool,
    size: int,
) -> Tensor:
    """norm_bwd over rows of ``size`` elements, of the shape of the residual, or of ``c`` where there is none."""
    added = None if residual is None else residual.reshape(-1, size)
    made: Tensor = NORM_BWD(c.reshape(-1, size), weight, scale, added, centred, groups, divides)
    return made.view(c.shape if residual is None else residual.shape)


def take_in_weight_and_sum(program: Program, node: fx.Node) -> None:
    """The weight in front of a norm, where it is an op of its own, and the sum with what passes the norm by."""
    shown = only_user(node)
    if shown is None or shown.target not in RESHAPES:
        return
    rows, weight, scale, residual, centred, groups, *rest = node.args
    assert isinstance(rows, fx.Node)
    size = tensor_of(rows).shape[1]
    c = behind_reshapes(rows) if weight is None and not groups else rows
    weighted = _weighted(c) if c is not rows or weight is None else None
    if weighted is not None:
        c, weight = weighted
    added = _added(shown)
    if weighted is None and added is None:
        return
    last = shown if added is None else added[0]
    residual = residual if added is None else added[1]
    made = emitter_like(program, node, last)(
        norm_again, c, weight, scale, residual, centred, groups, bool(rest and rest[0]), size
    )
    last.replace_all_uses_with(made)
    program.graph.erase_node(last)


def _weighted(c: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(coefficient, weight) where ``c`` is a product with one weight per column, which nothing else reads."""
    if c.target is not aten.mul.Tensor or len(c.users) != 1:
        return None
    for value, weight in (c.args, c.args[::-1]):
        if isinstance(value, fx.Node) and isinstance(weight, fx.Node) and _is_row(weight, value):
            return value, weight
    return None


def _is_row(weight: fx.Node, value: fx.Node) -> bool:
    one, all_of = tensor_of(weight), tensor_of(value)
    return one.dim() == 1 and all_of.dim() > 1 and one.shape[0] == all_of.shape[-1] and one.dtype == all_of.dtype


def _added(shown: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(sum, other addend) where all that reads ``shown`` is a sum with something of its shape and dtype."""
    total = only_user(shown)
    if total is None or total.target is not aten.add.Tensor or total.kwargs or total.args[0] is total.args[1]:
        return None
    other = total.args[1] if total.args[0] is shown else total.args[0]
    if not isinstance(other, fx.Node):
        return None
    one, mine = tensor_of(other), tensor_of(shown)
    return (total, other) if (one.shape, one.dtype) == (mine.shape, mine.dtype) else None
