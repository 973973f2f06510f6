"""The legal program after each pass, as tables of checks; the runner applies them and names the stage that broke."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lrp_compiler.passes.branches import programs_inside
from lrp_compiler.passes.emitter import PROMISES
from lrp_compiler.passes.errors import VerifierError
from lrp_compiler.passes.lifetimes import roots_of, writes
from lrp_compiler.passes.program import (
    Constant,
    InputKind,
    Program,
    carries_float,
    facts,
    forward_nodes,
    output_node,
    tensor_of,
)

Check = Callable[[Program], str | None]


def has_values(program: Program) -> str | None:
    """Every node has a fake value."""
    missing = [n.name for n in program.graph.nodes if n.op not in ("output", "get_attr") and "val" not in n.meta]
    return f"{missing[0]} has no fake value" if missing else None


def is_well_formed(program: Program) -> str | None:
    """fx's own lint: names unique, every argument defined before it is used."""
    for graph in (program.graph, program.relevance_graph):
        if graph is not None:
            try:
                graph.lint()
            except (RuntimeError, AssertionError) as error:
                return str(error)
    return None


def keeps_interface(program: Program) -> str | None:
    """The graph inputs are the declared ones, in order, and the named outputs exist."""
    names = {node.name for node in program.graph.nodes}
    placeholders = [n.name for n in program.graph.nodes if n.op == "placeholder" and facts(n).part == "forward"]
    if placeholders != [spec.node for spec in program.inputs]:
        return "the placeholders are not the program's inputs"
    wanted = [leaf for leaf in program.outputs if not isinstance(leaf, Constant)]
    wanted += [mutation.value for mutation in program.mutations]
    gone = [name for name in wanted if name not in names]
    return f"the output {gone[0]} is gone" if gone else None


def is_flat(program: Program) -> str | None:
    """No sub-graphs: only calls of ATen ops and of python's own indexing."""
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            return f"{node.name} is a {node.op}"
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"{node.name} calls the higher-order op {node.target}"
    return None


def is_functional(program: Program) -> str | None:
    """No op writes to its arguments."""
    for node in program.graph.nodes:
        if writes(node):
            return f"{node.name} writes to an argument ({node.target})"
    return None


def has_sources(program: Program) -> str | None:
    """Every attributed input has a live float source."""
    nodes = program.nodes_by_name()
    for name, found in program.sources.items():
        if not found or not all(facts(nodes[source]).live and carries_float(nodes[source]) for source in found):
            return f"the attributed input {name} has no live source"
    return None if program.sources else "nothing is attributed"


def live_has_rule(program: Program) -> str | None:
    """A live node that relevance flows through has a rule, unless listed as uncovered, and a live input it flows to."""
    sources = {name for found in program.sources.values() for name in found}
    uncovered = {row.node for row in program.uncovered}
    for node in forward_nodes(program):
        known = facts(node)
        if known.flows and node.name not in sources | uncovered and known.rule is None:
            return f"relevance flows through {node.name}, which has no rule"
        if known.flows and not known.live:
            return f"relevance flows through {node.name}, which is not live"
    return None


def promises_guard_values(program: Program) -> str | None:
    """Relevance ops read forward values through promises only, and promises promise forward values."""
    for node in program.graph.nodes:
        part = facts(node).part
        if part == "promise" and facts(node.args[0]).part != "forward":
            return f"{node.name} promises something that is no forward value"
        if part == "relevance":
            for argument in node.all_input_nodes:
                if facts(argument).part == "forward":
                    return f"{node.name} reads the forward value {argument.name} without a promise"
        if part == "forward" and node.op != "output" and any(facts(a).part != "forward" for a in node.all_input_nodes):
            return f"the forward node {node.name} depends on relevance"
    return None


def results_are_relevance(program: Program) -> str | None:
    """The graph returns one node per declared result, after its own outputs."""
    returned = output_node(program.graph).args[0]
    if not isinstance(returned, tuple) or len(returned) < len(program.results):
        return "the output lacks results"
    return None


