"""lower_promises: every promise becomes a deferred buffer: free, a view, compressed, recomputed or saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from lrp_compiler.passes.budget import MemoryGoal, values_to_keep
from lrp_compiler.passes.buffers import Buffer, BufferKind
from lrp_compiler.passes.deferral import GENERATOR_READERS, REPLAY, drop_dead_nodes, either
from lrp_compiler.passes.emitter import promise, reference_promise
from lrp_compiler.passes.packing import UNPACKERS
from lrp_compiler.passes.program import FACTS, Facts, Program, facts, first_argument, tensor_of, value_of
from lrp_compiler.passes.promise_branches import promise_branches
from lrp_compiler.passes.sizes import hints
from lrp_compiler.passes.storage import base_of, bytes_of, shown


def lower_promises(program: Program, goal: MemoryGoal | None = None) -> Program:
    """Replace promise nodes by the value they stand for, kept by the forward pass, or computed again from what is.

    A relevance op that depends on no seed may move to the forward pass, where what it makes is smaller than what it
    reads. Values of the reference run become further graph inputs. Afterwards relevance ops read forward nodes only
    where ``buffers`` lists them.
    """
    program = program.fork()
    promise_branches(program)
    return _Lowering(program, goal or MemoryGoal()).run()


class _Lowering:
    def __init__(self, program: Program, goal: MemoryGoal) -> None:
        self.program = program
        self.graph = program.graph
        self.nodes = program.nodes_by_name()
        self.last_input = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        self.promised = {first_argument(node) for node in self.graph.nodes if node.target is promise}
        self.kept = values_to_keep(program, goal)
        self.moved: dict[fx.Node, fx.Node] = {}
        self.again: dict[fx.Node, fx.Node] = {}
        self.views: set[fx.Node] = set()

    def run(self) -> Program:
        for node in [node for node in self.kept if facts(node).part != "forward"]:
            self.in_forward(node)
        references = self.lower_references()
        # Read of the reference run alone, perhaps: by nothing in this graph.
        recorded = frozenset(buffer.name for buffer in references)
        for node in self.readers():
            for operand in node.all_input_nodes:
                node.replace_input_with(operand, self.chosen(operand))
        drop_dead_nodes(self.graph, kept=GENERATOR_READERS, named=recorded)
        for node in self.readers():
            for operand in [operand for operand in node.all_input_nodes if operand.target is promise]:
                node.replace_input_with(operand, self.forward_value(first_argument(operand), node))
        drop_dead_nodes(self.graph, named=recorded)
        return self.program.having(buffers=(*self.buffers(), *references))

    def readers(self) -> list[fx.Node]:
        """Relevance ops and the output, which returns relevance."""
        return [node for node in self.graph.nodes if node.op == "output" or facts(node).part == "relevance"]

    def chosen(self, value: fx.Node) -> fx.Node:
        """What stands for ``value`` in the relevance graph: what the forward pass made, or one of two forms."""
        if value.target is either:
            direct, unpacked = value.args
            return self.chosen(unpacked if is_kept_small(unpacked) else direct)  # type: ignore[arg-type]
        return self.moved.get(value, value)

    def forward_value(self, value: fx.Node, at: fx.Node) -> fx.Node:
        """A forward value in the relevance graph: itself where it is kept, else computed again in front of ``at``."""
        # A loop, since what is kept may be more ops away than python can recurse.
        waiting = [value]
        while waiting:
            node = waiting[-1]
            operands = () if self.is_at_hand(node) or REPLAY in node.meta else node.all_input_nodes
            missing = [operand for operand in operands if not self.is_at_hand(operand)]
            waiting += reversed(missing)
            if not missing:
                waiting.pop()
                if not self.is_at_hand(node):
                    self.again[node] = self.computed_again(node, at)
        return self.again.get(value, value)

    def is_at_hand(self, value: fx.Node) -> bool:
        """Whether relevance can read a forward value by now: kept, or computed again."""
        return value.op == "placeholder" or value in self.kept or value in self.again

    def computed_again(self, value: fx.Node, at: fx.Node) -> fx.Node:
        """A forward op once more in front of ``at``, of operands at hand; a draw from the state it began with."""
        if shown(value) is not None:
            self.views.add(value)
        if REPLAY not in value.meta:
            operands = {operand: self.again.get(operand, operand) for operand in value.all_input_nodes}
            return self.copied(value, at, operands)
        function, names, arguments = value.meta[REPLAY]
        with self.graph.inserting_before(at):
            made = self.graph.call_function(function, (*(self.nodes[name] for name in names), *arguments))
        made.meta = {"val": value_of(value), FACTS: Facts(part="relevance", origin=value.name)}
        return made

    def copied(self, value: fx.Node, at: fx.Node, operands: dict[fx.Node, fx.Node]) -> fx.Node:
        """A forward op once more, on other operands, among the relevance ops."""
        with self.graph.inserting_before(at):
            made = self.graph.node_copy(value, operands.__getitem__)
        made.meta[FACTS] = Facts(part="relevance", origin=value.name)
        return made

    def in_forward(self, node: fx.Node) -> fx.Node:
        """A relevance op that depends on no seed, among the forward ops, right behind what it reads."""
        if node.target is promise:
            return self.in_forward(first_argument(node))
        if node.target is either:
            return self.in_forward(first_argument(node))
        if facts(node).part == "forward":
            return node
        if node not in self.moved:
            operands = {operand: self.in_forward(operand) for operand in node.all_input_nodes}
            with self.graph.inserting_after(max([self.last_input, *operands.values()])):
                made = self.graph.create_node(
                    "call_function",
                    node.target,
                    fx.map_arg(node.args, operands.__getitem__),
                    fx.map_arg(node.kwargs, operands.__getitem__),
                    name=self.name_in_forward(node),
                )
            made.meta = {**node.meta, FACTS: Facts(origin=facts(node).origin)}
            self.moved[node] = made
        return self.moved[node]

    def name_in_forward(self, node: fx.Node) -> str:
        """A name that says what the value is, whatever was asked for: recordings are read by name."""
        digest = hashlib.sha1(self.text(node).encode()).hexdigest()[:8]
        return f"{facts(node).origin}_{_name_of(node.target).partition('.')[0]}_{digest}"

    def text(self, node: fx.Node) -> str:
        """The formula of a value in terms of forward values."""
        if node.target in (promise, either):
            return self.text(first_argument(node))
        if facts(node).part == "forward":
            return node.name
        inner = {operand: self.text(operand) for operand in node.all_input_nodes}
        return f"{_name_of(node.target)}({fx.map_arg(node.args, inner.get)}, {fx.map_arg(node.kwargs, inner.get)})"

    def lower_references(self) -> list[Buffer]:
        """Make values of the reference run graph inputs, and views of them views."""
        known: dict[fx.Node, fx.Node] = {}
        readers: dict[fx.Node, list[str]] = {}
        for node in [n for n in self.graph.nodes if n.target is reference_promise]:
            value = first_argument(node)
            base = base_of(value)
            readers.setdefault(base, []).extend(facts(user).origin for user in node.users)
            if base not in known:
                known[base] = self.reference_input(base)
            node.replace_all_uses_with(self.seen_again(value, node, known))
            self.graph.erase_node(node)
        return [self.buffer(base, "reference", read) for base, read in readers.items()]

    def reference_input(self, node: fx.Node) -> fx.Node:
        """A graph input for the value of ``node`` in the reference run, behind the others."""
        with self.graph.inserting_after(self.last_input):
            self.last_input = made = self.graph.placeholder(f"reference_{node.name}")
        made.meta = {"val": tensor_of(node), FACTS: Facts(part="reference", origin=node.name)}
        return made

    def seen_again(self, value: fx.Node, at: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
        """``value`` as its views show a value that is known."""
        if value not in known:
            parent = first_argument(value)
            known[value] = self.copied(value, at, {parent: self.seen_again(parent, at, known)})
        return known[value]

    def buffers(self) -> list[Buffer]:
        """What relevance reads of the forward pass, in the order in which it does."""
        values = {made: value for value, made in self.again.items()}
        readers: dict[fx.Node, set[str]] = {}
        for user in reversed(self.readers()):
            origins = readers[user] if user in values else {facts(user).origin}
            for operand in user.all_input_nodes if user.op != "output" else self.returned(user):
                if operand in values or facts(operand).part == "forward":
                    readers.setdefault(operand, set()).update(origins)
        found = ((values.get(node, node), read) for node, read in reversed(readers.items()))
        rows = ((value, self.kind(value), read) for value, read in found)
        return [self.buffer(*row) for row in rows if row[1] != "view" or row[0] in self.promised]

    def returned(self, output: fx.Node) -> list[fx.Node]:
        """The results among what the joint graph returns."""
        values = output.args[0]
        assert isinstance(values, tuple)
        return list(values[len(values) - len(self.program.results) :])

    def kind(self, value: fx.Node) -> BufferKind:
        if value.op == "placeholder" or value.name in self.program.outputs:
            return "free"
        if value in self.again:
            return "view" if value in self.views else "recomputed"
        return "compressed" if facts(value).origin else "saved"

    def buffer(self, node: fx.Node, kind: BufferKind, readers: Iterable[str]) -> Buffer:
        value: Any = value_of(node)
        read = tuple(sorted(set(readers)))
        size = 0 if kind in ("free", "view") else bytes_of(value)
        holder = f"reference_{node.name}" if kind == "reference" else self.again.get(node, node).name
        if not isinstance(value, torch.Tensor):
            dtype = type(value).__name__.removeprefix("Sym").lower()
            return Buffer(node.name, kind, size, dtype, (), read, holder)
        dtype = str(value.dtype).removeprefix("torch.")
        return Buffer(node.name, kind, size, dtype, hints(value.shape), read, holder)


def is_kept_small(unpacked: fx.Node) -> bool:
    """Whether what is unpacked here stands on the forward side, as it does by now if that is where it is kept."""
    small = first_argument(unpacked)
    return facts(small).part == "forward" or (small.target in UNPACKERS and is_kept_small(small))


def _name_of(target: Any) -> str:
    """An op's name with its overload, or a function's; the text of a function tells its address in this process."""
    name: str = target.__name__
    return name
