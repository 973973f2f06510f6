"""Sizes that differ from call to call: symbols of a captured graph, and what they stand for in one call.

A symbolic graph holds sizes as ``Size`` literals among the arguments of its nodes; code takes their values as further
arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from lrp_compiler.passes.program import InputKind, Program

if TYPE_CHECKING:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

Symbolic = (torch.SymInt, torch.SymFloat, torch.SymBool)


def is_size(value: object) -> bool:
    """Whether ``value`` is computed from the sizes of inputs (and not from what tensors hold, as ``.item()`` is)."""
    return isinstance(value, Symbolic) and not free_unbacked_symbols(value)


@dataclass(frozen=True)
class Size:
    """A size as an argument of a node: torch.fx takes no symbolic numbers there."""

    expression: sympy.Expr
    value: Any = field(compare=False, repr=False)

    def __repr__(self) -> str:
        return str(self.expression)


def as_literal(value: Any) -> Any:
    """A symbolic number as an argument of a node; a plain one where torch has settled on its value."""
    expression = value.node.expr
    if expression in (sympy.true, sympy.false):
        return bool(expression)
    if not expression.is_number:
        return Size(expression, value)
    return float(expression) if isinstance(value, torch.SymFloat) else int(expression)


def expression(size: int | torch.SymInt) -> sympy.Expr:
    """A size as an expression; reading it so settles nothing."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def as_number(size: sympy.Expr, like: torch.Tensor) -> Any:
    """An expression over the sizes of a capture as a number that ops take; ``like`` is one of its fake tensors."""
    if size.is_number:
        return int(size)
    environment = like.fake_mode.shape_env  # type: ignore[attr-defined]
    # As in _hint, for an expression.
    known = getattr(environment, "guarding_hint_or_throw", None) or environment.size_hint
    return environment.create_symintnode(size, hint=int(known(size)))


def with_literals(arguments: Any) -> Any:
    """A tree of arguments as a node may hold them."""
    return pytree.tree_map_only(Symbolic, as_literal, arguments)


def with_numbers(arguments: Any) -> Any:
    """A tree of arguments as an op takes them, sizes as symbolic numbers."""
    return pytree.tree_map_only(Size, lambda size: size.value, arguments)


def size_key(value: Any) -> Any:
    """A hashable stand-in for a symbolic number."""
    return (type(value).__name__, value.node.expr) if isinstance(value, Symbolic) else value


def hints(sizes: Iterable[int | torch.SymInt]) -> tuple[int, ...]:
    """The sizes in the call that was captured; reading them so settles nothing."""
    return tuple(int(_hint(size)) for size in sizes)


def at_hints(values: Any) -> Any:
    """A tree of arguments with sizes as they were in the call that was captured."""
    return pytree.tree_map_only(Size, lambda size: _hint(size.value), values)


def _hint(size: Any) -> Any:
    if not isinstance(size, Symbolic):
        return size
    # Torch 2.11 has the method of the node alone, later versions the function alone.
    known = getattr(symbolic_shapes, "guarding_hint_or_throw", None)
    return known(size) if known else size.node.require_hint()


def settle(values: Any) -> None:
    """Give the open sizes in a tree of sizes or arguments up: the program then holds for calls of these sizes alone."""
    for value in pytree.tree_leaves(values):
        size = value.value if isinstance(value, Size) else value
        if isinstance(size, torch.SymInt):
            int(size)


@dataclass(frozen=True)
class Sizes:
    """The value of every symbol in one call."""

    values: Mapping[Any, Any] = field(default_factory=dict)
    known: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def of(self, expressions: Sequence[Any]) -> tuple[Any, ...]:
        """The values of expressions over the symbols."""
        return tuple(map(self.value, expressions))

    def value(self, expression: Any) -> Any:
        """The value of one expression, worked out once."""
        if expression not in self.known:
            found = expression.xreplace(self.values)
            self.known[expression] = (
                bool(found) if found in (sympy.true, sympy.false) else int(found) if found.is_integer else float(found)
            )
        return self.known[expression]