def no_promises(program: Program) -> str | None:
    """Every promise has been lowered; relevance reads forward values only out of planned buffers."""
    planned = {buffer.name for buffer in program.buffers if buffer.kind in ("free", "saved", "compressed")}
    referenced = {buffer.name for buffer in program.buffers if buffer.kind == "reference"}
    for node in program.graph.nodes:
        if node.target in PROMISES:
            return f"the promise {node.name} was not lowered"
        if facts(node).part == "reference" and facts(node).origin not in referenced:
            return f"{node.name} is a value of the reference run for which no buffer is planned"
        if facts(node).part == "relevance":
            for argument in node.all_input_nodes:
                if facts(argument).part == "forward" and argument.name not in planned:
                    return f"{node.name} reads {argument.name}, for which no buffer is planned"
    return None


def is_partitioned(program: Program) -> str | None:
    """The forward graph holds forward ops only, the relevance graph none of them."""
    for node in program.graph.nodes:
        if facts(node).part not in ("forward", "prepared") and node.op != "output":
            return f"the forward graph holds the {facts(node).part} node {node.name}"
    if program.relevance_graph is None:
        return "there is no relevance graph"
    for node in program.relevance_graph.nodes:
        if node.op == "call_function" and facts(node).part != "relevance":
            return f"the relevance graph holds the forward op {node.name}"
    return None


def writes_to_its_own(program: Program) -> str | None:
    """Neither graph writes to its arguments: those are the caller's."""
    for graph in (program.graph, program.relevance_graph):
        for node, root in (roots_of(graph) if graph is not None else {}).items():
            if root.op == "placeholder" and root is not node and writes(node):
                return f"{node.name} writes to {root.name}, which the caller holds"
    return None


def values_match_ops(program: Program) -> str | None:
    """Fake values of graph inputs are of a shape that their readers can trust: a seed's is its output's."""
    nodes = program.nodes_by_name()
    for node in program.graph.nodes:
        # Rows of an output that nothing reads are gone by now.
        seeded = nodes.get(facts(node).origin) if facts(node).part == "seed" else None
        if seeded is not None and tensor_of(node).shape != tensor_of(seeded).shape:
            return f"the seed {node.name} has another shape than the output {facts(node).origin}"
    return None


def user_inputs_only_once(program: Program) -> str | None:
    """There is one placeholder per user leaf."""
    users = sum(spec.kind is InputKind.USER for spec in program.inputs)
    leaves = program.in_spec.num_leaves
    return None if users == leaves else f"{users} user placeholders for {leaves} argument leaves"


COMMON: tuple[Check, ...] = (has_values, is_well_formed, keeps_interface)
FLAT: tuple[Check, ...] = (*COMMON, is_flat)
FUNCTIONAL: tuple[Check, ...] = (*FLAT, is_functional)
ANALYSED: tuple[Check, ...] = (*FUNCTIONAL, has_sources)
JOINT: tuple[Check, ...] = (
    *FUNCTIONAL,
    live_has_rule,
    promises_guard_values,
    results_are_relevance,
    values_match_ops,
)

LEGAL: dict[str, tuple[Check, ...]] = {
    "capture": (*COMMON, user_inputs_only_once),
    "clean": FLAT,
    "cast_explicitly": FLAT,
    "pin": FLAT,
    "decompose": FLAT,
    "functionalise": FUNCTIONAL,
    "settle_masks": FUNCTIONAL,
    "canonicalise": FUNCTIONAL,
    "recognise": FUNCTIONAL,
    "analyse": ANALYSED,
    "assign_rules": (*ANALYSED, live_has_rule),
    "specialise": (*ANALYSED, live_has_rule),
    "insert_relevance": JOINT,
    "simplify": JOINT,
    "fuse": JOINT,
    "compress": JOINT,
    "set_precision": JOINT,
    "lower_promises": (*FUNCTIONAL, no_promises),
    "fuse_elementwise": (*FUNCTIONAL, no_promises),
    "partition": (*FUNCTIONAL, is_partitioned),
    "prepare_weights": (*FUNCTIONAL, is_partitioned),
    "share_memory": (*FLAT, is_partitioned, writes_to_its_own),
    "plan_memory": (*FLAT, is_partitioned, writes_to_its_own),
}
"""Pass name -> what must hold after it."""


def verify(program: Program, stage: str) -> None:
    """Apply the checks of ``stage``, to branches of torch.cond too; raises VerifierError naming what fails first."""
    for inner in programs_inside(program):
        # A branch that nothing attributed enters is neither analysed nor explained.
        if inner.sources or has_sources not in LEGAL[stage]:
            verify(inner, stage)
    for check in LEGAL[stage]:
        cause = check(program)
        if cause is not None:
            raise VerifierError(stage=stage, cause=cause)
