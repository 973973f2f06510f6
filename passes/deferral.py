"""The forward side of the joint graph as lower_promises sees it: what is fixed once the forward pass has run."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lrp_compiler.kernels.randomness import checksum_of_generator, generator_state
from lrp_compiler.passes.branches import Branches
from lrp_compiler.passes.draws import draws
from lrp_compiler.passes.emitter import promise, reference_promise
from lrp_compiler.passes.program import facts

REPLAY = "replay"
"""Where ``node.meta`` of a draw holds (function, names of what was read of the generator, arguments): how to repeat it.
"""

GENERATOR_READERS = (generator_state, checksum_of_generator)
"""Functions that give what repeats a draw."""


def either(direct: torch.Tensor, unpacked: torch.Tensor) -> torch.Tensor:
    """A value that relevance reads, or the same made of a small form of it; ``lower_promises`` takes one."""
    return direct


def fixed_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on no seed and on no reference run: forward values, promises and what is made of them."""
    fixed: set[fx.Node] = set()
    for node in graph.nodes:
        part = facts(node).part
        if node.op == "output" or part in ("seed", "reference", "cast") or node.target is reference_promise:
            continue
        if part == "forward" or node.target is promise or (_is_pure(node) and fixed.issuperset(node.all_input_nodes)):
            fixed.add(node)
    return fixed


def _is_pure(node: fx.Node) -> bool:
    return not draws(node) and not isinstance(node.target, Branches)


def demanded_by(node: fx.Node, fixed: set[fx.Node]) -> list[fx.Node]:
    """The fixed values that a node reads for relevance that is not fixed itself; none for a fixed one."""
    if node in fixed:
        return []
    return [operand for operand in node.all_input_nodes if operand in fixed and facts(operand).part != "forward"]


def drop_dead_nodes(graph: fx.Graph, kept: tuple[Any, ...] = (), named: frozenset[str] = frozenset()) -> None:
    """Remove what nothing reads; of ops with side effects the forward's own stay, calls of ``kept`` and those named."""

    def stays(node: fx.Node) -> bool:
        is_forward = facts(node).part == "forward"
        is_wanted = node.op in ("placeholder", "output") or node.target in kept or node.name in named
        return is_wanted or (is_forward and bool(node.is_impure()))

    graph.eliminate_dead_code(is_impure_node=stays)