class SizeBinder:
    """Tells what the symbols of a captured program stand for, and whether the program holds for a call at all."""

    def __init__(self, program: Program) -> None:
        nodes = program.nodes_by_name()
        self._arguments = [place for place, spec in enumerate(program.inputs) if spec.kind is InputKind.USER]
        users = [nodes[program.inputs[place].node].meta.get("val") for place in self._arguments]
        self.inputs = [(at, fake) for at, fake in enumerate(users) if isinstance(fake, torch.Tensor)]
        self.environment: ShapeEnv | None = program.fake_mode.shape_env
        self._known: dict[tuple[Any, ...], Sizes | None] = {}
        self._guards = 0

    @property
    def open(self) -> frozenset[tuple[int, int]]:
        """The (argument leaf, dimension) pairs whose size may differ from call to call."""
        sizes = ((at, dim, size) for at, fake in self.inputs for dim, size in enumerate(fake.shape))
        return frozenset((at, dim) for at, dim, size in sizes if not is_settled(size))

    def arguments_of(self, inputs: Sequence[Any]) -> list[Any]:
        """The argument leaves of a call among the inputs of its graph."""
        return [inputs[place] for place in self._arguments]

    def bind(self, leaves: Sequence[Any]) -> Sizes | None:
        """The sizes of a call with these argument leaves; None when the program does not hold for them."""
        shapes = tuple((*leaves[at].shape, *leaves[at].stride()) for at, _ in self.inputs)
        guards = 0 if self.environment is None else len(self.environment.guards)
        if guards != self._guards:
            # Code that was generated since has asked more of the sizes.
            self._known.clear()
            self._guards = guards
        if shapes not in self._known:
            self._known[shapes] = self._bound(leaves)
        return self._known[shapes]

    def _bound(self, leaves: Sequence[Any]) -> Sizes | None:
        values: dict[Any, Any] = {}
        for at, fake in self.inputs:
            # Strides of their own have the views of larger tensors.
            sizes_and_strides = (*leaves[at].shape, *leaves[at].stride())
            for size, given in zip((*fake.shape, *fake.stride()), sizes_and_strides, strict=True):
                raw = size.node._expr if isinstance(size, torch.SymInt) else None
                if isinstance(raw, sympy.Symbol) and values.setdefault(raw, sympy.Integer(given)) != given:
                    return None
        sizes = Sizes(values)
        agrees = all(self._agrees(fake, leaves[at], sizes) for at, fake in self.inputs)
        return sizes if agrees and self._is_allowed(sizes) else None

    def _agrees(self, fake: torch.Tensor, given: torch.Tensor, sizes: Sizes) -> bool:
        """Whether a tensor has the shape and strides that the program takes it to have."""
        if value_of_sizes(fake.shape, sizes) != tuple(given.shape):
            return False
        strides = zip(value_of_sizes(fake.stride(), sizes), given.stride(), given.shape, strict=True)
        return given.numel() == 0 or all(size == 1 or expected == stride for expected, stride, size in strides)

    def _is_allowed(self, sizes: Sizes) -> bool:
        """Whether the sizes are within their ranges and meet all that the compiler has taken for granted."""
        if self.environment is None:
            return True
        ranges = self.environment.var_to_range
        within = all(ranges[symbol].lower <= value <= ranges[symbol].upper for symbol, value in sizes.values.items())
        return within and all(sizes.value(guard.expr) for guard in self.environment.guards)


def is_settled(size: int | torch.SymInt) -> bool:
    """Whether a size is one number for all calls."""
    return not isinstance(size, torch.SymInt) or bool(size.node.expr.is_number)


def value_of_sizes(sizes: Iterable[int | torch.SymInt], values: Sizes) -> tuple[int, ...]:
    """Sizes as plain numbers."""
    return tuple(values.value(size.node.expr) if isinstance(size, torch.SymInt) else size for size in sizes)
