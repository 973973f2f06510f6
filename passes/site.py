"""A site: one op during the reverse walk, and the primitives that rules are written in (RULES.md section 8)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lrp_compiler.passes.emitter import RelevanceEmitter
from lrp_compiler.passes.errors import DerivativeError
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.optable import OpClass
from lrp_compiler.passes.program import FACTS, Facts, facts, is_float, value_of
from lrp_compiler.passes.rule_tensors import tensor_name
from lrp_compiler.passes.rules.base import Edges
from lrp_compiler.passes.source_lines import user_source
from lrp_compiler.passes.transposes import TRANSPOSES
from lrp_compiler.passes.vjp import linear_remainder, pullback

aten = torch.ops.aten


class Site:
    """An op whose relevance is being written; forward nodes given to ``emit`` become promises if they are read.

    ``is_seeded`` says that a seed starts at its output, beside what its readers send back.
    """

    def __init__(self, op: Operation, emitter: RelevanceEmitter, *, is_seeded: bool = False) -> None:
        self.op = op
        self.emitter = emitter
        self.is_seeded = is_seeded

    @property
    def node(self) -> fx.Node:
        return self.op.node

    def tensor(self, key: str) -> fx.Node:
        """The graph input that holds a tensor of the rule (``Rule.tensors``)."""
        return self.op.nodes[tensor_name(self.node.name, key)]

    def emit(self, fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Append the ops of a plain torch function of nodes and constants."""
        return self.emitter(fn, *args, **options)

    def reference(self, node: fx.Node) -> fx.Node:
        """The value of a forward node in the reference run: a promise, or ``node`` itself where it cannot differ."""
        return self.emitter.reference(node)

    def at(self, values: dict[Operand, fx.Node]) -> Site:
        """This op with other values for some operands, to be linearised there."""
        return Site(self.op.at(values), self.emitter, is_seeded=self.is_seeded)

    def vjp(self, edge: Any, receivers: tuple[Operand, ...]) -> Edges:
        """P1: the op's ordinary vector-Jacobian product for each receiver."""
        if not receivers:
            return {}
        target = getattr(self.node.target, "_schema", None)
        explicit = TRANSPOSES.get(target.name) if target is not None and self.op.pattern is None else None
        edges: Edges = {}
        if explicit is not None:
            edges = {r: made for r in receivers if (made := explicit(self, edge, r)) is not None}
        rest = tuple(receiver for receiver in receivers if receiver not in edges)
        if rest:
            leaves = tuple(receiver.leaf for receiver in rest)
            outputs = self.float_outputs()
            edges_of_outputs = edge if isinstance(edge, list) else [edge]
            cotangents = [edges_of_outputs[index] for index in outputs]
            known = [None if self.op.is_moved else output for output in outputs.values()]
            arguments = (self.node.target, self.op.args, self.op.kwargs, leaves, cotangents, known)
            edges.update(zip(rest, self.traced_pullback(arguments), strict=True))
        return edges

    def traced_pullback(self, arguments: tuple[Any, ...]) -> list[fx.Node]:
        """Emit torch's own derivative of this op; raises DerivativeError when it cannot be traced."""
        if self.op.op_class is OpClass.RECURRENT:
            cause = "its kernel hides that of its weights"
            raise DerivativeError(op=str(self.op), cause=cause, source=user_source(self.node))
        try:
            made: list[fx.Node] = self.emit(pullback, *arguments, autograd=True, rewire=True)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            cause = str(error).splitlines()[0]
            raise DerivativeError(op=str(self.op), cause=cause, source=user_source(self.node)) from error
        return made

    def scale(self, edge: fx.Node, factor: float) -> fx.Node:
        """P2: factor * c."""
        return edge if factor == 1 else self.emitter.call(aten.mul.Tensor, edge, factor)

    def float_outputs(self) -> dict[int, fx.Node]:
        """The nodes that hold this op's float outputs, by output index."""
        value = value_of(self.node)
        if isinstance(value, torch.Tensor):
            return {0: self.node}
        return {index: self.output(index) for index, leaf in enumerate(value) if is_float(leaf)}

    def output(self, index: int) -> fx.Node:
        """Output ``index`` of a multi-output op as a node of the forward graph."""
        return output_of(self.emitter.graph, self.node, index)

    def remainder(self, edge: fx.Node, edges: Edges) -> fx.Node:
        """c * (f(x) - J x): what a linearisation through the origin leaves of the output."""
        leaves = tuple(receiver.leaf for receiver in edges)
        arguments = (self.node.target, self.op.args, self.op.kwargs, leaves, edge)
        return self.emit(linear_remainder, *arguments, autograd=True)  # type: ignore[no-any-return]


def output_of(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    """The node that reads output ``index`` of ``node``; made, right behind it, where there is none."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == index:
            return user
    # The name is the same for every request, since a tape keeps saved values by name.
    name = f"{node.name}_output{index}"
    with graph.inserting_after(node):
        reader = graph.create_node("call_function", operator.getitem, (node, index), name=name)
    assert reader.name == name, f"{name} is taken"
    value = value_of(node)[index]
    known = facts(node)
    reader.meta = {**node.meta, "val": value, FACTS: known if is_float(value) else Facts(varies=known.varies)}
    return reader
