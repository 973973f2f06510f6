"""lower_promises: every promise becomes a deferred buffer: free (a graph input), a view of one, or saved."""

from __future__ import annotations

import operator

from torch import fx

from lrp_compiler.passes.insert_relevance import promise
from lrp_compiler.passes.optable import aten_names, op_name
from lrp_compiler.passes.program import (
    FACTS,
    Buffer,
    BufferKind,
    Facts,
    Program,
    facts,
    first_argument,
    tensor_of,
)

VIEWS = aten_names("view transpose permute expand unsqueeze squeeze select slice t unflatten alias detach")
TUPLE_VIEWS = aten_names("split split_with_sizes chunk unbind")


def lower_promises(program: Program) -> Program:
    """Replace promise nodes by the value they stand for, or by views taken of the base that is kept.

    Afterwards relevance ops read forward nodes only where ``buffers`` lists them.
    """
    program = program.fork()
    kinds: dict[fx.Node, tuple[BufferKind, list[str]]] = {}
    replayed: dict[fx.Node, fx.Node] = {}
    views: list[Buffer] = []
    for node in [n for n in program.graph.nodes if n.target is promise]:
        value = first_argument(node)
        readers = sorted({facts(user).origin for user in node.users})
        base = _base(value)
        kinds.setdefault(base, ("free" if base.op == "placeholder" else "saved", []))[1].extend(readers)
        if base is not value:
            views.append(_buffer(value, "view", readers, program))
        node.replace_all_uses_with(_replay(program.graph, value, base, node, replayed))
        program.graph.erase_node(node)
    kept = [_buffer(base, kind, sorted(set(readers)), program) for base, (kind, readers) in kinds.items()]
    return program.having(buffers=(*kept, *views))


def _base(node: fx.Node) -> fx.Node:
    """The node whose storage a chain of views shows."""
    while True:
        if op_name(node) in VIEWS:
            node = first_argument(node)
        elif node.target is operator.getitem and op_name(first_argument(node)) in TUPLE_VIEWS:
            node = first_argument(first_argument(node))
        else:
            return node


def _replay(
    graph: fx.Graph, value: fx.Node, base: fx.Node, before: fx.Node, replayed: dict[fx.Node, fx.Node]
) -> fx.Node:
    """``value`` computed again from ``base`` by its views, once, placed among the relevance ops."""
    if value is base:
        return base
    if value not in replayed:
        parent = first_argument(value)
        source = _replay(graph, parent, base, before, replayed)
        with graph.inserting_before(before):
            view = graph.node_copy(value, lambda old: source if old is parent else old)
        view.meta[FACTS] = Facts(part="relevance", origin=value.name)
        replayed[value] = view
    return replayed[value]


def _buffer(node: fx.Node, kind: BufferKind, readers: list[str], program: Program) -> Buffer:
    value = tensor_of(node)
    size = value.numel() * value.element_size() if kind == "saved" else 0
    dtype = str(value.dtype).removeprefix("torch.")
    return Buffer(node.name, kind, size, dtype, tuple(value.shape), tuple(readers))


def saved_values(program: Program) -> list[str]:
    """The forward nodes whose values outlive the forward pass for relevance alone."""
    return [buffer.name for buffer in program.buffers if buffer.kind == "saved"]


def free_values(program: Program) -> list[str]:
    """The graph inputs that the relevance pass reads."""
    return [buffer.name for buffer in program.buffers if buffer.kind == "free"]
