"""Positional sinks (PA-LRP, Bakish et al. 2025): what positions contribute is kept, per token, instead of lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from lrp_compiler.kernels.linear import masked_product
from lrp_compiler.passes.operation import DATA_OF_A_VALUE, Operand, Operation
from lrp_compiler.passes.optable import OpClass, aten_names, classify, op_name
from lrp_compiler.passes.program import facts, first_argument, structure_of, tensor_of
from lrp_compiler.passes.recognise_rotary import RotaryForm
from lrp_compiler.passes.rules.base import Edges, Rule, Sinks
from lrp_compiler.passes.rules.plain import Plain
from lrp_compiler.passes.site import Site

POSITION = "position"
"""The kind under which these rules' sinks stand."""


def summed_to_tokens(relevance: Tensor, token_dim: int) -> Tensor:
    """Relevance (batch, ..., tokens, ...) summed to (batch, tokens)."""
    kept = token_dim % relevance.dim()
    others = [dim for dim in range(1, relevance.dim()) if dim != kept]
    return relevance.sum(others) if others else relevance


def rotary_share(c: Tensor, rotated: Tensor, token_dim: int) -> Tensor:
    """Half of a rotated query's or key's relevance, per token."""
    return summed_to_tokens(masked_product(c, rotated), token_dim) / 2


def added_position(c: Tensor, position: Tensor, token_dim: int) -> Tensor:
    """P * c, per token."""
    return summed_to_tokens(masked_product(c, position.expand_as(c)), token_dim)


@dataclass(frozen=True)
class RotaryHalf(Rule):
    """A rotary embedding shares evenly between what it rotates and the position (PA-LRP eq. 10)."""

    name: ClassVar[str] = "rotary_half"
    by_row: ClassVar[bool] = True

    def propagate(self, site: Site, edge: Any) -> Edges:
        return site.vjp(site.scale(edge, 0.5), self.receivers(site.op))

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        structure = structure_of(site.node, "rotary")
        assert structure is not None and isinstance(structure.form, RotaryForm)
        return {POSITION: site.emit(rotary_share, edge, site.node, structure.form.token_dim)}


@dataclass(frozen=True)
class PositionAdd(Plain):
    """An added positional embedding: the plain rule, its constant's share per token (PA-LRP eq. 5)."""

    name: ClassVar[str] = "position_add"
    by_row: ClassVar[bool] = True

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        (position,) = site.op.constants()
        return {POSITION: site.emit(added_position, edge, position.node, 1)}


def is_rotary(op: Operation) -> bool:
    """Whether an op ends a rotation of a value by constants."""
    structure = structure_of(op.node, "rotary")
    if structure is None:
        return False
    factors = [op.nodes[name] for role, name in structure.roles if role != "value"]
    return not any(facts(factor).live for factor in factors)


def _origins(node: fx.Node) -> set[fx.Node]:
    """The values that ``node`` is moved, cut, joined or negated from, whole."""
    entry = classify(node) if node.op == "call_function" else None
    moved = entry is not None and entry.op_class in DATA_OF_A_VALUE
    cuts = moved and op_name(node) in CUTS
    if cuts or op_name(node) == "aten::neg":
        return {origin for arg in node.all_input_nodes for origin in _origins(arg)}
    return {node}


CUTS = aten_names(
    "cat stack slice select split split_with_sizes chunk unbind flatten view reshape unsqueeze squeeze"
) | {"builtin::getitem"}
"""Movement within a value that rotations are written with."""


def adds_position(op: Operation) -> bool:
    """Whether a sum (batch, tokens, features) adds a constant of its own for every token."""
    if op.op_class is not OpClass.ADD or len(op.flowing) != 1 or len(op.constants()) != 1:
        return False
    out, constant = tensor_of(op.node).shape, op.constants()[0]
    shape = tensor_of(constant.node).shape
    if len(out) != 3 or len(shape) < 2 or shape[-2:] != out[-2:]:
        return False
    feeds_softmax = any(_is_softmax(user) for user in op.node.users)
    return not feeds_softmax and _could_index(constant, out[1])


def _is_softmax(node: fx.Node) -> bool:
    entry = classify(node) if node.op == "call_function" else None
    return entry is not None and entry.op_class is OpClass.SOFTMAX


def _could_index(constant: Operand, tokens: int) -> bool:
    """A table with fewer rows than there are tokens (of segments, say) holds no positions."""
    tables = [origin for origin in _origins(constant.node) if op_name(origin) == "aten::embedding"]
    return all(tensor_of(first_argument(table)).shape[0] >= tokens for table in tables)
