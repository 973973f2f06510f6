"""The states of unrolled linear recurrences h_t = a_t h_{t-1} + b_t in a graph, as what each step reads."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from lrp_compiler.passes.dataflow import RESHAPES, factors
from lrp_compiler.passes.optable import aten_names, op_name
from lrp_compiler.passes.program import first_argument, tensor_of
from lrp_compiler.passes.straight_line import OverTime

aten = torch.ops.aten
ZEROS = aten_names("zeros zeros_like new_zeros")


@dataclass(frozen=True)
class Slice:
    """What step ``index`` reads of ``base``: its slice ``value`` (or all of it), taken through the ops ``moved``."""

    base: fx.Node
    way: OverTime
    index: int
    value: fx.Node
    moved: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Step:
    """A state: its index, addend, the decayed state ``product`` it adds to and the state before (None: zeros)."""

    index: int
    added: Slice
    before: fx.Node | None = None
    product: fx.Node | None = None
    decay: Slice | None = None


def find_steps(graph: fx.Graph) -> dict[fx.Node, Step]:
    """Every state of a linear recurrence that starts at zero, or at its first addend."""
    steps: dict[fx.Node, Step] = {}
    for node in graph.nodes:
        if node.target is aten.add.Tensor and not node.kwargs:
            left, right = node.args[:2]
            for product, added in ((left, right), (right, left)):
                step = _step(product, added, steps)
                if step is not None:
                    steps[node] = step
                    break
    return steps


def _step(product: object, added: object, steps: dict[fx.Node, Step]) -> Step | None:
    """``product + added`` as the next state of a recurrence; a recurrence new to ``steps`` gets its first there."""
    if not isinstance(product, fx.Node) or not isinstance(added, fx.Node) or product.target is not aten.mul.Tensor:
        return None
    pair, part = factors(product), sliced(added)
    if pair is None or part is None:
        return None
    for decay, before in (pair, pair[::-1]):
        if before.op == "call_function" and op_name(before) in ZEROS and part.index == 0:
            return Step(0, part, None, product, read_at(decay, 0))
        first = sliced(before)
        if before not in steps and first is not None and (first.index, part.index) == (0, 1) and same(first, part):
            steps[before] = Step(0, first)
        known = steps.get(before)
        if known is not None and known.index + 1 == part.index and same(known.added, part):
            return Step(part.index, part, before, product, read_at(decay, part.index))
    return None


def sliced(node: fx.Node) -> Slice | None:
    """``node`` as one step's slice of a tensor: a select, a slice of size 1 or one output of an unbind."""
    source = first_argument(node) if node.target is operator.getitem else node
    if node.target is aten.select.int:
        base, dim, index, keep = first_argument(node), node.args[1], node.args[2], False
    elif node.target is aten.slice.Tensor and tensor_of(node).shape[_number(node.args[1])] == 1:
        base, dim, index, keep = first_argument(node), node.args[1], node.args[2], True
    elif source.target is aten.unbind.int:
        base, dim, index, keep = first_argument(source), (*source.args, 0)[1], node.args[1], False
    else:
        return None
    shape = tensor_of(base).shape
    axis = _number(dim) % len(shape)
    return Slice(base, OverTime(axis, keep), _number(index) % max(shape[axis], 1), node)


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value


def read_at(node: fx.Node, index: int) -> Slice:
    """How step ``index`` reads ``node``: a slice at ``index``, or a whole tensor, through movement."""
    moved: list[fx.Node] = []
    current = node
    while True:
        found = sliced(current)
        if found is not None and found.index == index:
            return Slice(found.base, found.way, index, current, tuple(reversed(moved)))
        if op_name(current) not in RESHAPES:
            return Slice(current, OverTime(None), index, current, tuple(reversed(moved)))
        moved.append(current)
        current = first_argument(current)


def same(left: Slice, right: Slice) -> bool:
    """Whether two steps read the same tensor the same way."""
    return left.base is right.base and left.way == right.way


def start_of(state: fx.Node, steps: dict[fx.Node, Step]) -> fx.Node:
    """The first state of a recurrence."""
    while (before := steps[state].before) is not None:
        state = before
    return state


def unread_outside(inside: Collection[fx.Node], root: fx.Node, outputs: set[str]) -> bool:
    """Whether only ``root`` reads what lies in ``inside``, but for its shape."""
    allowed = {root, *inside}
    return not any(
        node.name in outputs or any(user not in allowed and op_name(user) not in ZEROS for user in node.users)
        for node in inside
    )
