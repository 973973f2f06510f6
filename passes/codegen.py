"""codegen: partitioned graphs -> two flat python functions over ATen calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from lrp_compiler.kernels.attention import attention_backward
from lrp_compiler.passes.lower_promises import free_values, recorded_values, reference_values, saved_values
from lrp_compiler.passes.program import Program, copy_graph
from lrp_compiler.passes.sizes import Size, Sizes


@dataclass(frozen=True)
class Code:
    """A compiled graph; ``sizes`` are the expressions that it takes in front of its other arguments."""

    function: Callable[..., tuple[Any, ...]]
    sizes: tuple[Any, ...]

    def __call__(self, sizes: Sizes, *values: Any) -> tuple[Any, ...]:
        """Run it for a call with these sizes."""
        return self.function(*sizes.of(self.sizes), *values)


@dataclass(frozen=True)
class Executable:
    """Compiled code: ``forward(sizes, *inputs) -> outputs, mutated values, recorded values`` and, when relevance was
    requested, ``relevance(sizes, *free, *saved, *reference, *seeds) -> results``.

    ``free``, ``saved`` and ``reference`` name those arguments, the last by the node whose value in the reference run
    it is; ``recorded`` names what the forward pass returns for them. ``milliseconds`` is what making it took.
    """

    program: Program
    forward: Code
    relevance: Code | None
    free: tuple[str, ...]
    saved: tuple[str, ...]
    reference: tuple[str, ...]
    recorded: tuple[str, ...]
    milliseconds: float = 0.0

    @cached_property
    def differentiable(self) -> Code:
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


def _compiled(graph: fx.Graph, name: str) -> Code:
    graph, sizes = _taking_sizes(graph)
    return Code(fx.GraphModule(torch.nn.Module(), graph, class_name=name).forward, sizes)


def _taking_sizes(graph: fx.Graph) -> tuple[fx.Graph, tuple[Any, ...]]:
    """The graph with a further argument, in front, for each size among its literals; and what those sizes are."""
    taking = copy_graph(graph)
    first = next(iter(taking.nodes))
    arguments: dict[Any, fx.Node] = {}

    def argument(value: Any) -> Any:
        if not isinstance(value, Size):
            return value
        if value.expression not in arguments:
            with taking.inserting_before(first):
                arguments[value.expression] = taking.placeholder(f"size_{len(arguments)}")
        return arguments[value.expression]

    for node in taking.nodes:
        node.args, node.kwargs = map_aggregate(node.args, argument), map_aggregate(node.kwargs, argument)
    return (taking, tuple(arguments)) if arguments else (graph, ())
