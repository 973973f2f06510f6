"""A recording: what one forward pass left, and running relevance code on it."""

from __future__ import annotations

import threading
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lrp_compiler.compiled import Compiler, ExplainedCall
from lrp_compiler.forward_pass import cast_values, prepared_values, run_forward, write_back
from lrp_compiler.passes.cast_explicitly import without_autocast
from lrp_compiler.passes.codegen import Executable
from lrp_compiler.passes.errors import NoHistoryError, ReferenceModeError, SizesError, StaleTapeError
from lrp_compiler.passes.program import Constant, InputKind, Program, is_float
from lrp_compiler.passes.reference import reference_relevance
from lrp_compiler.passes.request import Reading, Request, Result
from lrp_compiler.passes.sizes import Sizes
from lrp_compiler.passes.transforms import is_transforming
from lrp_compiler.prepared_weights import PreparedWeights
from lrp_compiler.random_numbers import RandomNumbers, devices_of, draws_repeated
from lrp_compiler.side_by_side import run_side_by_side, targets_side_by_side

_CHANGES = attrgetter("_version")

Results = list[tuple[Result, Tensor]]


@dataclass(frozen=True)
class Question:
    """What relevance code is asked for, and on what: seeds by output or site, masks by node, rows by graph input.

    ``is_mapped`` says that seeds and rows have one more dimension in front, an entry for each of several targets.
    """

    request: Request
    seeds: dict[Any, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    is_mapped: bool = False


Sites = tuple[tuple[str, Reading], ...]


@dataclass
class _Values:
    """Values by name, and which of them autograd knows no history of."""

    known: dict[str, Tensor] = field(default_factory=dict)
    detached: set[str] = field(default_factory=set)

    def lack(self, names: tuple[str, ...], history: bool) -> bool:
        """Whether one of ``names`` is missing here, or its ``history`` is if that is needed."""
        return not all(map(self.known.__contains__, names)) or (history and not self.detached.isdisjoint(names))

    def add(self, values: dict[str, Tensor], *, has_history: bool) -> None:
        """Take over values; those without history take the place of none."""
        news = values if has_history else {name: value for name, value in values.items() if name not in self.known}
        self.known.update(news)
        self.detached = self.detached - news.keys() if has_history else self.detached | news.keys()


class Recording:
    """The inputs and kept values of one call, and what can be computed from them later.

    Values that were not kept, or kept without the history that is asked for, are recomputed with the same random
    numbers; parameters that changed since raise StaleTapeError. The reference run of composites that need one is made
    once, when first asked for. A recording for ``once`` answers one question and gives its values up meanwhile.
    """

    def __init__(self, compiler: Compiler, call: ExplainedCall, request: Request, once: bool = False) -> None:
        self._compiler = compiler
        self._call = call
        self._request = request
        self._once = once
        self._inputs: dict[str, Any] = {}
        self._waiting: list[Any] | None = None
        self._first = threading.Lock()
        self._saved = _Values()
        self._reference_inputs: dict[str, Tensor] = {}
        self._references = _Values()
        self._reference_leaves: list[Tensor] = []
        self._versions: dict[str, int | None] = {}
        self._leaves: list[Tensor] = []
        self._has_history = False
        self._random: RandomNumbers | None = None
        self.sizes = Sizes()
        self.has_outputs = False

    @property
    def program(self) -> Program:
        """The compiled program of the call."""
        return self._call.program

    @property
    def is_waiting(self) -> bool:
        """Whether the forward pass has yet to run."""
        return self._waiting is not None

    def open(self, inputs: list[Any], reference: dict[str, Tensor]) -> None:
        """Take the graph's inputs; the forward pass runs when something is first asked.

        ``reference`` holds the inputs that differ in the reference run, by node name.
        """
        self._reference_inputs = reference
        self._has_history = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        self.sizes = self._bound(inputs)
        self._waiting = inputs
        self._inputs = dict(zip(self._call.input_names, inputs, strict=True))
        for mutation in self.program.mutations:
            # The model overwrites it; the tape keeps what was read.
            self._inputs[mutation.input] = self._inputs[mutation.input].clone()
        self._versions = dict(zip(self._inputs, _versions(self._inputs.values()), strict=True))

    def record(self) -> list[Tensor]:
        """Run the whole forward pass; returns the output leaves that are tensors."""
        self.check_fresh()
        self._leaves, saved = self._run_first(self._executable(self._request), {})
        self._saved.add(saved, has_history=self._has_history)
        self.has_outputs = True
        return self._leaves

    def _run_first(self, executable: Executable, rows: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """(output leaves, recorded values) of the forward pass; the first one writes back what it changes in place."""
        with self._first:
            is_first, inputs = self._waiting is not None, self._waiting or list(self._inputs.values())
            if is_first:
                self._random = RandomNumbers(devices_of(inputs)) if self._call.is_random else None
            drawing = self._random.drawn() if is_first and self._random is not None else self._random_numbers()
            with torch.set_grad_enabled(self._has_history), drawing:
                leaves, mutated, saved = run_forward(executable, [*inputs, *rows.values()], self.sizes, self._weights)
            if is_first:
                self._waiting = None
                if mutated:
                    write_back(self.program.mutations, dict(zip(self._call.input_names, inputs, strict=True)), mutated)
                    self._versions = dict(zip(self._inputs, _versions(self._inputs.values()), strict=True))
        return leaves, saved

    def _bound(self, inputs: list[Any]) -> Sizes:
        """The sizes of this call; raises SizesError when code that has been generated does not hold for them."""
        arguments = self._call.binder.arguments_of(inputs)
        sizes = self._call.binder.bind(arguments)
        if sizes is None:
            shapes = ", ".join(str(tuple(value.shape)) for value in arguments if isinstance(value, Tensor))
            raise SizesError(shapes=shapes)
        return sizes

    def outputs(self) -> dict[int, Tensor]:
        """The output leaves that are tensors, by leaf index."""
        if not self.has_outputs:
            self.record()
        return dict(zip(self._tensor_leaves(), self._leaves, strict=True))

    def shapes(self) -> dict[int, Tensor]:
        """The output leaves, or what is of their shape, dtype and device while the forward pass has not made them."""
        if not self.is_waiting:
            return self.outputs()
        fakes = self._call.output_values.items()
        return {index: self._call.output_like(index, self.sizes) for index, fake in fakes if isinstance(fake, Tensor)}

    def _tensor_leaves(self) -> list[int]:
        return [index for index, leaf in enumerate(self.program.outputs) if not isinstance(leaf, Constant)]

    def give_up_outputs(self) -> None:
        """Keep the outputs' shapes alone, where the question does not read their values."""
        self._leaves = [_of_shape(leaf) if leaf.is_contiguous() else leaf for leaf in self._leaves]

    def amounts(self) -> dict[int, Tensor]:
        """What is explained of each output leaf: its value, or the difference from its value in the reference run."""
        leaves = self.outputs()
        composite = self.program.composite
        if composite is None or not composite.against_reference:
            return leaves
        self.check_fresh()
        if not self._reference_leaves:
            self._run_reference(self._executable(self._request))
        pairs = zip(leaves.items(), self._reference_leaves, strict=True)
        # Only floats are explained; of token ids and masks among the outputs there is no difference to take.
        return {index: leaf - other for (index, leaf), other in pairs if is_float(leaf)}

    def answer(self, question: Question, **how: bool) -> Results:
        """Run the relevance code that a question asks for; ``how`` as in ``run``."""
        self.check_fresh()
        executable = self._executable(question.request)
        # Code for a new question may ask more of the sizes than the forward pass did.
        self._bound(list(self._inputs.values()))
        if not question.request.keeps_outputs:
            # What the pass leaves for these rows is of no use to another question.
            own = _Values()
            own.add(self._run_first(executable, question.rows)[1], has_history=self._has_history)
            return self.run(executable, question, own, **how)
        if self._waiting is not None:
            self.record()
        return self.run(executable, question, self._saved, **how)

    def prepared_for(self, request: Request) -> bool:
        """Whether what the forward pass was made to leave is all that the relevance code of ``request`` reads.

        What other questions have added since does not count: the same question gets the same code.
        """
        left, read = (self._compiler.emitted(self._call, one)[1] for one in (self._request, request))
        return set(read.saved) <= set(left.recorded)

    def side_by_side(self, request: Request) -> int:
        """How many targets the relevance code of ``request`` is to answer at once."""
        return targets_side_by_side(self._compiler.emitted(self._call, request)[1].program)

    def run(
        self,
        executable: Executable,
        question: Question,
        saved: _Values,
        *,
        differentiable: bool = False,
        create_graph: bool = False,
    ) -> Results:
        """Run a relevance graph on what the forward pass ``saved``; ``differentiable`` seeds record gradients.

        With ``create_graph`` the results also have the derivatives that forward values, inputs and parameters give
        them; raises NoHistoryError.
        """
        self._complete(executable, create_graph, question.rows, saved)
        inputs = {**self._inputs, **question.rows}
        recorded = differentiable or create_graph
        if recorded or question.is_mapped:
            executable = executable.plain
        values = [inputs[name] for name in executable.free] + [saved.known[name] for name in executable.saved]
        values += [self._references.known[name] for name in executable.reference]
        if create_graph:
            values += [inputs[cast.of].to(cast.dtype) for cast in executable.casts]
        else:
            values += cast_values(executable.casts, inputs, self._weights)
        values += prepared_values(executable.program.prepared_relevance, inputs, self._weights)
        if differentiable and not create_graph:
            values = [value.detach() if isinstance(value, Tensor) else value for value in values]
        with torch.set_grad_enabled(recorded), without_autocast(), draws_repeated():
            code = executable.differentiable if recorded else executable.relevance
            assert code is not None
            if question.is_mapped:
                mapped_rows = [name in question.rows for name in (*executable.free, *executable.saved)]
                seeds, masks = list(question.seeds.values()), list(question.masks.values())
                of_targets = [*mapped_rows, *[False] * (len(values) - len(mapped_rows)), *[True] * len(seeds)]
                graph = executable.program.relevance_graph
                assert graph is not None
                run = partial(code.uncompiled, self.sizes)
                results = run_side_by_side(run, graph, [*values, *seeds], of_targets, masks)
            else:
                values += [*question.seeds.values(), *question.masks.values()]
                if self._once:
                    self._give_up(question, saved)
                results = code.consume(self.sizes, values) if code.takes_list else code(self.sizes, *values)
        return list(zip(executable.program.results, results, strict=True))

    def _executable(self, request: Request) -> Executable:
        """The code for a request, in ops that can be transformed if this is asked for under torch.func."""
        executable = self._compiler.emitted(self._call, request)[1]
        return executable.transformable if is_transforming() else executable

    @property
    def _weights(self) -> PreparedWeights:
        return self._compiler.captures.weights

    def _give_up(self, question: Question, saved: _Values) -> None:
        """Let go of what the forward pass left, so that memory is free again behind the last reader of each value."""
        self._references, self._leaves, self._reference_leaves = _Values(), [], []
        saved.known.clear()
        question.seeds.clear()

    def interpreted(self, seeds: dict[int, Tensor], sites: Sites) -> Results:
        """Relevance at sites by the reference interpreter; raises ReferenceModeError for any other reading."""
        others = sorted({kind for _, kind in sites} - {"relevance", "coefficient"})
        if others:
            cause = f"the reference interpreter gives relevance at values, not {' or '.join(others)}"
            raise ReferenceModeError(cause=cause)
        with self._random_numbers(), without_autocast():
            values = reference_relevance(self.program, list(self._inputs.values()), seeds, [n for n, _ in sites])
        return [(Result(kind, name), values[name]) for name, kind in sites]

    def _complete(self, executable: Executable, create_graph: bool, rows: dict[str, Tensor], kept: _Values) -> None:
        """Recompute what this question needs and the forward pass did not keep, or kept without its history."""
        if create_graph and not self._has_history:
            raise NoHistoryError(cause="the forward pass ran with gradients disabled")
        if create_graph and not torch.is_grad_enabled():
            raise NoHistoryError(cause="gradients are disabled here")
        if self._references.lack(executable.reference, create_graph):
            self._run_reference(executable, create_graph)
        if not kept.lack(executable.saved, create_graph):
            return
        with torch.set_grad_enabled(create_graph), self._random_numbers():
            _, _, saved = run_forward(executable, [*self._inputs.values(), *rows.values()], self.sizes, self._weights)
        kept.add(saved, has_history=create_graph)

    def _run_reference(self, executable: Executable, create_graph: bool = False) -> None:
        """The same forward code on the baselines; what it would change in place stays as it is."""
        inputs = {**self._inputs, **self._reference_inputs}
        with torch.set_grad_enabled(create_graph), self._random_numbers():
            self._reference_leaves, _, recorded = run_forward(
                executable, list(inputs.values()), self.sizes, self._weights
            )
        self._references.add(recorded, has_history=create_graph)
        # Baselines are the user's own: what history they have is theirs.
        self._references.add(self._reference_inputs, has_history=True)

    def _random_numbers(self) -> AbstractContextManager[None]:
        """A context in which the generators repeat what the forward pass drew."""
        return self._random.repeated() if self._random is not None else nullcontext()

    def check_fresh(self) -> None:
        """Raise StaleTapeError when an input or parameter changed since the forward pass."""
        now = _versions(self._inputs.values())
        if now == list(self._versions.values()):
            return
        spec = next(s for s, version in zip(self.program.inputs, now, strict=True) if version != self._versions[s.node])
        what = "the input" if spec.kind is InputKind.USER else f"the {spec.kind.value}"
        raise StaleTapeError(name=f"{what} {spec.target}")


def _of_shape(value: Tensor) -> Tensor:
    """A stand-in of the same shape, dtype and device that takes no memory to speak of."""
    return value.new_zeros(()).expand(value.shape)


def _versions(values: Collection[Any]) -> list[int | None]:
    """How often each tensor was changed in place; None where torch keeps no count (inference tensors, numbers)."""
    try:
        return list(map(_CHANGES, values))
    except (AttributeError, RuntimeError):
        return [_version(value) for value in values]


def _version(value: Any) -> int | None:
    if not isinstance(value, Tensor) or value.is_inference():
        return None
    return value._version
