"""clean: inline the sub-graphs of grad-mode and autocast regions; drop assertions, aliases and no-op casts.

Sizes that differ from call to call become literals of the ops that take them.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lrp_compiler.passes.errors import UnsupportedRegionError, user_source
from lrp_compiler.passes.program import Constant, Program, first_argument, is_float, tensor_of
from lrp_compiler.passes.sizes import as_literal, is_size

aten = torch.ops.aten
GRAD_REGION = "wrap_with_set_grad_enabled"
AUTOCAST_REGION = "wrap_with_autocast"
DROPPED_NAMES = (
    "aten::_assert",
    "aten::sym_constrain",
    "aten::_functional_assert",
    "aten::_nn_functional_assert",
)
ALIASES = frozenset({aten.alias.default, aten.lift_fresh_copy.default})
CASTS = frozenset({"aten::to", "aten::type_as", "aten::contiguous", "aten::_to_copy"})


def clean(program: Program) -> Program:
    """A flat graph of ATen calls without sub-graphs, assertions, aliases or casts that change nothing."""
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda old: values[old]))
        else:
            _copy_clean(program.root, graph, node, values)
    renamed = {old.name: new.name for old, new in values.items() if isinstance(new, fx.Node)}
    sizes = {old.name: Constant(new) for old, new in values.items() if not isinstance(new, (fx.Node, tuple, list))}
    outputs = tuple(leaf if isinstance(leaf, Constant) else {**sizes, **renamed}[leaf] for leaf in program.outputs)
    inputs = tuple(replace(spec, node=renamed[spec.node]) for spec in program.inputs)
    graph.eliminate_dead_code()
    return program.having(graph=graph, inputs=inputs, outputs=outputs)


def _copy_clean(root: torch.nn.Module, graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any]) -> None:
    """Copy one node into ``graph``, or stand another in for it."""
    if node.op == "get_attr":
        values[node] = root.get_submodule(str(node.target))
    elif node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
        _inline_region(graph, node, values)
    elif node.target is operator.getitem and isinstance(values[first_argument(node)], (tuple, list)):
        values[node] = values[first_argument(node)][node.args[1]]
    elif is_size(node.meta.get("val")):
        values[node] = as_literal(node.meta["val"])
    elif _is_dropped(node):
        values[node] = None
    elif _is_identity(node):
        values[node] = values[first_argument(node)]
    else:
        values[node] = graph.node_copy(node, lambda old: values[old])


def _is_dropped(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name.startswith(DROPPED_NAMES)


def _is_identity(node: fx.Node) -> bool:
    """Whether the node returns its first argument unchanged (the same storage, not a copy)."""
    if node.target in ALIASES:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.name not in CASTS:
        return False
    if schema.name == "aten::_to_copy" or node.kwargs.get("copy") or True in node.args[2:]:
        return False
    before, after = tensor_of(first_argument(node)), tensor_of(node)
    same = before.dtype == after.dtype and before.device == after.device and before.stride() == after.stride()
    return same and before.shape == after.shape


def _inline_region(graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any]) -> None:
    """Splice in the body of a region; what leaves a no-grad region is detached."""
    name = getattr(node.target, "__name__", str(node.target))
    arguments: list[Any] = [values[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
    if name == GRAD_REGION:
        grad_enabled, body, *operands = arguments
    elif name == AUTOCAST_REGION and not arguments[2]:
        grad_enabled, (body, *operands) = True, arguments[4:]
    else:
        inside = [inner for body in arguments if isinstance(body, fx.GraphModule) for inner in body.graph.nodes]
        places = (place for one in (node, *inside) if (place := user_source(one)) is not None)
        raise UnsupportedRegionError(name=name, source=next(places, None))
    inner: dict[fx.Node, Any] = {}
    supplied = iter(operands)
    for old in body.graph.nodes:
        if old.op == "placeholder":
            inner[old] = next(supplied)
        elif old.op == "output":
            results = fx.map_arg(old.args[0], lambda leaf: inner[leaf])
            values[node] = results if grad_enabled else [_detached(graph, leaf) for leaf in results]
        else:
            _copy_clean(body, graph, old, inner)


def _detached(graph: fx.Graph, node: Any) -> Any:
    if not isinstance(node, fx.Node) or not is_float(node.meta.get("val")):
        return node
    with_grad = graph.call_function(aten.detach.default, (node,))
    with_grad.meta = dict(node.meta)
    return with_grad
