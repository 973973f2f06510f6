"""Which forward values to keep for relevance: the cheapest cut between the forward pass and what relevance reads."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from lrp_compiler.passes.deferral import REPLAY, either
from lrp_compiler.passes.emitter import promise
from lrp_compiler.passes.min_cut import Choice, cheapest
from lrp_compiler.passes.prices import Pricing
from lrp_compiler.passes.program import first_argument


def operands_of(node: fx.Node) -> tuple[fx.Node, ...]:
    """The values that ``node`` is computed from when it is computed for relevance."""
    if node.target is either:
        # At no price: where the small form is made on this side, the value itself is read.
        return (node.args[1],)  # type: ignore[return-value]
    if REPLAY in node.meta:
        state = node.meta[REPLAY][1]
        return tuple(found for found in node.graph.nodes if found.name == state)
    return tuple(node.all_input_nodes)


def retained(demanded: Iterable[fx.Node], pricing: Pricing, forced: frozenset[fx.Node] = frozenset()) -> set[fx.Node]:
    """The values to keep so that all ``demanded`` ones are at hand, at the lowest price; ``forced`` ones are kept."""
    demanded = list(dict.fromkeys(map(_without_promise, demanded)))
    choices: dict[fx.Node, Choice] = {}
    waiting = list(demanded)
    while waiting:
        node = waiting.pop()
        if node in choices or node.op == "placeholder":
            continue
        recompute = None if node in forced else pricing.recompute(node)
        keep = pricing.keep(node)
        operands = () if recompute is None and keep is not None else map(_without_promise, operands_of(node))
        read = tuple(operand for operand in operands if operand.op != "placeholder")
        choices[node] = Choice(keep, recompute, read)
        waiting += read
    return cheapest(choices, (node for node in demanded if node in choices))


def _without_promise(node: fx.Node) -> fx.Node:
    """The forward value that a promise stands for; any other node itself."""
    return first_argument(node) if node.target is promise else node
