"""simplify: local rewrites of relevance ops: scales folded into one, equal ops shared, dead ops dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lrp_compiler.passes.program import Program, facts

aten = torch.ops.aten


def simplify(program: Program) -> Program:
    """The same results from fewer relevance ops."""
    program = program.fork()
    for node in list(program.graph.nodes):
        if facts(node).part == "relevance":
            _fold_scales(node)
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
