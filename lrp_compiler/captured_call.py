"""A call that has been captured: its program, what that holds for, and a call of one's own with it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrp_compiler.given_call import GivenCall, Nesting
from lrp_compiler.live_model import Live, ModelState
from lrp_compiler.passes.cast_explicitly import without_autocast
from lrp_compiler.passes.codegen import Executable
from lrp_compiler.passes.draws import draws_numbers
from lrp_compiler.passes.pipeline import Stage, compile_forward
from lrp_compiler.passes.program import COMPILING, InputKind, Program, graph_inputs
from lrp_compiler.passes.sizes import SizeBinder, Sizes
from lrp_compiler.passes.transforms import without_transforms
from lrp_compiler.weightless import has_values


@dataclass(frozen=True, eq=False)
class CapturedCall:
    """One kind of call: the stages of its capture.

    ``grad_modes`` says whether it serves calls that record gradients, that do not, or both.
    """

    stages: tuple[Stage, ...]
    grad_modes: frozenset[bool]

    @property
    def program(self) -> Program:
        """The captured program."""
        return self.stages[-1].program

    @cached_property
    def forward(self) -> Executable:
        """The code of the forward pass alone, made at its first use: attributions do without."""
        with COMPILING, without_autocast(), without_transforms():
            return compile_forward(self.stages)

    @cached_property
    def binder(self) -> SizeBinder:
        """What tells the sizes of a call."""
        return SizeBinder(self.program)

    @cached_property
    def is_random(self) -> bool:
        """Whether the forward pass draws random numbers."""
        return draws_numbers(self.program)

    @property
    def is_symbolic(self) -> bool:
        """Whether sizes were left open."""
        return bool(self.binder.open)

    def describe(self, dims: frozenset[tuple[int, int]]) -> str:
        """(argument leaf, dimension) pairs in words."""
        return ", ".join(f"{self.arguments[leaf]} dimension {dim}" for leaf, dim in sorted(dims))

    @cached_property
    def _places(self) -> dict[ModelState, list[int]]:
        return {}

    def places(self, state: ModelState) -> list[int]:
        """Where the graph's inputs stand among a model's parameters and buffers, the constants and arguments, in a row.

        Raises KeyError for a parameter or buffer that no module has under this name.
        """
        found = self._places.get(state)
        if found is None:
            constants = itertools.count(len(state.names))
            arguments = itertools.count(len(state.names) + len(self.constants))
            further = {InputKind.CONSTANT: constants, InputKind.USER: arguments}
            found = self._places[state] = [
                next(further[spec.kind]) if spec.kind in further else state.places[spec.target]
                for spec in self.program.inputs
            ]
        return found

    @cached_property
    def arguments(self) -> list[str]:
        """The names of the argument leaves, as the model's forward calls them."""
        return [spec.target for spec in self.program.inputs if spec.kind is InputKind.USER]

    @cached_property
    def constants(self) -> tuple[Tensor, ...]:
        """The graph's inputs that are the same in every call."""
        return tuple(spec.constant for spec in self.program.inputs if spec.constant is not None)

    @cached_property
    def has_constant_values(self) -> bool:
        """Whether these are more than shapes."""
        return all(map(has_values, self.constants))

    def bound(self, given: GivenCall) -> BoundCall | None:
        """A call by this program; None where it does not hold for the sizes, or for values that it has as constants."""
        sizes = self.binder.bind(given.leaves)
        if sizes is None:
            return None
        bound = BoundCall(self, given, sizes)
        is_fitting = not self.program.pins or self._has_pinned_values(bound.inputs())
        return bound if is_fitting else None

    def _has_pinned_values(self, inputs: list[Any]) -> bool:
        pins = {pin.input: pin.value for pin in self.program.pins}
        named = zip((spec.node for spec in self.program.inputs), inputs, strict=True)
        return all(torch.equal(value, pins[name]) for name, value in named if name in pins)

    def sizes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sizes:
        """The sizes of a call that the program holds for."""
        sizes = self.binder.bind(pytree.tree_leaves((args, kwargs)))
        assert sizes is not None
        return sizes


@dataclass(eq=False, slots=True)
class BoundCall:
    """A call with the program that holds for it and its sizes; not changed once it is made."""

    captured: CapturedCall
    given: GivenCall
    sizes: Sizes

    @property
    def has_values(self) -> bool:
        """Whether none of its inputs is of the meta device or fake."""
        given = self.given
        return given.live.has_values and self.captured.has_constant_values and all(map(has_values, given.leaves))

    def inputs(self) -> list[Any]:
        """The values of the graph's placeholders, parameters as they are in this call."""
        given = self.given
        try:
            places = self.captured.places(given.live.state)
        except KeyError:
            return graph_inputs(self.captured.program, given.model, given.args, given.kwargs)
        values = [*given.live.tensors, *self.captured.constants, *given.leaves]
        return list(map(values.__getitem__, places))


@dataclass(frozen=True, eq=False)
class RecentCall:
    """The last call of a model: what tells one that has the same program and sizes, in few comparisons.

    ``how`` is how programs are asked for; ``live`` the model, which stays the same object while nothing of it changes.
    """

    captured: CapturedCall
    sizes: Sizes
    how: tuple[Any, ...]
    live: Live
    nesting: Nesting
    shapes: list[tuple[Any, ...]]

    @classmethod
    def of(cls, call: BoundCall, how: tuple[Any, ...]) -> RecentCall | None:
        """What is like this call; None where more decides than shapes: open sizes, pinned values, numbers, autocast."""
        captured, given = call.captured, call.given
        if captured.is_symbolic or captured.program.pins or torch._C._is_any_autocast_enabled():
            return None
        if not all(map(isinstance, given.leaves, itertools.repeat(Tensor))):
            return None
        return cls(captured, call.sizes, how, given.live, given.nesting, list(map(_shape, given.leaves)))

    def is_like(self, given: GivenCall, how: tuple[Any, ...]) -> bool:
        """Whether a call has this one's program and sizes."""
        return (
            given.live is self.live
            and given.nesting is self.nesting
            and how == self.how
            and torch.is_grad_enabled() in self.captured.grad_modes
            and not torch._C._is_any_autocast_enabled()
            and list(map(_shape, given.leaves)) == self.shapes
        )


def _shape(leaf: Tensor) -> tuple[Any, ...]:
    return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
