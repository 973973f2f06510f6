"""What attention_lrp_bwd takes in: the shares of AttnLRP, and keys and values that serve several heads of queries."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lrp_compiler.passes.emitter import RelevanceEmitter, promise
from lrp_compiler.passes.fusing.replacement import emitter_like
from lrp_compiler.passes.program import Program, facts, first_argument, tensor_of, value_of

aten = torch.ops.aten
KEY, VALUE = 2, 3
SHARES = slice(-3, None)
RESHAPES = frozenset({aten.reshape.default, aten.view.default})


def take_in_scales(program: Program, node: fx.Node) -> None:
    """Numbers that the coefficient, or an edge that attention gives, is multiplied by become shares."""
    c, *rest = node.args
    before = _scaled(c)
    common = 1.0
    if before is not None:
        c, common = before
    shares = [float(share) * common for share in rest[SHARES]]  # type: ignore[arg-type]
    for edge in node.users:
        reader = next(iter(edge.users)) if len(edge.users) == 1 else None
        behind = _scaled(reader)
        if reader is not None and behind is not None and edge.target is operator.getitem:
            shares[edge.args[1]] *= behind[1]  # type: ignore[index]
            reader.replace_all_uses_with(edge)
            program.graph.erase_node(reader)
    node.args = (c, *rest[:-3], *shares)


def _scaled(node: Any) -> tuple[fx.Node, float] | None:
    """(value, number) of a product with a number."""
    if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor or not isinstance(node.args[1], float):
        return None
    value = node.args[0]
    return (value, node.args[1]) if isinstance(value, fx.Node) else None


def take_in_shared_heads(program: Program, node: fx.Node) -> None:
    """Keys and values that were repeated over the heads of queries are read unrepeated, and their edges come summed."""
    shared = [_unrepeated(node.args[place]) for place in (KEY, VALUE)]
    edges = [_summed(node, place - 1) for place in (KEY, VALUE)]
    if None in shared or any(edge is False for edge in edges):
        return
    emitter = RelevanceEmitter(**vars(emitter_like(program, node, node)))
    args = list(node.args)
    for place, value in zip((KEY, VALUE), shared, strict=True):
        args[place] = emitter.resolve(value)  # type: ignore[arg-type]
    made = emitter.call(node.target, *args)
    for user in list(node.users):
        index = user.args[1]
        assert isinstance(index, int)
        edge = user if index == 0 else edges[index - 1]
        if not isinstance(edge, fx.Node):
            continue
        with program.graph.inserting_after(made):
            read = program.graph.call_function(operator.getitem, (made, index))
        read.meta = {**user.meta, "val": value_of(made)[index]}
        edge.replace_all_uses_with(read)


def _unrepeated(operand: Any) -> fx.Node | None:
    """The forward value (B, shared, S, E) whose heads a promised operand (B, heads, S, E) repeats one by one."""
    if not isinstance(operand, fx.Node) or operand.target is not promise:
        return None
    reshaped = first_argument(operand)
    if reshaped.target not in RESHAPES or facts(reshaped).part != "forward":
        return None
    expanded = first_argument(reshaped)
    if expanded.target is not aten.expand.default:
        return None
    inserted = first_argument(expanded)
    if inserted.target is not aten.unsqueeze.default or inserted.args[1] != 2:
        return None
    value = first_argument(inserted)
    batch, shared, *rest = tensor_of(value).shape
    wide = tensor_of(expanded).shape
    repeats_heads = len(rest) == 2 and wide[:2] == (batch, shared) and list(wide[3:]) == rest
    return value if repeats_heads and tensor_of(reshaped).shape == (batch, shared * wide[2], *rest) else None


def _summed(node: fx.Node, place: int) -> fx.Node | bool:
    """The node that holds edge ``place`` summed over the heads that shared it; True for none, False if it is not."""
    edge = next((user for user in node.users if user.args[1] == place), None)
    if edge is None or not edge.users:
        return True
    split = _only_reader(edge, *RESHAPES)
    total = _only_reader(split, aten.sum.dim_IntList) if split is not None else None
    if split is None or total is None or total.args[1:] != ([2], True):
        return False
    heads, shape = tensor_of(edge).shape[1], tensor_of(split).shape
    closed = _only_reader(total, *RESHAPES, aten.squeeze.dim)
    fits = len(shape) == 5 and shape[1] * shape[2] == heads and closed is not None
    return closed if fits and closed is not None and tensor_of(closed).dim() == 4 else False


def _only_reader(node: fx.Node, *targets: Any) -> fx.Node | None:
    """The one reader of ``node``, if it calls one of ``targets``."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    return reader if reader is not None and reader.target in targets else None
