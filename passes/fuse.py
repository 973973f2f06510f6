"""fuse: relevance ops that a kernel of the dialect computes in one call become that call.

What a rule emitted is known (trace.Emission): where the ops still stand as they were traced, the kernel form of the
same function takes their place. Then calls of kernels take in what stands right before or behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from lrp_compiler.kernels.registry import spec_of
from lrp_compiler.kernels.spec import NotSupportedError
from lrp_compiler.passes.backend import Backend, takes_kernels
from lrp_compiler.passes.fusing.forms import kernel_form
from lrp_compiler.passes.fusing.neighbours import take_in_neighbours
from lrp_compiler.passes.kernel_use import KernelUse
from lrp_compiler.passes.matching import Match, matches
from lrp_compiler.passes.optable import OpClass, classify, op_name
from lrp_compiler.passes.program import FACTS, Program, facts, output_node
from lrp_compiler.passes.trace import EMISSION, Emitter


def fuse(program: Program, backend: Backend = "auto") -> Program:
    """The same relevance with dialect ops where they fit, and in ``kernels`` what became of each candidate."""
    if not takes_kernels(program.graph, backend):
        return program
    program = program.fork()
    uses = [use for match in matches(program.graph) if (use := _fused(program, match)) is not None]
    # What kernels have replaced must not count as a reader.
    program.graph.eliminate_dead_code()
    take_in_neighbours(program)
    program.graph.eliminate_dead_code()
    return program.having(kernels=tuple(uses))


def _fused(program: Program, match: Match) -> KernelUse | None:
    """Put the kernel form in the place of a match; None where there is no such form."""
    results = {traced: node for traced, node in match.results.items() if node.users}
    form = kernel_form(match.emission)
    if form is None or not results or any(facts(node).part != "relevance" for node in results.values()):
        return None
    origin = facts(next(iter(results.values()))).origin
    name = match.emission.function.__name__
    try:
        kernels = _replaced(program, match, form, results)
    except NotSupportedError as refused:
        return KernelUse(origin, name, (), str(refused))
    return KernelUse(origin, name, kernels)


def _replaced(
    program: Program, match: Match, form: Callable[..., Any], results: dict[fx.Node, fx.Node]
) -> tuple[str, ...]:
    """Emit the kernel form and use its results; the names of its kernels. Raises NotSupportedError."""
    if not match.is_whole():
        raise NotSupportedError("other passes have rewritten its ops")
    inside = set(match.members)
    heavy = [node for node in inside - set(results.values()) if _is_costly(node) and not inside.issuperset(node.users)]
    if heavy:
        readers = sorted({facts(user).origin for user in heavy[0].users if user not in inside})
        raise NotSupportedError(f"what it computes inside is read by {', '.join(readers)} as well")
    before = min(user for node in results.values() for user in node.users)
    read = [node for traced, node in match.values.items() if traced.op == "placeholder"]
    if any(not node < before for node in read):
        raise NotSupportedError("an operand is made only after a result is read")
    first = next(iter(results.values()))
    provenance = {key: value for key, value in first.meta.items() if key not in ("val", FACTS, EMISSION)}
    emitter = Emitter(program.graph, program.fake_mode, before, program.traces, facts(first), provenance)
    start = before.prev
    made = pytree.tree_leaves(emitter(form, *match.arguments))
    expected = pytree.tree_leaves(output_node(match.emission.traced.graph).args[0])
    for traced, new in zip(expected, made, strict=True):
        if isinstance(traced, fx.Node) and traced in results:
            results[traced].replace_all_uses_with(new)
    return _kernels_between(start, before)


def _is_costly(node: fx.Node) -> bool:
    """Whether an op is a product that is not worth computing twice."""
    entry = classify(node)
    return (entry is not None and entry.op_class is OpClass.LINEAR) or "convolution" in op_name(node)


def _kernels_between(start: fx.Node, end: fx.Node) -> tuple[str, ...]:
    """The dialect ops that were emitted behind ``start`` and in front of ``end``."""
    names = []
    node = start.next
    while node is not end:
        if (spec := spec_of(node.target)) is not None:
            names.append(spec.name)
        node = node.next
    return tuple(names)
