"""A forward op as rules and composites see it: its class, its arguments and where relevance can flow."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from lrp_compiler.passes.optable import OpClass, OpEntry, classify, op_name
from lrp_compiler.passes.program import Pattern, carries_float, facts, is_complex

FOLDED = "folded_batch_norm"
"""The pattern of a linear op and the batch normalisation that only it feeds, taken as one linear map."""

ROLES = frozenset({"state_product", "linear_attention"})
"""Patterns of one op that say which of its own arguments carries the signal."""

DATA_OF_A_VALUE = frozenset({OpClass.MOVEMENT, OpClass.TUPLE})


@dataclass(frozen=True)
class Operand:
    """One tensor argument: ``argument`` is its position or keyword, ``leaf`` its place among all leaves."""

    argument: int | str
    leaf: int
    node: fx.Node


class Operation:
    """One node of the forward graph, with its recognised pattern standing in for its own arguments."""

    def __init__(self, node: fx.Node, nodes: dict[str, fx.Node]) -> None:
        self.node = node
        self.nodes = nodes
        self.name = node.name
        self.pattern: Pattern | None = facts(node).pattern
        self.is_folded = self.pattern is not None and self.pattern.kind == FOLDED
        self.call = nodes[self.pattern.saved[0]] if self.pattern is not None and self.is_folded else node
        self.is_whole_pattern = self.pattern is not None and not self.is_folded and self.pattern.kind not in ROLES
        self.is_moved = False

    def at(self, values: dict[Operand, fx.Node]) -> Operation:
        """This op called with other values for some operands; what it is and where relevance flows stay the same."""
        leaves, tree = pytree.tree_flatten((self.args, self.kwargs))
        for operand, value in values.items():
            leaves[operand.leaf] = value
        moved = copy.copy(self)
        args, kwargs = pytree.tree_unflatten(leaves, tree)
        # What has been worked out of the op's own arguments has to be kept, not found again in the new ones.
        kept = {"operands": self.operands, "flowing": self.flowing, "entry": self.entry}
        moved.__dict__.update(kept, flowing_factors=self.flowing_factors, args=args, kwargs=kwargs, is_moved=True)
        return moved

    @property
    def linear_name(self) -> str:
        """The table key of the linear op itself, also when batch normalisation is folded into it."""
        return op_name(self.call)

    def fold(self) -> list[Any]:
        """(weight, bias, mean, variance, eps) of the batch normalisation folded into this op, or nothing."""
        if self.pattern is None or not self.is_folded:
            return []
        _, weight, bias, mean, variance, _, _, eps = self.nodes[self.pattern.saved[1]].args
        return [weight, bias, mean, variance, eps]

    @cached_property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments; of a pattern, the nodes it reads."""
        if self.pattern is not None and self.is_whole_pattern:
            return tuple(self.nodes[name] for name in self.pattern.inputs)
        return self.call.args

    @cached_property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments; of a pattern, its numbers."""
        if self.pattern is not None and self.is_whole_pattern:
            return dict(self.pattern.numbers)
        return dict(self.call.kwargs)

    @cached_property
    def operands(self) -> tuple[Operand, ...]:
        """Every tensor argument that holds floats, in order."""
        found = []
        position = 0
        arguments: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        for argument, value in arguments:
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, fx.Node) and carries_float(leaf):
                    found.append(Operand(argument, position, leaf))
                position += 1
        return tuple(found)

    @cached_property
    def flowing(self) -> tuple[Operand, ...]:
        """The operands that relevance can flow to."""
        return tuple(operand for operand in self.operands if facts(operand.node).flows)

    @cached_property
    def entry(self) -> OpEntry | None:
        """The op table's entry, made bilinear when relevance flows to two of its factors."""
        entry = classify(self.call)
        if entry is None:
            return None
        if entry.op_class is OpClass.LINEAR and len(self.flowing_factors) > 1:
            return replace(entry, op_class=OpClass.BILINEAR)
        if entry.op_class in (OpClass.DIVIDE, OpClass.POWER) and all(o.argument != 0 for o in self.flowing):
            return replace(entry, op_class=OpClass.NONLINEAR)
        return entry

    @property
    def op_class(self) -> OpClass | None:
        return self.entry.op_class if self.entry is not None else None

    @cached_property
    def flowing_factors(self) -> tuple[Operand, ...]:
        """The flowing operands among the op's factors."""
        entry = classify(self.call)
        factors = entry.factors if entry is not None else ()
        return tuple(operand for operand in self.flowing if operand.argument in factors)

    @cached_property
    def varying(self) -> tuple[Operand, ...]:
        """The operands whose values may differ in the reference run."""
        return tuple(operand for operand in self.operands if facts(operand.node).varies)

    @property
    def is_complex(self) -> bool:
        """Whether an operand or the output holds complex numbers."""
        return any(is_complex(node) for node in (self.node, *(operand.node for operand in self.operands)))

    @property
    def selects_alike(self) -> bool:
        """Whether no index and no condition among the arguments can differ in the reference run."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        varying = [leaf for leaf in leaves if isinstance(leaf, fx.Node) and facts(leaf).varies]
        return all(carries_float(node) for node in varying)

    def constants(self) -> tuple[Operand, ...]:
        """The float operands that relevance cannot flow to."""
        return tuple(operand for operand in self.operands if operand not in self.flowing)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def __str__(self) -> str:
        return f"{self.name} ({op_name(self.node)})"


def gates_a_product(op: Operation) -> bool:
    """Whether an activation only scales another live value: every user is a product with one (CP's gate)."""
    users = _users_through_movement(op.node)
    return bool(users) and all(
        (entry := classify(user)) is not None
        and entry.op_class is OpClass.MULTIPLY
        and any(
            isinstance(factor, fx.Node) and facts(factor).live and not _comes_from(factor, op.node)
            for factor in user.args
        )
        for user in users
    )


def _users_through_movement(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    for user in node.users:
        entry = classify(user) if user.op == "call_function" else None
        moves = entry is not None and entry.op_class in DATA_OF_A_VALUE
        found += _users_through_movement(user) if moves else [user]
    return found


def _comes_from(node: fx.Node, origin: fx.Node) -> bool:
    while node is not origin:
        entry = classify(node) if node.op == "call_function" else None
        if entry is None or entry.op_class not in DATA_OF_A_VALUE or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return True
