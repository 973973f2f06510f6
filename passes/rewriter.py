"""What passes that replace single ops share: replacing, expanding, and keeping track of renamed values."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from lrp_compiler.passes.program import Constant, Mutation, Program, output_node, return_values, value_of
from lrp_compiler.passes.trace import Emitter

PROVENANCE = ("nn_module_stack", "stack_trace", "torch_fn")


Replacement = fx.Node | tuple[fx.Node, ...] | None


class Rewriter:
    """Visits every op of a program it owns and puts ``replacement(op)`` in its place."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.emitter = Emitter(program.graph, program.fake_mode, output_node(program.graph), program.traces)
        self.replaced: dict[str, fx.Node] = {}
        self.mutations: list[Mutation] = []

    def replacement(self, node: fx.Node) -> Replacement:
        """The value to use instead of ``node``, emitted in front of it; one per output of a multi-output op.

        None leaves the node as it is.
        """
        raise NotImplementedError

    def run(self) -> Program:
        """Rewrite all ops; outputs and mutations follow renamed values."""
        for node in list(self.program.graph.nodes):
            if node.op == "call_function" and not node._erased:
                self.rewrite(node)
        outputs = tuple(leaf if isinstance(leaf, Constant) else self.renamed(leaf) for leaf in self.program.outputs)
        mutations = tuple(Mutation(m.input, self.renamed(m.value)) for m in self.program.mutations)
        program = self.program.having(outputs=outputs, mutations=(*mutations, *self.mutations))
        return_values(program)
        program.graph.eliminate_dead_code()
        return program

    def renamed(self, name: str) -> str:
        """The name of the value that stands for ``name`` now."""
        while name in self.replaced:
            name = self.replaced[name].name
        return name

    def current(self, node: fx.Node) -> fx.Node:
        """The node that stands for ``node`` now."""
        while node.name in self.replaced:
            node = self.replaced[node.name]
        return node

    def rewrite(self, node: fx.Node) -> None:
        """Replace one op if it has a replacement."""
        self.emitter.before = node
        self.emitter.provenance = {key: node.meta[key] for key in PROVENANCE if key in node.meta}
        new = self.replacement(node)
        if new is None or new is node:
            return
        if isinstance(new, fx.Node):
            self.replace(node, new)
            return
        for reader in list(node.users):
            self.replace(reader, new[int(str(reader.args[1]))])
        self.emitter.graph.erase_node(node)

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Use ``new`` wherever ``node`` was used."""
        node.replace_all_uses_with(new)
        self.replaced[node.name] = new
        self.emitter.graph.erase_node(node)

    def expand(self, node: fx.Node, target: Any, fn: Callable[..., Any], *args: Any) -> Replacement:
        """Emit ``fn(*args)`` before ``node`` with its calls of ``target`` opened; the ops inside are rewritten too."""
        start = node.prev
        result = self.emitter(fn, *args, opened=target)
        between: list[fx.Node] = []
        while (inner := start.next if not between else between[-1].next) is not node:
            between.append(inner)
        for inner in between:
            if not inner._erased:
                self.rewrite(inner)
        return self.current(result) if isinstance(result, fx.Node) else tuple(self.current(part) for part in result)

    def output(self, node: fx.Node, index: int) -> fx.Node:
        """Output ``index`` of a multi-output call just emitted."""
        with self.emitter.graph.inserting_before(self.emitter.before):
            result = self.emitter.graph.call_function(operator.getitem, (node, index))
        result.meta = {**self.emitter.provenance, "val": value_of(node)[index]}
        return result
