"""Activations spelled out: GELU's tanh approximation, and softcap, c tanh(x / c)."""

from __future__ import annotations

import math

import torch
from torch import fx

from lrp_compiler.passes.dataflow import Flow, multiple, number, summands
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.program import Pattern, facts, learn

aten = torch.ops.aten
CUBIC = 0.044715
LINEAR = math.sqrt(2.0 / math.pi)
SEVEN_DIGITS = 1e-7
DEEPEST = 8
"""More ops than this lie between x and the cubic polynomial of no spelling."""


def recognise_activations(flow: Flow) -> None:
    """Mark each softcap and each GELU that is made of a tanh."""
    for node in flow.nodes:
        if node.target is aten.tanh.default:
            _mark_softcap(flow, node)
            _mark_gelu(flow, node)


def _mark_softcap(flow: Flow, tanh: fx.Node) -> None:
    """c tanh(x / c), where nothing else scales."""
    inner = tanh.args[0]
    scaled = multiple(inner) if isinstance(inner, fx.Node) else None
    if scaled is None:
        return
    x, inverse = scaled
    for user in tanh.users:
        outer = multiple(user)
        if outer is not None and math.isclose(outer[1] * inverse, 1.0, rel_tol=SEVEN_DIGITS) and inverse > 0:
            members = flow.inside(user, (tanh, inner))  # type: ignore[arg-type]
            cap = (("cap", outer[1]),)
            learn(user, pattern=Pattern("softcap", (x.name,), (), members, numbers=cap))


def _mark_gelu(flow: Flow, tanh: fx.Node) -> None:
    """x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2, whatever is multiplied first; 1 + tanh is twice the gate."""
    for user in tanh.users:
        terms = summands(user)
        if terms is None or [number(term) for term in terms if term is not tanh] != [1.0]:
            continue
        for path in _products_of(user):
            root, inner = path[-1], [*path, user, tanh]
            x = _half_of(user, path, inner)
            cubic = None if x is None else _polynomial(tanh.args[0], x, inner, DEEPEST)
            if x is not None and cubic is not None and _is_gelus(cubic) and facts(root).pattern is None:
                learn(root, pattern=Pattern("gelu_tanh", (x.name,), (user.name,), flow.inside(root, inner)))


def _products_of(node: fx.Node) -> list[list[fx.Node]]:
    """The products that ``node`` enters, and after those the next."""
    first = [[user] for user in node.users]
    return first + [[product, user] for (product,) in first for user in product.users]


def _half_of(factor: fx.Node, path: list[fx.Node], inner: list[fx.Node]) -> fx.Node | None:
    """x, where the products of ``path`` multiply ``factor`` by x / 2; further products on the way join ``inner``."""
    total, others = 1.0, []
    for node in path:
        scaled = multiple(node)
        if scaled is not None:
            total *= scaled[1]
        elif op_name(node) == "aten::mul" and len(node.all_input_nodes) == 2:
            others += [value for value in node.all_input_nodes if value is not factor]
        else:
            return None
        factor = node
    if len(others) != 1:
        return None
    (x,) = others
    while not math.isclose(total, 0.5) and (scaled := multiple(x)) is not None:
        inner.append(x)
        x, total = scaled[0], total * scaled[1]
    return x if math.isclose(total, 0.5) else None


def _polynomial(value: object, x: fx.Node, inner: list[fx.Node], depth: int) -> dict[int, float] | None:
    """``value`` as coefficients by power of ``x``; its ops are added to ``inner``."""
    constant = number(value)
    if constant is not None:
        return {0: constant}
    if value is x:
        return {1: 1.0}
    if not isinstance(value, fx.Node) or depth == 0 or value.kwargs or len(value.args) > 2:
        return None
    name, parts = op_name(value), [_polynomial(part, x, inner, depth - 1) for part in value.args]
    if any(part is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    inner.append(value)
    if name == "aten::add":
        return {power: sum(part.get(power, 0.0) for part in known) for power in {*known[0], *known[1]}}
    if name == "aten::mul":
        return _multiplied(*known)
    if name == "aten::square":
        return _multiplied(known[0], known[0])
    if name == "aten::pow" and known[1].keys() == {0} and known[1][0] in (2.0, 3.0):
        squared = _multiplied(known[0], known[0])
        return squared if known[1][0] == 2.0 else _multiplied(squared, known[0])
    return None


def _multiplied(left: dict[int, float], right: dict[int, float]) -> dict[int, float]:
    found: dict[int, float] = {}
    for (power, a), (other, b) in ((p, q) for p in left.items() for q in right.items()):
        found[power + other] = found.get(power + other, 0.0) + a * b
    return found


def _is_gelus(found: dict[int, float]) -> bool:
    """Whether a polynomial is sqrt(2/pi) (x + 0.044715 x^3), to seven digits."""
    expected = {1: LINEAR, 3: LINEAR * CUBIC}
    powers = {power for power, factor in found.items() if factor}
    return powers == expected.keys() and all(
        math.isclose(found[power], factor, rel_tol=SEVEN_DIGITS) for power, factor in expected.items()
    )
