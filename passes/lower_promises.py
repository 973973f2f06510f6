"""lower_promises: every promise becomes a deferred buffer: an input (free), a view, a saved or a reference value."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from lrp_compiler.passes.emitter import PROMISES, reference_promise
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
    value_of,
)
from lrp_compiler.passes.promise_branches import promise_branches
from lrp_compiler.passes.sizes import hints

VIEWS = aten_names("view transpose permute expand unsqueeze squeeze select slice t unflatten alias detach")
TUPLE_VIEWS = aten_names("split split_with_sizes chunk unbind")


def lower_promises(program: Program) -> Program:
    """Replace promise nodes by the value they stand for, or by views taken of the base that is kept.

    Values of the reference run become further graph inputs. Afterwards relevance ops read forward nodes only where
    ``buffers`` lists them.
    """
    program = program.fork()
    promise_branches(program)
    read_by: dict[tuple[fx.Node, BufferKind], list[str]] = {}
    replayed: dict[Any, dict[fx.Node, fx.Node]] = {target: {} for target in PROMISES}
    last = [node for node in program.graph.nodes if node.op == "placeholder"][-1]
    views: list[Buffer] = []
    for node in [n for n in program.graph.nodes if n.target in PROMISES]:
        value = first_argument(node)
        readers = sorted({facts(user).origin for user in node.users})
        base = _base(value)
        of_reference = node.target is reference_promise
        kind: BufferKind = "reference" if of_reference else "free" if base.op == "placeholder" else "saved"
        read_by.setdefault((base, kind), []).extend(readers)
        if base is not value:
            views.append(_buffer(value, "view", readers, program))
        known = replayed[node.target]
        if base not in known:
            known[base] = base
            if of_reference:
                known[base] = last = _reference_input(program.graph, base, last)
        node.replace_all_uses_with(_replay(program.graph, value, node, known))
        program.graph.erase_node(node)
    kept = [_buffer(base, kind, sorted(set(readers)), program) for (base, kind), readers in read_by.items()]
    return program.having(buffers=(*kept, *views))


def _reference_input(graph: fx.Graph, node: fx.Node, after: fx.Node) -> fx.Node:
    """A graph input for the value of ``node`` in the reference run, behind the input ``after``."""
    with graph.inserting_after(after):
        made = graph.placeholder(f"reference_{node.name}")
    made.meta = {"val": tensor_of(node), FACTS: Facts(part="reference", origin=node.name)}
    return made


def _base(node: fx.Node) -> fx.Node:
    """The node whose storage a chain of views shows."""
    while True:
        if op_name(node) in VIEWS:
            node = first_argument(node)
        elif node.target is operator.getitem and op_name(first_argument(node)) in TUPLE_VIEWS:
            node = first_argument(first_argument(node))
        else:
            return node


def _replay(graph: fx.Graph, value: fx.Node, before: fx.Node, replayed: dict[fx.Node, fx.Node]) -> fx.Node:
    """``value`` computed again by its views of a replayed base, once, placed among the relevance ops."""
    if value not in replayed:
        parent = first_argument(value)
        source = _replay(graph, parent, before, replayed)
        with graph.inserting_before(before):
            view = graph.node_copy(value, lambda old: source if old is parent else old)
        view.meta[FACTS] = Facts(part="relevance", origin=value.name)
        replayed[value] = view
    return replayed[value]


def _buffer(node: fx.Node, kind: BufferKind, readers: list[str], program: Program) -> Buffer:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        # A number (an item, a predicate); python's own take eight bytes.
        return Buffer(node.name, kind, 8, type(value).__name__.removeprefix("Sym").lower(), (), tuple(readers))
    shape = hints(value.shape)
    size = math.prod(shape) * value.element_size() if kind in ("saved", "reference") else 0
    dtype = str(value.dtype).removeprefix("torch.")
    return Buffer(node.name, kind, size, dtype, shape, tuple(readers))


def saved_values(program: Program) -> list[str]:
    """The forward nodes whose values outlive the forward pass for relevance alone."""
    return [buffer.name for buffer in program.buffers if buffer.kind == "saved"]


def free_values(program: Program) -> list[str]:
    """The graph inputs that the relevance pass reads."""
    return [buffer.name for buffer in program.buffers if buffer.kind == "free"]


def reference_values(program: Program) -> list[str]:
    """The forward nodes whose values in the reference run the relevance pass reads."""
    return [buffer.name for buffer in program.buffers if buffer.kind == "reference"]


def recorded_values(program: Program) -> list[str]:
    """What a forward pass returns for relevance: values read of this run, then those of the reference run alone."""
    inputs = {spec.node for spec in program.inputs}
    return list(dict.fromkeys([*saved_values(program), *(n for n in reference_values(program) if n not in inputs)]))
