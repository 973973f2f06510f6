"""torch.cond as one op of the graph, and the programs inside it, of which a call runs one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, fx

from lrp_compiler.passes.buffers import free_values, saved_values
from lrp_compiler.passes.program import Constant, Program, facts, forward_nodes

SIDES = ("true", "false")


@dataclass(frozen=True, eq=False)
class Branches:
    """A call target that holds two programs: what is taken when the predicate holds, and what else."""

    branches: tuple[Program, ...]
    __name__: ClassVar[str] = "branches"

    def mapped(self, change: Callable[[Program], Program]) -> Self:
        """The same with ``change`` applied to each program."""
        return type(self)(tuple(change(branch) for branch in self.branches))

    def __call__(self, predicate: Any, *values: Any) -> Any:
        """Graphs take callables only; codegen puts code in this one's place."""
        raise TypeError(f"{self.__name__} has to be compiled before it can run")


class Conditional(Branches):
    """torch.cond: (predicate, *operands) -> outputs, then what each branch recorded for relevance.

    What the branch that was not taken would have recorded is None.
    """

    __name__: ClassVar[str] = "cond"


class ConditionalRelevance(Branches):
    """The relevance of a Conditional: (predicate, what each branch reads, *seeds) -> results of the branch taken."""

    __name__: ClassVar[str] = "cond_relevance"


def within(program: Program, change: Callable[[Program], Program]) -> Program:
    """``program`` with ``change`` applied to every program directly inside it; itself where there is none."""
    if not any(True for _ in programs_inside(program)):
        return program
    made: dict[int, Program] = {}

    def once(inner: Program) -> Program:
        # A branch that was explained stands in the graph twice: forward and relevance.
        if id(inner) not in made:
            made[id(inner)] = change(inner)
        return made[id(inner)]

    program = program.fork()
    for node in program.graph.nodes:
        if isinstance(node.target, Branches):
            node.target = node.target.mapped(once)
    return program


def programs_inside(program: Program) -> Iterator[Program]:
    """The programs directly inside ``program``."""
    for node in program.graph.nodes:
        if isinstance(node.target, Branches):
            yield from node.target.branches


def with_programs_inside(program: Program) -> Iterator[Program]:
    """``program`` and all programs inside it, however deep."""
    yield program
    yield from programs_below(program)


def programs_below(program: Program) -> Iterator[Program]:
    """All programs inside ``program``, however deep."""
    for inner in programs_inside(program):
        yield from with_programs_inside(inner)


def forward_nodes_everywhere(program: Program) -> Iterator[fx.Node]:
    """The nodes that compute the model itself, those inside branches behind the op that holds them."""
    for node in forward_nodes(program):
        yield node
        if isinstance(node.target, Conditional):
            for branch in node.target.branches:
                yield from forward_nodes_everywhere(branch)


def relevance_nodes_everywhere(program: Program) -> Iterator[fx.Node]:
    """The nodes of the relevance graph, those inside branches behind the op that holds them."""
    for node in program.relevance_graph.nodes if program.relevance_graph is not None else ():
        yield node
        if isinstance(node.target, ConditionalRelevance):
            for branch in node.target.branches:
                yield from relevance_nodes_everywhere(branch)


def operands_of(node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands of a Conditional, behind its predicate."""
    return node.args[1:]  # type: ignore[return-value]


def outputs_of(branch: Program) -> list[fx.Node | None]:
    """The nodes that a branch returns, None for each constant."""
    nodes = branch.nodes_by_name()
    return [None if isinstance(leaf, Constant) else nodes[leaf] for leaf in branch.outputs]


def operand_names(branch: Program) -> list[str]:
    """The graph inputs of a branch that hold its operands; the others hold tensors of rules."""
    return [spec.node for spec in branch.inputs if spec.constant is None]


def rule_tensors(branch: Program) -> dict[str, Tensor]:
    """The graph inputs of a branch that hold tensors of rules, and those."""
    return {spec.node: spec.constant for spec in branch.inputs if spec.constant is not None}


def kept_names(branch: Program) -> list[str]:
    """The values inside a branch that its forward pass returns for relevance, behind its outputs."""
    return saved_values(branch)


def read_names(branch: Program) -> list[str]:
    """The operands, then the kept values, that the relevance of a branch reads."""
    tensors = rule_tensors(branch)
    free = [name for name in free_values(branch) if name not in tensors]
    return [*free, *kept_names(branch)]


def read_output(node: fx.Node) -> tuple[fx.Node, ...]:
    """Of a node that reads one output of a Conditional, that output in each branch that computes it."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return ()
    target, index = node.args[0].target, int(str(node.args[1]))
    if not isinstance(target, Conditional):
        return ()
    found = (outputs_of(branch)[index] for branch in target.branches)
    return tuple(output for output in found if output is not None)


def is_dead_end(node: fx.Node) -> bool:
    """Whether ``node`` reads an output of a Conditional that relevance flows through in no branch."""
    outputs = read_output(node)
    return bool(outputs) and not any(facts(output).flows for output in outputs)
