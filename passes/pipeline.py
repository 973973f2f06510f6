"""The pipeline, top to bottom; no pass registers itself and the order stands here alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lrp_compiler.passes.analyse import analyse
from lrp_compiler.passes.assign_rules import assign_rules
from lrp_compiler.passes.backend import PLAINLY, Choice, choose_backend
from lrp_compiler.passes.branches import with_programs_inside, within
from lrp_compiler.passes.canonicalise import attends_with_learned_mask, canonicalise
from lrp_compiler.passes.capture import capture
from lrp_compiler.passes.cast_explicitly import cast_explicitly, current_autocast, is_trained, without_autocast
from lrp_compiler.passes.clean import clean
from lrp_compiler.passes.codegen import Executable, codegen
from lrp_compiler.passes.compress import compress
from lrp_compiler.passes.decompose import decompose
from lrp_compiler.passes.functionalise import functionalise
from lrp_compiler.passes.fuse import fuse
from lrp_compiler.passes.fuse_elementwise import fuse_elementwise
from lrp_compiler.passes.insert_relevance import insert_relevance
from lrp_compiler.passes.lower_promises import lower_promises
from lrp_compiler.passes.partition import forward_only, partition
from lrp_compiler.passes.pin import pin
from lrp_compiler.passes.plan_memory import plan_memory
from lrp_compiler.passes.prepare_weights import prepare_weights
from lrp_compiler.passes.printer import print_program
from lrp_compiler.passes.program import InputKind, Program
from lrp_compiler.passes.recognise import recognise
from lrp_compiler.passes.request import Request
from lrp_compiler.passes.rules.base import Composite
from lrp_compiler.passes.set_precision import set_precision
from lrp_compiler.passes.settings import Settings
from lrp_compiler.passes.settle_masks import settle_masks
from lrp_compiler.passes.share_memory import share_memory
from lrp_compiler.passes.simplify import simplify
from lrp_compiler.passes.specialise import specialise
from lrp_compiler.passes.verify import verify

logger = logging.getLogger(__name__)
Pass = Callable[..., Program]

CAPTURE: tuple[Pass, ...] = (
    capture,
    clean,
    cast_explicitly,
    pin,
    decompose,
    functionalise,
    settle_masks,
    canonicalise,
    recognise,
)
"""A call of a module -> its forward graph; depends on the call alone."""

EXPLAIN: tuple[Pass, ...] = (analyse, assign_rules)
"""... -> each op's rule; depends on the attributed inputs and the composite."""

EMIT: tuple[Pass, ...] = (
    specialise,
    insert_relevance,
    simplify,
    fuse,
    compress,
    set_precision,
    lower_promises,
    fuse_elementwise,
    partition,
    prepare_weights,
    share_memory,
    plan_memory,
)
"""... -> forward and relevance graph; depends on what was asked for. Then codegen."""

PIPELINE: tuple[Pass, ...] = (*CAPTURE, *EXPLAIN, *EMIT)


ENTERING = frozenset({clean, pin, *EXPLAIN, specialise, insert_relevance, set_precision})
"""The passes that see to the branches of a torch.cond themselves: what is found there depends on its operands."""


@dataclass(frozen=True)
class Stage:
    """What one pass made, how long it took and whether it changed the program."""

    name: str
    milliseconds: float
    nodes: int
    changed: bool
    program: Program

    def text(self, *, sources: bool = True) -> str:
        """The stage as a Python program under a line of provenance."""
        return f"# {self.name}\n{print_program(self.program, sources=sources)}"

    def __str__(self) -> str:
        changed = "changed" if self.changed else "unchanged"
        return f"# {self.name} (took {self.milliseconds:.1f} ms, {self.nodes} nodes, {changed})\n" + print_program(
            self.program
        )


