"""Attributions that loops ask for again and again: what calls of one kind have in common is found out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lrp_compiler.captured_call import BoundCall, CapturedCall
from lrp_compiler.compiled import ExplainedCall
from lrp_compiler.entries import SparseSeed
from lrp_compiler.forward_pass import cast_values, forward_values, prepared_values
from lrp_compiler.passes.cast_explicitly import without_autocast
from lrp_compiler.passes.codegen import Executable
from lrp_compiler.passes.program import InputSpec
from lrp_compiler.passes.sizes import Sizes
from lrp_compiler.passes.transforms import is_transforming
from lrp_compiler.prepared_weights import PreparedWeights
from lrp_compiler.questions import ROWS_PER_SEEDED_ROW_WITH_FORWARD, Asked, How
from lrp_compiler.recording import Question
from lrp_compiler.seeds import Target
from lrp_compiler.sites import value_at

Counts = tuple[tuple[int, int], ...]
"""Dimension of an output -> how many rows of it are seeded."""

Kind = tuple[int, How]
"""How many arguments are attributed, and how results are asked for."""


class RepeatedAttributions:
    """What one module has been asked to attribute, by kind of call; safe to share between threads.

    There is none of calls that a reference run, random numbers or values changed in place belong to: for those the
    tape is needed.
    """

    def __init__(self, weights: PreparedWeights) -> None:
        self._weights = weights
        # What was found out about a captured call goes when that goes.
        self._known: WeakKeyDictionary[CapturedCall, dict[Any, _Repeated]] = WeakKeyDictionary()

    def answer(self, call: BoundCall, kind: Kind, target: Target) -> tuple[Tensor, ...] | None:
        """Attributions by input; None where nothing is known yet of such a call and target. Raises TargetError."""
        found = self._known.get(call.captured, {}).get((kind, torch.is_inference_mode_enabled()))
        if found is None or torch.compiler.is_compiling() or is_transforming() or not call.has_values:
            return None
        return found.answer(call, target, self._weights)

    def learn(self, call: BoundCall, kind: Kind, explained: ExplainedCall, asked: Asked, names: Sequence[str]) -> None:
        """Take over how a question is answered, if it can be repeated; ``names`` are the attributed inputs."""
        if not _is_repeatable(explained, asked.question):
            return
        known = self._known.setdefault(call.captured, {})
        key = (kind, torch.is_inference_mode_enabled())
        if key not in known:
            (chosen,) = asked.question.request.outputs
            known[key] = _Repeated(explained, chosen)
        known[key].learn(len(call.captured.program.inputs), asked, names)


def _is_repeatable(explained: ExplainedCall, question: Question) -> bool:
    program = explained.program
    against_reference = program.composite is not None and program.composite.against_reference
    is_lean = bool(question.rows) and not question.request.keeps_outputs and not question.is_mapped
    return is_lean and not (against_reference or explained.is_random or program.mutations)


class _Repeated:
    """Attribution of the same inputs from the output leaf ``chosen``, for any target seeded on few rows."""

    def __init__(self, explained: ExplainedCall, chosen: int) -> None:
        self._explained = explained
        self._chosen = chosen
        self._passes: dict[Counts, _Passes] = {}
        self._last: tuple[Sizes, Tensor] | None = None

    def output(self, sizes: Sizes) -> Tensor:
        """What is of the shape, dtype and device of what targets are for; loops mostly have the sizes of last time."""
        last = self._last
        if last is None or last[0] is not sizes:
            last = self._last = (sizes, self._explained.output_like(self._chosen, sizes))
        return last[1]

    def learn(self, own: int, asked: Asked, names: Sequence[str]) -> None:
        """Take over how a question is answered; the call has ``own`` graph inputs, before those of rules."""
        executable = self._explained.emitted(asked.question.request)[1]
        counts = tuple((pick.dim, pick.count) for pick in asked.question.request.picks)
        self._passes[counts] = _Passes.of(executable, self._explained.program.inputs, own, asked, names)

    def answer(self, call: BoundCall, target: Target, weights: PreparedWeights) -> tuple[Tensor, ...] | None:
        """Attributions by input; None where nothing is known yet for such a target. Raises TargetError."""
        found = self._explained.seeds.of(self.output(call.sizes), (target,), ROWS_PER_SEEDED_ROW_WITH_FORWARD)
        if found is None:
            return None
        passes = self._passes.get(tuple((dim, rows.shape[0]) for dim, rows in found[0].rows.items()))
        return None if passes is None else passes.run(call, found[0], weights)


@dataclass(frozen=True, eq=False)
class _Passes:
    """Both passes of an attribution, and where the values stand that they hand on.

    ``constants`` are the tensors of rules, behind the call's own inputs, ``names`` those of all inputs; ``free`` and
    ``saved`` are places among inputs and recorded values, ``summed`` of the results that each attribution adds up.
    """

    executable: Executable
    constants: tuple[Tensor, ...]
    names: tuple[str, ...]
    free: tuple[int, ...]
    saved: tuple[int, ...]
    summed: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, executable: Executable, specs: tuple[InputSpec, ...], own: int, asked: Asked, names: Sequence[str]
    ) -> _Passes:
        inputs = (*(spec.node for spec in specs), *asked.question.rows)
        places = {name: place for place, name in enumerate(inputs)}
        recorded = {name: place for place, name in enumerate(executable.recorded)}
        results = {(one.site, one.kind): place for place, one in enumerate(executable.program.results)}
        read = {ref.label: tuple(results[reading] for reading in readings) for ref, readings in asked.readings.items()}
        return cls(
            executable,
            tuple(spec.constant for spec in specs[own:] if spec.constant is not None),
            inputs,
            tuple(places[name] for name in executable.free),
            tuple(recorded[name] for name in executable.saved),
            tuple(read[name] for name in names),
        )

    def run(self, call: BoundCall, seed: SparseSeed, weights: PreparedWeights) -> tuple[Tensor, ...]:
        """The attributions; gradients must not be recorded."""
        executable, sizes = self.executable, call.sizes
        assert executable.relevance is not None
        inputs = [*call.inputs(), *self.constants, *seed.rows.values()]
        with without_autocast():
            made = forward_values(executable, inputs, sizes, weights)
            values = [inputs[place] for place in self.free]
            start = len(made) - len(executable.recorded)
            values += [made[start + place] for place in self.saved]
            if executable.casts or executable.program.prepared_relevance:
                named = dict(zip(self.names, inputs, strict=True))
                values += cast_values(executable.casts, named, weights)
                values += prepared_values(executable.program.prepared_relevance, named, weights)
            values.append(seed.values)
            # The list alone holds on to what the forward pass left: every value goes behind its last reader.
            del made
            results = executable.relevance.consume(sizes, values)
        return tuple(value_at([results[place] for place in places]) for places in self.summed)
