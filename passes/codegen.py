"""codegen: partitioned graphs -> two flat python functions over ATen calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from lrp_compiler.kernels.attention import attention_backward
from lrp_compiler.passes.lower_promises import free_values, recorded_values, reference_values, saved_values
from lrp_compiler.passes.program import Program, copy_graph


@dataclass(frozen=True)
class Executable:
    """Compiled code: ``forward(*inputs) -> outputs, mutated values, recorded values`` and, when relevance was
    requested, ``relevance(*free, *saved, *reference, *seeds) -> results``.

    ``free``, ``saved`` and ``reference`` name those arguments, the last by the node whose value in the reference run
    it is; ``recorded`` names what the forward pass returns for them. ``milliseconds`` is what making it took.
    """

    program: Program
    forward: Callable[..., tuple[Any, ...]]
    relevance: Callable[..., tuple[Any, ...]] | None
    free: tuple[str, ...]
    saved: tuple[str, ...]
    reference: tuple[str, ...]
    recorded: tuple[str, ...]
    milliseconds: float = 0.0

    @cached_property
    def differentiable(self) -> Callable[..., tuple[Any, ...]]:
        """``relevance`` with plain products in place of fused ops whose result torch cannot differentiate again."""
        assert self.program.relevance_graph is not None
        graph = copy_graph(self.program.relevance_graph)
        for node in graph.nodes:
            node.target = DIFFERENTIABLE.get(node.target, node.target)
        return _compiled(graph, "differentiable_relevance")


DIFFERENTIABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: attention_backward,
}
"""Fused op without a derivative -> a function of the same arguments that has one."""


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
