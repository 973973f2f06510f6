"""Gated MLPs: what the product with the gate and the gate's activation hand back, in one kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from lrp_compiler.kernels import gates
from lrp_compiler.kernels.dialect.gated_mlp import GATED_MLP_BWD
from lrp_compiler.passes.emitter import promise
from lrp_compiler.passes.fusing.replacement import Replacement, check_whole
from lrp_compiler.passes.matching import Match
from lrp_compiler.passes.program import facts, first_argument

aten = torch.ops.aten

ACTIVATIONS: dict[tuple[Callable[..., Tensor], str], str] = {
    (gates.silu, "none"): "silu",
    (gates.gelu, "none"): "gelu",
    (gates.gelu, "tanh"): "gelu_tanh",
    (gates.gelu_tanh, "none"): "gelu_tanh",
}
"""Gate function and its ``approximate`` -> the activation's name to the kernel."""


def gated_mlp(match: Match) -> Replacement | None:
    """h = f(gate) up with half of its relevance to either: c goes to both in one pass over the operands.

    The match is the activation's gate; behind it stands the product with ``up``, beside that the one with f(gate).
    """
    check_whole(match)
    gate_function, onto_gate, args, kwargs = match.arguments
    activation = ACTIVATIONS.get((gate_function, kwargs.get("approximate", "none")))
    ((_, result),) = match.results.items()
    if activation is None or not isinstance(onto_gate, fx.Node) or not isinstance(args[0], fx.Node):
        return None
    gate_product, share = _unscaled(onto_gate)
    operands = _factors(gate_product)
    if operands is None or not _read_once(onto_gate, gate_product):
        return None
    for c, up in (operands, operands[::-1]):
        activated = facts(result).origin
        other = _other_product(c, gate_product, activated, share)
        if other is not None:
            inside = frozenset({*match.members, onto_gate, gate_product})
            return Replacement(gated_mlp_form, (c, args[0], up, activation, share), (result, other), inside)
    return None


def gated_mlp_form(c: Tensor, gate: Tensor, up: Tensor, activation: str, share: float) -> tuple[Tensor, Tensor]:
    """(c_gate, c_up)."""
    made: tuple[Tensor, Tensor] = GATED_MLP_BWD(c, gate, up, activation, share)
    return made


def _unscaled(node: fx.Node) -> tuple[fx.Node, float]:
    """(product, factor) where ``node`` scales a product by a number, else itself and 1."""
    if node.target is aten.mul.Tensor and isinstance(node.args[1], float) and isinstance(node.args[0], fx.Node):
        return node.args[0], node.args[1]
    return node, 1.0


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    if node.target is not aten.mul.Tensor or not all(isinstance(factor, fx.Node) for factor in node.args):
        return None
    left, right = node.args
    return left, right  # type: ignore[return-value]


def _read_once(*nodes: fx.Node) -> bool:
    return all(len(node.users) == 1 for node in nodes)


def _other_product(c: fx.Node, beside: fx.Node, activated: str, share: float) -> fx.Node | None:
    """What hands ``share * c * f(gate)`` to the other factor, f(gate) being the forward value ``activated``."""
    for user in c.users:
        operands: Any = _factors(user) if user is not beside else None
        if operands is None:
            continue
        value = operands[1] if operands[0] is c else operands[0]
        if value.target is not promise or first_argument(value).name != activated:
            continue
        scaled = next(iter(user.users)) if len(user.users) == 1 else user
        if share == 1:
            return user
        if _unscaled(scaled) == (user, share):
            return scaled
    return None
