"""fuse: relevance ops that a kernel of the dialect computes in one call become that call.

What a rule emitted is known (trace.Emission): where the ops still stand as they were traced, the kernel form of the
same function takes their place. Then calls of kernels take in what stands right before or behind them.
"""

from __future__ import annotations

from lrp_compiler.kernels.spec import NotSupportedError
from lrp_compiler.passes.backend import Backend, takes_kernels
from lrp_compiler.passes.fusing.forms import replacement_for
from lrp_compiler.passes.fusing.neighbours import take_in_neighbours
from lrp_compiler.passes.fusing.rotary import fuse_rotary
from lrp_compiler.passes.kernel_use import KernelUse
from lrp_compiler.passes.matching import Match, matches
from lrp_compiler.passes.program import Program, facts


def fuse(program: Program, backend: Backend = "auto") -> Program:
    """The same relevance with dialect ops where they fit, and in ``kernels`` what became of each candidate."""
    if not takes_kernels(program.graph, backend):
        return program
    program = program.fork()
    uses = [use for match in list(matches(program.graph)) if (use := _fused(program, match)) is not None]
    uses += fuse_rotary(program)
    # What kernels have replaced must not count as a reader.
    program.graph.eliminate_dead_code()
    take_in_neighbours(program)
    program.graph.eliminate_dead_code()
    return program.having(kernels=tuple(uses))


def _fused(program: Program, match: Match) -> KernelUse | None:
    """Put the kernel form in the place of a match; None where there is no such form."""
    result = next((node for node in match.results.values() if node.users), None)
    if result is None or facts(result).part != "relevance":
        return None
    origin, name = facts(result).origin, match.emission.function.__name__
    try:
        found = replacement_for(match)
        kernels = () if found is None else found.apply(program)
    except NotSupportedError as refused:
        return KernelUse(origin, name, (), str(refused))
    return KernelUse(origin, name, kernels) if kernels else None