def run(one: Pass, history: tuple[Stage, ...], *inputs: Any) -> tuple[Stage, ...]:
    """Run a pass on the last stage of ``history`` (or on ``inputs`` alone), time it and verify what it made.

    Branches of torch.cond go through a pass before the graph they stand in.
    """
    before = history[-1].program if history else None
    start = time.perf_counter()
    program = one(*inputs) if before is None else _applied(one, before, *inputs)
    milliseconds = (time.perf_counter() - start) * 1e3
    name = one.__name__
    verify(program, name)
    nodes = len(program.graph.nodes) + (len(program.relevance_graph.nodes) if program.relevance_graph else 0)
    logger.debug("%s took %.1f ms, %d nodes", name, milliseconds, nodes)
    changed = before is None or program is not before
    return (*history, Stage(name, milliseconds, nodes, changed, program))


def _applied(one: Pass, program: Program, *inputs: Any) -> Program:
    """``one`` applied to the branches inside ``program``, then to itself; some passes see to the branches."""
    if one not in ENTERING:
        program = within(program, lambda branch: _applied(one, branch, *inputs))
    return one(program, *inputs)


def capture_call(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kept: frozenset[str] = frozenset(),
    grad_enabled: bool = False,
    dynamic: frozenset[tuple[int, int]] = frozenset(),
) -> tuple[Stage, ...]:
    """The stages of CAPTURE for one call; ops named in ``kept`` are not taken apart, sizes in ``dynamic`` left open."""
    history = run(capture, (), model, args, kwargs, dynamic)
    leaves = pytree.tree_leaves((args, kwargs))
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
    settings: dict[Pass, tuple[Any, ...]] = {
        cast_explicitly: (current_autocast(devices), _trained(history[-1].program, leaves), kept),
        pin: (model, args, kwargs),
        decompose: (kept,),
        settle_masks: (kept,),
        canonicalise: (kept, grad_enabled),
    }
    with without_autocast():
        for one in CAPTURE[1:]:
            history = run(one, history, *settings.get(one, ()))
    return history


def _trained(program: Program, leaves: list[Any]) -> frozenset[str]:
    """The names of the parameters and user inputs that are leaves of autograd and require gradients."""
    values = iter(leaves)
    users = {spec.target: next(values) for spec in program.inputs if spec.kind is InputKind.USER}
    trained = {name for name, value in users.items() if is_trained(value)}
    return frozenset(trained | {spec.target for spec in program.inputs if spec.kind is InputKind.PARAMETER})


def depends_on_grad_mode(captured: tuple[Stage, ...]) -> bool:
    """Whether the call compiles to something else when gradients are recorded."""
    before = next(stage for stage in captured if stage.name == functionalise.__name__)
    return any(attends_with_learned_mask(program) for program in with_programs_inside(before.program))


def compile_forward(captured: tuple[Stage, ...]) -> Executable:
    """Code for the forward pass alone."""
    return generate(forward_only(captured[-1].program))


def explain(
    captured: tuple[Stage, ...],
    attributed: tuple[str, ...] | None,
    varied: tuple[str, ...],
    choose: Callable[[Program], Composite],
    partial: bool = False,
) -> tuple[Stage, ...]:
    """The stages of EXPLAIN; ``choose`` picks the composite by what the analysed graph contains.

    ``partial`` stages list ops without a rule instead of refusing them.
    """
    history = run(analyse, captured, attributed, varied)
    return run(assign_rules, history, choose(history[-1].program), partial)


def emit(
    explained: tuple[Stage, ...], request: Request, settings: Settings | None = None
) -> tuple[tuple[Stage, ...], Executable]:
    """The stages of EMIT for one request under the settings of a module, and the code."""
    given = settings or Settings()
    choice = choose_backend(explained[-1].program, given.backend, given.cuda_graphs)
    arguments: dict[Pass, tuple[Any, ...]] = {
        specialise: (request,),
        insert_relevance: (request,),
        set_precision: (given.precision,),
        lower_promises: (given.goal,),
        fuse: (given.backend,),
        fuse_elementwise: (given.backend,),
        prepare_weights: (given.prepares_weights, request.keeps_outputs),
    }
    history = explained
    for one in EMIT:
        history = run(one, history, *arguments.get(one, ()))
    return history, generate(history[-1].program, choice)


def generate(program: Program, choice: Choice = PLAINLY) -> Executable:
    """The code of a partitioned program, timed."""
    start = time.perf_counter()
    made = codegen(program, choice)
    return replace(made, milliseconds=(time.perf_counter() - start) * 1e3)
