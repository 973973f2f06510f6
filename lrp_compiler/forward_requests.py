"""What a forward pass is prepared for, before anything is asked of it."""

from __future__ import annotations

from dataclasses import replace

from lrp_compiler.compiled import Compiler, ExplainedCall
from lrp_compiler.options import Options
from lrp_compiler.passes.program import Program, tensor_of
from lrp_compiler.passes.request import Pick, Request
from lrp_compiler.passes.sizes import hints
from lrp_compiler.passes.specialise import can_specialise
from lrp_compiler.sites import Names, name_list, readings_of, resolve_sites


def default_request(explained: ExplainedCall, at: Names, options: Options) -> Request:
    """Relevance of ``at`` (None: the attributed inputs) at the chosen output."""
    program = explained.program
    kind = program.composite.readout if program.composite is not None else "relevance"
    if at is not None:
        refs = resolve_sites(program, name_list(at, "at"))
        nodes = tuple(dict.fromkeys(reading for ref in refs for reading in readings_of(ref, kind)))
    else:
        # The attributed inputs need no look into the table of all sites, which would be made anew at every call.
        nodes = explained.source_readings
    return Request((explained.chosen_output(options.output),), nodes)


def one_row(program: Program, request: Request) -> Request:
    """A request as a class or token target makes it that is asked for attributions alone: a single row is seeded."""
    if not can_specialise(program, request):
        return replace(request, keeps_outputs=False)
    nodes = program.nodes_by_name()
    shapes = {index: tensor_of(nodes[str(program.outputs[index])]).shape for index in request.outputs}
    picks = (
        Pick(index, dim, 1) for index, shape in shapes.items() for dim in range(1, len(shape)) if hints(shape)[dim] > 1
    )
    return replace(request, picks=tuple(picks), keeps_outputs=False)


def prepared_for_rows(compiler: Compiler, call: ExplainedCall, request: Request) -> Request:
    """A request whose forward pass also leaves what a question about one row of an output with rows reads.

    Outputs of (batch, classes) have one row a sample.
    """
    if request not in call.prepared:
        call.prepared[request] = _prepared_for_rows(compiler, call, request)
    return call.prepared[request]


def _prepared_for_rows(compiler: Compiler, call: ExplainedCall, request: Request) -> Request:
    program = call.program
    has_rows = all(call.output_values[index].dim() > 2 for index in request.outputs)
    if not has_rows or compiler.options.reference or not can_specialise(program, request):
        return request
    nodes = program.nodes_by_name()
    late = compiler.emitted(call, replace(one_row(program, request), keeps_outputs=True))[1]
    return replace(request, kept=tuple(name for name in late.saved if name in nodes))
