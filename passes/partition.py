"""partition: the joint graph -> a forward graph (outputs, mutations, buffers) and a relevance graph."""

from __future__ import annotations

from torch import fx

from lrp_compiler.passes.branches import within
from lrp_compiler.passes.buffers import free_values, recorded_values, reference_values, saved_values
from lrp_compiler.passes.program import Constant, Program, facts, output_node


def partition(program: Program) -> Program:
    """Cut where relevance begins.

    The forward graph returns (output leaves that are tensors, mutated values, recorded values); the relevance graph
    takes (free values, saved buffers, values of the reference run, cast parameters, seeds) and returns the results in
    order.
    """
    return program.having(graph=_forward_graph(program), relevance_graph=_relevance_graph(program))


def forward_only(program: Program) -> Program:
    """The forward graph alone, nothing kept."""
    program = within(program, forward_only)
    return program.having(graph=_forward_graph(program))


def _forward_graph(program: Program) -> fx.Graph:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op != "output" and facts(node).part == "forward":
            values[node] = graph.node_copy(node, lambda old: values[old])
    nodes = program.nodes_by_name()
    leaves = [leaf for leaf in program.outputs if not isinstance(leaf, Constant)]
    mutated = [mutation.value for mutation in program.mutations]
    graph.output(tuple(values[nodes[name]] for name in [*leaves, *mutated, *recorded_values(program)]))
    graph.eliminate_dead_code()
    return graph


def _relevance_graph(program: Program) -> fx.Graph:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    nodes = program.nodes_by_name()
    seeds = [node for node in program.graph.nodes if facts(node).part == "seed"]
    promised = [nodes[name] for name in [*free_values(program), *saved_values(program)]]
    inputs = {facts(node).origin: node for node in program.graph.nodes if facts(node).part == "reference"}
    casts = [nodes[cast.name] for cast in program.casts]
    for node in [*promised, *(inputs[name] for name in reference_values(program)), *casts, *seeds]:
        values[node] = graph.placeholder(node.name)
        values[node].meta = dict(node.meta)
    for node in program.graph.nodes:
        if node.op != "output" and facts(node).part == "relevance":
            values[node] = graph.node_copy(node, lambda old: values[old])
    returned = output_node(program.graph).args[0]
    assert isinstance(returned, tuple)
    results = returned[len(returned) - len(program.results) :]
    graph.output(tuple(values[node] for node in results))  # type: ignore[index]
    return graph
