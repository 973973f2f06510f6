"""What the relevance of a torch.cond reads becomes promises of its own graph: operands, and values inside a branch."""

from __future__ import annotations

import operator

from torch import fx

from lrp_compiler.passes.branches import (
    SIDES,
    Conditional,
    ConditionalRelevance,
    kept_names,
    operand_names,
    operands_of,
    read_names,
)
from lrp_compiler.passes.emitter import promise
from lrp_compiler.passes.program import FACTS, Facts, Program, facts, value_of


def promise_branches(program: Program) -> None:
    """Hand the relevance of every torch.cond what its branches read, after the promises inside have been lowered.

    A value kept inside a branch becomes one more output of the Conditional, None where the other branch runs. Changes
    the graph of ``program`` in place (the caller owns it).
    """
    nodes = program.nodes_by_name()
    for node in [n for n in program.graph.nodes if isinstance(n.target, ConditionalRelevance)]:
        forward = nodes[facts(node).origin]
        forward.target = Conditional(node.target.branches)
        read: list[fx.Node] = []
        for side, branch in zip(SIDES, node.target.branches, strict=True):
            known = dict(zip(operand_names(branch), operands_of(forward), strict=True))
            known.update(_kept_outputs(program.graph, forward, side, branch))
            read += [known[name] for name in read_names(branch)]
        with program.graph.inserting_before(node):
            promised = [_promised(program.graph, value) for value in read]
        node.args = (node.args[0], *promised, *node.args[1:])


def _kept_outputs(graph: fx.Graph, forward: fx.Node, side: str, branch: Program) -> dict[str, fx.Node]:
    """New readers of what a branch keeps, behind its Conditional; their names say what they hold for any request."""
    made: dict[str, fx.Node] = {}
    inside = branch.nodes_by_name()
    for name in kept_names(branch):
        place = len(value_of(forward))
        forward.meta["val"] = (*value_of(forward), value_of(inside[name]))
        with graph.inserting_after(forward):
            reader = graph.create_node(
                "call_function", operator.getitem, (forward, place), name=f"{forward.name}_{side}_{name}"
            )
        assert reader.name == f"{forward.name}_{side}_{name}", f"{reader.name} was to have another name"
        reader.meta = {"val": value_of(inside[name]), FACTS: Facts()}
        made[name] = reader
    return made


def _promised(graph: fx.Graph, value: fx.Node) -> fx.Node:
    node = graph.call_function(promise, (value,))
    node.meta = {"val": value_of(value), FACTS: Facts(part="promise", origin=value.name)}
    return node
