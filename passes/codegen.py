"""codegen: partitioned graphs -> two flat python functions over ATen calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lrp_compiler.passes.lower_promises import free_values, recorded_values, reference_values, saved_values
from lrp_compiler.passes.program import Program


@dataclass(frozen=True)
class Executable:
    """Compiled code: ``forward(*inputs) -> outputs, mutated values, recorded values`` and, when relevance was
    requested, ``relevance(*free, *saved, *reference, *seeds) -> results``.

    ``free``, ``saved`` and ``reference`` name those arguments, the last by the node whose value in the reference run
    it is; ``recorded`` names what the forward pass returns for them.
    """

    program: Program
    forward: Callable[..., tuple[Any, ...]]
    relevance: Callable[..., tuple[Any, ...]] | None
    free: tuple[str, ...]
    saved: tuple[str, ...]
    reference: tuple[str, ...]
    recorded: tuple[str, ...]


def codegen(program: Program) -> Executable:
    """Compile both halves for the eager target."""
    relevance = program.relevance_graph
    return Executable(
        program=program,
        forward=_compiled(program.graph, "forward"),
        relevance=None if relevance is None else _compiled(relevance, "relevance"),
        free=tuple(free_values(program)),
        saved=tuple(saved_values(program)),
        reference=tuple(reference_values(program)),
        recorded=tuple(recorded_values(program)),
    )


def _compiled(graph: fx.Graph, name: str) -> Callable[..., tuple[Any, ...]]:
    function: Callable[..., tuple[Any, ...]] = fx.GraphModule(torch.nn.Module(), graph, class_name=name).forward
    return function
