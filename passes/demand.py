"""What relevance-space propagation would have to ask for: the promises of DynamicLRP (arXiv 2512.07010), counted.

Where relevance itself travels, a sum is shared out by its terms, which autograd does not keep: the op has to promise
its relevance until each term has been recovered from the nearest op that autograd keeps enough of (definitions 2 to 4).
Coefficients need no terms. The count says how much of that there would be; nothing is computed from it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from lrp_compiler.passes.optable import OpClass, aten_names, classify, op_name
from lrp_compiler.passes.program import InputKind, Program, carries_float, facts, forward_nodes

TERMS = aten_names("add sub rsub")
TOTALS = aten_names("sum mean softmax _softmax _safe_softmax")
JOINS = aten_names("cat concat stack hstack vstack")
PARTS = aten_names("split split_with_sizes unsafe_split chunk unbind")
SCALES = frozenset({OpClass.ADD, OpClass.MULTIPLY, OpClass.DIVIDE, OpClass.MOVEMENT})
"""Classes of ops that a search passes through where they have one operand: autograd keeps no value for them."""


@dataclass(frozen=True)
class Demand:
    """One branch of a promise: the op that needs a value, the value, and the nodes between that and what is kept."""

    op: str
    value: str
    between: tuple[str, ...]

    @property
    def steps(self) -> int:
        """How far away the value can be recovered."""
        return len(self.between) + 1


def demands(program: Program) -> tuple[Demand, ...]:
    """The forward values that relevance-space propagation asks for at live ops beyond what autograd keeps.

    An addition asks for its terms, of which a linear op's bias and product are two, a concatenation for its pieces,
    a sum, a mean and a softmax (by the rule of AttnLRP) for their operand; a split for its operand when a search
    arrives there. Values without gradient, such as masks, are not asked for.
    """
    learned = _with_gradient(program)
    found: list[Demand] = []
    arrived: set[fx.Node] = set()
    for node in reversed(list(forward_nodes(program))):
        if node.op == "call_function" and facts(node).live:
            for value in _needed(node, learned, node in arrived):
                between, end = _search(node, value, learned)
                arrived.add(end)
                found.append(Demand(node.name, value.name, between))
    return tuple(found)


def _with_gradient(program: Program) -> set[fx.Node]:
    """Values that depend on an attributed input or on a parameter."""
    parameters = {spec.node for spec in program.inputs if spec.kind is InputKind.PARAMETER}
    found: set[fx.Node] = set()
    for node in forward_nodes(program):
        derived = carries_float(node) and any(operand in found for operand in node.all_input_nodes)
        if facts(node).live or node.name in parameters or derived:
            found.add(node)
    return found


def _needed(node: fx.Node, learned: set[fx.Node], is_reached: bool) -> list[fx.Node]:
    """The values that ``node`` asks for; ``is_reached`` says that a search arrived at it."""
    values = [operand for operand in _operands(node) if operand in learned]
    entry, name = classify(node), op_name(node)
    if name in TERMS:
        return values if len(values) > 1 else []
    if name in JOINS:
        return values
    if name in TOTALS or (name in PARTS and is_reached):
        return values[:1]
    terms = entry.terms if entry is not None and entry.op_class is OpClass.LINEAR else ()
    biases = [term for place in terms for term in node.args[place : place + 1] if term in learned]
    return [node, *biases] if biases else []  # type: ignore[list-item]


def _search(node: fx.Node, value: fx.Node, learned: set[fx.Node]) -> tuple[tuple[str, ...], fx.Node]:
    """The nodes passed on the way from ``value`` to the first that can give it, and that one."""
    between = []
    while value is not node and (source := _passed(value, learned)) is not None:
        between.append(value.name)
        value = source
    return tuple(between), value


def _passed(node: fx.Node, learned: set[fx.Node]) -> fx.Node | None:
    """The operand that ``node`` merely shows, moves or scales, or None where autograd keeps a value or a sum stops."""
    if node.op != "call_function" or op_name(node) in PARTS | JOINS:
        return None
    if node.target is operator.getitem:
        source = node.args[0]
        return source if isinstance(source, fx.Node) and op_name(source) in PARTS else None
    entry = classify(node)
    values = [operand for operand in _operands(node) if operand in learned]
    passes = entry is not None and entry.op_class in SCALES and len(values) == 1
    return values[0] if passes else None


def _operands(node: fx.Node) -> list[fx.Node]:
    """The nodes that ``node`` reads, as often as it reads them."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda operand: found.append(operand))
    return found
