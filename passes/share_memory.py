"""share_memory: ops write into the memory of an operand that nothing reads afterwards.

A mask that only a ReLU's derivative reads is applied as it is, so that it is never spelt out in floats.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lrp_compiler.kernels.bits import of_positive, through, through_
from lrp_compiler.passes.lifetimes import last_reads, roots_of
from lrp_compiler.passes.optable import aten_names, schema_name
from lrp_compiler.passes.program import Program, copy_graph, facts, first_argument, is_float, value_of
from lrp_compiler.passes.sizes import size_key
from lrp_compiler.passes.storage import bytes_of

aten = torch.ops.aten

IN_PLACE: dict[Any, Any] = {
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.neg.default: aten.neg_.default,
    aten.abs.default: aten.abs_.default,
    aten.clamp.default: aten.clamp_.default,
    aten.clamp_min.default: aten.clamp_min_.default,
    aten.rsqrt.default: aten.rsqrt_.default,
    aten.erfc.default: aten.erfc_.default,
    aten.erf.default: aten.erf_.default,
    aten.exp.default: aten.exp_.default,
    aten.tanh.default: aten.tanh_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.scatter_add.default: aten.scatter_add_.default,
    through: through_,
}
"""Op -> the same that writes to its first argument; both run one kernel, so that the bits are the same."""
COMMUTATIVE = frozenset({aten.mul.Tensor, aten.add.Tensor})

IN_PLACE_FORWARD: dict[Any, Any] = {**IN_PLACE, aten.relu.default: aten.relu_.default}
"""The same for the forward pass. Their derivatives read what they make, or else autograd copies what they overwrite."""
OVERWRITABLE = aten_names(
    "conv1d conv2d conv3d convolution linear addmm mm matmul bmm add sub mul neg erfc native_batch_norm"
)
"""Ops whose derivative does not read what they make."""


def share_memory(program: Program) -> Program:
    """Let elementwise ops reuse the memory of operands that end with them."""
    if program.relevance_graph is None:
        return program
    forward = _forward_shared(program)
    plain = None if program.plain is None else share_memory(program.plain)
    held = frozenset(buffer.holder for buffer in program.buffers)
    relevance = _relevance_shared(_with_masks_applied(program.relevance_graph, held))
    return program.having(graph=forward, relevance_graph=relevance, plain=plain)


def _forward_shared(program: Program) -> fx.Graph:
    graph = copy_graph(program.graph)
    for node in graph.nodes:
        operands = node.all_input_nodes
        # Tensors beside it may be mapped over by torch.func where the operand is not.
        if node.target not in IN_PLACE_FORWARD or len(operands) != 1 or node.args.count(operands[0]) != 1:
            continue
        (operand,) = operands
        made = first_argument(operand) if operand.target is operator.getitem else operand
        # Another reader may have kept the operand for its derivative.
        is_free = list(operand.users) == [node] and schema_name(made.target).removesuffix("_") in OVERWRITABLE
        if is_free and node.args[0] is operand and _fits(operand, operand, node):
            node.target = IN_PLACE_FORWARD[node.target]
    return graph


def _with_masks_applied(graph: fx.Graph, held: frozenset[str]) -> fx.Graph:
    """``through`` for each derivative of a ReLU that alone reads a mask in floats, unless that is ``held`` as such."""
    graph = copy_graph(graph)
    for node in list(graph.nodes):
        if node.target is not aten.threshold_backward.default or node.args[2] != 0:
            continue
        c, floats = node.args[:2]
        alike = [(value_of(one).shape, value_of(one).dtype) for one in (c, floats)]
        is_mask = floats.target is of_positive and floats.name not in held
        if is_mask and list(floats.users) == [node] and alike[0] == alike[1]:
            node.target, node.args = through, (c, first_argument(floats))
            graph.erase_node(floats)
    return graph


def _relevance_shared(graph: fx.Graph) -> fx.Graph:
    roots = roots_of(graph)
    last = last_reads(graph, roots)
    dependent = _on_seeds(graph)
    for place, node in enumerate(graph.nodes):
        source = roots[node]
        if source is not node:
            # A view of what is written to elsewhere by now.
            roots[node] = roots[source]
        for operand in _overwritable(node):
            root = roots[operand]
            # Seeds may be mapped over: what is the same for all of them can hold no value of one.
            if last[root] == place and _fits(operand, root, node) and (operand in dependent or node not in dependent):
                others = list(node.args)
                others.remove(operand)
                node.args = (operand, *others)
                node.target = IN_PLACE[node.target]
                roots[node], last[root] = root, last[node]
                break
    return graph


def _overwritable(node: fx.Node) -> list[fx.Node]:
    """The operands that an elementwise op could write to; a product of a value with itself reads it to the end."""
    if node.target not in IN_PLACE:
        return []
    several = node.target in COMMUTATIVE and not node.kwargs and node.args[0] is not node.args[1]
    return [operand for operand in node.args[: 2 if several else 1] if isinstance(operand, fx.Node)]


def _on_seeds(graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if facts(node).part == "seed" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _fits(operand: fx.Node, root: fx.Node, node: fx.Node) -> bool:
    """Whether ``operand`` is all of a memory made in this graph, laid out as what ``node`` makes."""
    mine, made, held = value_of(operand), value_of(node), value_of(root)
    if root.op == "placeholder" or not is_float(held) or not is_float(made) or mine.dtype != made.dtype:
        return False
    same = [tuple(map(size_key, (*value.shape, *value.stride()))) for value in (mine, made)]
    return same[0] == same[1] and bytes_of(mine) == bytes_of(held)
