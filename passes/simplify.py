"""simplify: local rewrites of relevance ops: scales folded, masks put behind pools, equal ops shared, dead dropped."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lrp_compiler.kernels.pooling import max_pool_transpose
from lrp_compiler.passes.emitter import promise
from lrp_compiler.passes.matching import match_of
from lrp_compiler.passes.program import FACTS, Facts, Program, facts, first_argument, value_of
from lrp_compiler.passes.site import output_of

aten = torch.ops.aten


def simplify(program: Program) -> Program:
    """The same results from fewer relevance ops."""
    program = program.fork()
    for node in list(program.graph.nodes):
        if facts(node).part == "relevance":
            _fold_scales(node)
            _mask_behind_pool(program, node)
    _share_equal_ops(program.graph)
    program.graph.eliminate_dead_code()
    return program


def _fold_scales(node: fx.Node) -> None:
    """(c * k) * l -> c * (k l)."""
    inner, factor = _scale(node)
    if inner is None or facts(inner).part != "relevance":
        return
    base, inner_factor = _scale(inner)
    if base is not None:
        node.args = (base, inner_factor * factor)


def _mask_behind_pool(program: Program, node: fx.Node) -> None:
    """mask(x) * pool^T(c) -> pool^T(mask(pool(x)) * c) where x = relu(...): a winner is positive where its window's is.

    The mask of what is pooled is smaller than that of what goes in, and so is what it is applied to.
    """
    if node.target is not aten.threshold_backward.default or node.args[2] != 0:
        return
    spread, mask = first_argument(node), node.args[1]
    found = match_of(spread) if len(spread.users) == 1 else None
    if found is None or found.emission.function is not max_pool_transpose or not found.is_whole():
        return
    coefficient, indices = found.arguments[:2]
    winners = [promised(one) for one in (mask, indices)]
    if winners[0] is None or winners[1] is None or winners[1].target is not operator.getitem:
        return
    pool = first_argument(winners[1])
    if first_argument(pool) is not winners[0] or winners[0].target is not aten.relu.default:
        return
    first = min(found.members)
    with program.graph.inserting_before(first):
        value = program.graph.call_function(promise, (output_of(program.graph, pool, 0),))
        masked = program.graph.call_function(aten.threshold_backward.default, (coefficient, value, 0))
    value.meta = {
        "val": value_of(first_argument(value)),
        FACTS: Facts(part="promise", origin=first_argument(value).name),
    }
    masked.meta = {**node.meta, "val": value_of(coefficient)}
    for member in found.members:
        member.replace_input_with(coefficient, masked)
    node.replace_all_uses_with(spread)


def promised(node: Any) -> fx.Node | None:
    """The forward value that ``node`` is a promise of."""
    return first_argument(node) if isinstance(node, fx.Node) and node.target is promise else None


def _scale(node: fx.Node) -> tuple[fx.Node | None, float]:
    """The node and number of a product with a number."""
    if node.target is aten.mul.Tensor and isinstance(node.args[0], fx.Node):
        factor = node.args[1]
        if isinstance(factor, (int, float)) and not isinstance(factor, bool):
            return node.args[0], float(factor)
    return None, 1.0


def _share_equal_ops(graph: fx.Graph) -> None:
    """Two relevance ops with the same target and arguments become one."""
    seen: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or facts(node).part != "relevance":
            continue
        key = _key(node)
        known = seen.setdefault(key, node) if key is not None else node
        if known is not node:
            node.replace_all_uses_with(known)


def _key(node: fx.Node) -> Any:
    """What decides the value of an op, or None when it cannot be hashed."""
    key = (node.target, _frozen(node.args), _frozen(node.kwargs))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_frozen(item) for item in value))
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in sorted(value.items()))
    return (type(value), value)
