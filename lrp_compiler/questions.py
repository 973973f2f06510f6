"""From a target to a question: its seeds, on the rows they start at where those are few, and what is requested."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrp_compiler.compiled import Compiler, ExplainedCall, output_names, rebuild_output
from lrp_compiler.passes.errors import OutputError
from lrp_compiler.passes.request import Pick, Reading, Request
from lrp_compiler.recording import Question, Recording, Sites
from lrp_compiler.seeds import Several, Target, reads_output, seeds_for
from lrp_compiler.sites import Names, SiteRef

ROWS_PER_SEEDED_ROW = 4
"""Of so many rows of an output at most one is seeded for relevance alone to run on few rows."""

ROWS_PER_SEEDED_ROW_WITH_FORWARD = 2
"""The same where the forward pass is still to run, and runs on few rows too."""


class Questions:
    """Makes questions about one recording."""

    def __init__(self, compiler: Compiler, call: ExplainedCall, recording: Recording) -> None:
        self.options = compiler.options
        self.call = call
        self.recording = recording

    def chosen(self, output: str | None) -> int:
        """The output leaf that targets are for: the one named here, or in the options, or the first; OutputError."""
        return self.call.chosen_output(output if output is not None else self.options.output)

    def ask(
        self,
        target: Target,
        output: str | None,
        sites: Sites,
        *,
        sinks: bool = False,
        ledger: bool = False,
        masks: dict[str, Tensor] | None = None,
        create_graph: bool = False,
    ) -> Question:
        """The question for ``sites`` (and sinks, or the ledger's entries) under a target; raises TargetError."""
        masks = masks or {}
        chosen = self.chosen(output)
        plain = Request((chosen,), sites, sinks, ledger, tuple(masks))
        if self.is_sparse(plain):
            found = self.sparse(target, plain)
            if found is not None:
                return found
        seeds = self.seeds(target, output, create_graph)
        request = Request(tuple(seeds), sites, sinks, ledger, tuple(masks))
        return Question(request, seeds, masks, is_mapped=isinstance(target, Several))

    def is_sparse(self, request: Request) -> bool:
        """Whether seeds may be given on rows."""
        return (
            not self.options.reference
            and self.options.verify == "off"
            and self.call.can_specialise(request)
            and not torch.compiler.is_compiling()
        )

    def sparse(self, target: Target, request: Request) -> Question | None:
        """The question with its seed on few rows; None where the target has no such seed, or it would cost more."""
        (chosen,) = request.outputs
        if reads_output(target) or isinstance(target, Several):
            # Several targets share one forward pass, so that it cannot be for the rows of one.
            self.recording.outputs()
        is_lean = self.recording.is_waiting
        output = self.recording.shapes()[chosen].detach()
        targets = target.targets if isinstance(target, Several) else (target,)
        found = self.call.seeds.of(
            output, targets, ROWS_PER_SEEDED_ROW_WITH_FORWARD if is_lean else ROWS_PER_SEEDED_ROW
        )
        if found is None:
            return None
        first = found[0]
        picks = tuple(Pick(chosen, dim, len(rows)) for dim, rows in first.rows.items())
        asked = Request(request.outputs, request.sites, picks=picks, keeps_outputs=not is_lean)
        if not is_lean and not self.recording.prepared_for(asked):
            return None
        names = {dim: f"rows_{chosen}_{dim}" for dim in first.rows}
        if not isinstance(target, Several):
            return Question(asked, {chosen: first.values}, rows={names[dim]: rows for dim, rows in first.rows.items()})
        values = torch.stack([one.values for one in found])
        rows = {names[dim]: torch.stack([one.rows[dim] for one in found]) for dim in first.rows}
        return Question(asked, {chosen: values}, rows=rows, is_mapped=True)

    def seeds(self, target: Target, output: str | None, create_graph: bool = False) -> dict[int, Tensor]:
        """The dense seeds of a target by output leaf; raises TargetError and OutputError."""
        chosen = self.chosen(output)
        leaves = self.recording.outputs() if reads_output(target) else self.recording.shapes()
        explainable = {i: leaves[i] for i in sorted(self.call.explainable_outputs.values())}

        def rebuild(replaced: dict[int, Tensor]) -> Any:
            return rebuild_output(self.call.program, list({**leaves, **replaced}.values()), self.recording.sizes)

        if isinstance(target, Several):
            each = [seeds_for(explainable, chosen, one, rebuild, create_graph) for one in target.targets]
            return target.stacked(each)
        seeds = seeds_for(explainable, chosen, target, rebuild, create_graph)
        if not seeds:
            known = ", ".join(output_names(self.call.program)[index] for index in explainable)
            raise OutputError(name="(callable)", cause="the target depends on none of its outputs", known=known)
        return dict(sorted(seeds.items()))


class How(NamedTuple):
    """How results are asked for: at which output, over embeddings unsummed or not, differentiable or not."""

    output: str | None = None
    per_dimension: bool = False
    create_graph: bool = False


@dataclass(frozen=True)
class Asked:
    """A question about sites, and how its results become what is returned."""

    question: Question
    target: Target
    at: Names
    how: How
    readings: dict[SiteRef, tuple[tuple[str, Reading], ...]]
    is_summed: bool
