"""Rotary embeddings in three spellings: x cos + rotated(x) sin, halves or pairs turned one by one, complex products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lrp_compiler.passes.dataflow import CASTS, Flow
from lrp_compiler.passes.optable import aten_names, op_name
from lrp_compiler.passes.program import Structure, first_argument, learn, tensor_of

aten = torch.ops.aten
CUTS = aten_names("slice select split split_with_sizes chunk unbind narrow unsafe_split") | {"builtin::getitem"}
JOINS = aten_names("cat stack concat")
LAYOUTS = CASTS | aten_names("view reshape _unsafe_view flatten unflatten squeeze unsqueeze")


@dataclass(frozen=True)
class RotaryForm:
    """Of the rotated value the dimension, from the end, that positions run along."""

    token_dim: int


@dataclass(frozen=True)
class _Turned:
    """One sum of two products: the values, their constant factors, and whether one is subtracted."""

    values: tuple[fx.Node, fx.Node]
    factors: tuple[fx.Node, fx.Node]
    subtracts: bool
    members: tuple[fx.Node, ...]


def recognise_rotary(flow: Flow) -> None:
    """Mark what ends each rotation: the sum, what joins two turned parts, or what a complex product is read as."""
    for node in flow.nodes:
        if node not in flow.signals or node.op != "call_function":
            continue
        if op_name(node) in ("aten::add", "aten::sub"):
            _mark_sum(flow, node)
        elif op_name(node) in JOINS:
            _mark_join(flow, node)
        elif node.target is aten.view_as_real.default:
            _mark_complex(flow, node)


def _mark_sum(flow: Flow, node: fx.Node) -> None:
    """x cos + rotated(x) sin: the other value is x itself, cut, one part negated, and joined."""
    for turned in _turned(flow, node):
        whole, moved = turned.values
        inner: list[fx.Node] = []
        if not turned.subtracts and _is_rotated(moved, whole, inner):
            _mark(flow, node, whole, turned.factors, (*turned.members, *inner), 0)
            return


def _mark_join(flow: Flow, node: fx.Node) -> None:
    """x1 cos - x2 sin beside x2 cos + x1 sin: x1 and x2 are cut from one value."""
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or not all(isinstance(part, fx.Node) for part in parts):
        return
    sums = [_pairs(flow, _laid_out(part)) for part in parts if isinstance(part, fx.Node)]
    for first in sums[0]:
        for second in sums[1]:
            crossed = first.values == second.values[::-1] and {first.subtracts, second.subtracts} == {True, False}
            source = _cut_from(first.values)
            if crossed and source is not None and first.factors != second.factors[::-1]:
                depth = tensor_of(node).dim() - tensor_of(first.members[0]).dim()
                _mark(flow, node, source, first.factors, (*first.members, *second.members), depth)
                return


def _mark_complex(flow: Flow, node: fx.Node) -> None:
    """The real and imaginary parts of pairs, as complex numbers, times constant ones."""
    product = first_argument(node)
    if op_name(product) != "aten::mul" or not all(isinstance(value, fx.Node) for value in product.args):
        return
    for value, factor in (product.args, product.args[::-1]):
        assert isinstance(value, fx.Node) and isinstance(factor, fx.Node)
        if value.target is aten.view_as_complex.default and value in flow.signals and _varies(flow, factor):
            _mark(flow, node, first_argument(value), (factor,), (value, product), 1)
            return


def _mark(
    flow: Flow,
    node: fx.Node,
    value: fx.Node,
    factors: tuple[fx.Node, ...],
    members: tuple[fx.Node, ...],
    depth: int,
) -> None:
    """``depth`` counts the dimensions that the rotated value has behind those of its factors."""
    shape = tensor_of(factors[0]).shape
    changing = [dim for dim in range(1 - len(shape), 0) if dim != -1 and shape[dim] > 1]
    form = RotaryForm((changing[-1] if changing else -2) - depth)
    roles = (("value", value.name), *((f"factor_{place}", factor.name) for place, factor in enumerate(factors)))
    structure = Structure("rotary", roles, flow.inside(node, members), form)
    learn(node, structures=(structure,))


def _pairs(flow: Flow, node: fx.Node) -> list[_Turned]:
    """``node`` as a sum of two products with constants, in both orders where they add."""
    return _turned(flow, node) if op_name(node) in ("aten::add", "aten::sub") else []


def _turned(flow: Flow, node: fx.Node) -> list[_Turned]:
    """A sum or difference of two products of a value and a constant that varies along its features."""
    terms = [term for term in node.args if isinstance(term, fx.Node)]
    if len(terms) != 2 or node.kwargs or any(op_name(term) != "aten::mul" for term in terms):
        return []
    first, second = (_value_and_factor(flow, term) for term in terms)
    if first is None or second is None:
        return []
    subtracts = op_name(node) == "aten::sub"
    (value, factor), (other, other_factor) = first, second
    members = (node, *terms)
    found = [_Turned((value, other), (factor, other_factor), subtracts, members)]
    return found if subtracts else [*found, _Turned((other, value), (other_factor, factor), subtracts, members)]


def _value_and_factor(flow: Flow, product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    values = [value for value in product.args if isinstance(value, fx.Node)]
    if len(values) != 2:
        return None
    for value, factor in (values, values[::-1]):
        if value in flow.signals and _varies(flow, factor):
            return value, factor
    return None


def _varies(flow: Flow, factor: fx.Node) -> bool:
    """Whether a constant is one of positions and features."""
    shape = tensor_of(factor).shape
    return flow.is_fixed(factor) and len(shape) >= 2 and shape[-1] > 1


def _laid_out(node: fx.Node) -> fx.Node:
    while op_name(node) in LAYOUTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _is_rotated(moved: fx.Node, whole: fx.Node, inner: list[fx.Node]) -> bool:
    """Whether ``moved`` joins two parts of ``whole``, one of them negated."""
    joined = _laid_out(moved)
    parts = joined.args[0] if op_name(joined) in JOINS else None
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return False
    inner += [moved, joined]
    negated = 0
    for part in parts:
        while part is not whole:
            if not isinstance(part, fx.Node) or part.op != "call_function":
                return False
            if op_name(part) == "aten::neg":
                negated += 1
            elif op_name(part) not in CUTS | LAYOUTS:
                return False
            inner.append(part)
            part = part.args[0]
    return negated == 1


def _cut_from(values: tuple[fx.Node, fx.Node]) -> fx.Node | None:
    """The value that both of two parts are cut from."""
    sources: list[fx.Node] = []
    for part in values:
        cut = _laid_out(part)
        if op_name(cut) not in CUTS:
            return None
        source = first_argument(cut)
        sources.append(first_argument(source) if op_name(cut) == "builtin::getitem" else source)
    return (
        _laid_out(sources[0]) if _laid_out(sources[0]) is _laid_out(sources[1]) and values[0] is not values[1] else None
    )
