"""Mixtures of experts: products of expert outputs with the routing weights that a top-k of router scores leaves.

Router scores come from a linear map; a top-k (or maximum) selects, and what it selects is normalised, gathered, spread
over all experts or masked. One sweep in graph order knows which values are such weights, and which are only choices.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx

from lrp_compiler.passes.dataflow import Flow, factors, float_operands, stripped, value_operands
from lrp_compiler.passes.optable import OpClass, aten_names, classify, op_name
from lrp_compiler.passes.program import Structure, facts, learn

aten = torch.ops.aten
CHOICES = frozenset({aten.topk.default, aten.max.dim, aten.sort.default})
"""Ops that return the largest scores, then where they are."""

SCORING = frozenset({OpClass.MOVEMENT, OpClass.ADD, OpClass.SOFTMAX, OpClass.ACTIVATION, OpClass.NONLINEAR})
"""What lies between a router's linear map and the choice."""

WEIGHING = SCORING | {OpClass.MULTIPLY, OpClass.DIVIDE, OpClass.REDUCTION, OpClass.TUPLE}
"""What routing weights are made of each other by: normalised, scaled, masked, spread."""

PICKS = aten_names("gather index index_select take mul masked_fill where scatter")
"""What takes the chosen ones out of all scores."""


def recognise_routing(flow: Flow) -> None:
    """Mark each product of routing weights with what experts have made."""
    found = _Routing()
    for node in flow.nodes:
        if node.op != "call_function":
            continue
        if node.target in CHOICES and node in flow.signals:
            router = _router_of(flow, node)
            if router is not None:
                found.choices[node] = router
        elif found.choices:
            _spread(flow, node, found)


@dataclass(frozen=True, eq=False)
class _Router:
    """One choice: the scores it is made of, and the value that they are a linear map of."""

    scores: frozenset[fx.Node]
    source: fx.Node


@dataclass
class _Routing:
    """Which values are choices and which are routing weights, by the router they come from."""

    choices: dict[fx.Node, _Router] = field(default_factory=dict)
    weights: dict[fx.Node, _Router] = field(default_factory=dict)


def _router_of(flow: Flow, choice: fx.Node) -> _Router | None:
    """The scores that ``choice`` selects from, down to a linear map of one value; None where they are none."""
    waiting, scores, sources = list(choice.all_input_nodes), set[fx.Node](), set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in scores or node not in flow.signals:
            continue
        entry = classify(node) if node.op == "call_function" else None
        signals = [operand for operand in node.all_input_nodes if operand in flow.signals]
        if entry is None or (entry.op_class is OpClass.LINEAR and len(signals) != 1):
            return None
        scores.add(node)
        if entry.op_class is OpClass.LINEAR:
            sources.add(stripped(signals[0]))
        elif entry.op_class in SCORING | {OpClass.MULTIPLY, OpClass.DIVIDE}:
            waiting += signals
        else:
            return None
    return _Router(frozenset(scores), sources.pop()) if len(sources) == 1 else None


def _spread(flow: Flow, node: fx.Node, found: _Routing) -> None:
    """Learn whether ``node`` is a routing weight or a choice, or mark it as a product with one."""
    if node.target is operator.getitem and node.args[0] in found.choices:
        router = found.choices[node.args[0]]  # type: ignore[index]
        (found.weights if node.args[1] == 0 else found.choices)[node] = router
        return
    chosen = _chosen(node, found)
    weighing = [operand for operand in value_operands(node) if operand in found.weights]
    if chosen is not None and node not in flow.signals:
        found.choices[node] = chosen
    elif chosen is not None and not weighing and _picks(flow, node, chosen):
        found.weights[node] = chosen
    elif weighing:
        _weigh(flow, node, weighing, found)


def _chosen(node: fx.Node, found: _Routing) -> _Router | None:
    """The router whose choice ``node`` reads."""
    return next((found.choices[operand] for operand in value_operands(node) if operand in found.choices), None)


def _picks(flow: Flow, node: fx.Node, router: _Router) -> bool:
    """Whether ``node`` takes the chosen ones out of all of a router's scores."""
    signals = [operand for operand in node.all_input_nodes if operand in flow.signals]
    return op_name(node) in PICKS and all(operand in router.scores for operand in signals)


def _weigh(flow: Flow, node: fx.Node, weighing: list[fx.Node], found: _Routing) -> None:
    """``node`` reads routing weights: it is one, or it weighs an expert's output by one."""
    router = found.weights[weighing[0]]
    others = [operand for operand in float_operands(node) if operand in flow.signals and operand not in found.weights]
    entry = classify(node)
    if not others:
        spread = entry is not None and entry.op_class is OpClass.LINEAR and _chosen(node, found) is not None
        if spread or (entry is not None and entry.op_class in WEIGHING):
            found.weights[node] = router
        return
    pair = factors(node)
    if pair is None or len(weighing) != 1 or len(others) != 1 or not _is_experts(flow, others[0], router):
        return
    roles = (("weight", weighing[0].name), ("expert", others[0].name))
    learn(node, structures=(*facts(node).structures, Structure("routing", roles)))


def _is_experts(flow: Flow, output: fx.Node, router: _Router) -> bool:
    """Whether ``output`` was computed beside the router, from the value that it reads: by linear maps and more."""
    waiting, seen, mapped = [output], set[fx.Node](), False
    while waiting:
        node = waiting.pop()
        if node in seen or node not in flow.signals:
            continue
        seen.add(node)
        if node is router.source:
            continue
        if node in router.scores or flow.places[node] < flow.places[router.source]:
            return False
        entry = classify(node) if node.op == "call_function" else None
        mapped = mapped or (entry is not None and entry.op_class is OpClass.LINEAR)
        waiting += [operand for operand in node.all_input_nodes if operand in flow.signals]
    return mapped
