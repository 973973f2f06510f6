"""Which forward values to keep for relevance: the cheapest cut between the forward pass and what relevance reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from lrp_compiler.passes.deferral import REPLAY, demanded_by, either, fixed_nodes
from lrp_compiler.passes.emitter import promise
from lrp_compiler.passes.min_cut import Choice, Solved, cheapest
from lrp_compiler.passes.packing import BY_BYTES, PACKERS
from lrp_compiler.passes.prices import Pricing, is_repeatable
from lrp_compiler.passes.program import InputKind, Program, facts, first_argument, value_of
from lrp_compiler.passes.storage import bytes_of

NOTHING: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class Demands:
    """What relevance reads that no seed changes: (place among the relevance ops, value), in order.

    ``generators`` are the nodes that read random number generators, by name.
    """

    readings: tuple[tuple[int, fx.Node], ...]
    generators: Mapping[str, fx.Node]

    @property
    def values(self) -> list[fx.Node]:
        """The values read, each once."""
        return list(dict.fromkeys(value for _, value in self.readings))

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The values that ``node`` is computed from when it is computed for relevance, inputs left out."""
        if node.target is either:
            # At no price: where the small form is made on this side, the value itself is read.
            read = [node.args[1]]
        elif REPLAY in node.meta:
            read = [self.generators[name] for name in node.meta[REPLAY][1]]
        else:
            read = list(node.all_input_nodes)
        values = map(_without_promise, read)  # type: ignore[arg-type]
        return [value for value in values if value.op != "placeholder"]


def demands_of(graph: fx.Graph) -> Demands:
    """What the relevance ops of a joint graph read."""
    fixed = fixed_nodes(graph)
    readings = []
    for place, node in enumerate(graph.nodes):
        if node.op == "output" or facts(node).part == "relevance":
            values = map(_without_promise, demanded_by(node, fixed))
            readings += [(place, value) for value in values if value.op != "placeholder"]
    noted = {name for node in graph.nodes if REPLAY in node.meta for name in node.meta[REPLAY][1]}
    return Demands(tuple(readings), {node.name: node for node in graph.nodes if node.name in noted})


def late_nodes(program: Program) -> frozenset[fx.Node]:
    """The nodes of a joint graph that a forward pass cannot leave which ran before rows were known.

    They depend on these rows, or on nothing at all: masks of rows are made of such, which no other forward pass has.
    What is drawn at random is the model's own.
    """
    late = {spec.node for spec in program.inputs if spec.kind is InputKind.LATE_ROWS}
    found: set[fx.Node] = set()
    free: set[fx.Node] = set()
    for node in program.graph.nodes if late else ():
        if node.op == "call_function" and is_repeatable(node) and free.issuperset(node.all_input_nodes):
            free.add(node)
        if node.name in late or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return frozenset(found | free)


def retained(
    demands: Demands,
    pricing: Pricing,
    forced: frozenset[fx.Node] = NOTHING,
    barred: frozenset[fx.Node] = NOTHING,
    solved: Solved | None = None,
) -> set[fx.Node]:
    """The values to keep so that all demanded ones are at hand, at the lowest price.

    Where they are needed at all, ``forced`` ones are kept, and ``barred`` ones are not unless nothing can repeat them.
    ``solved`` carries cuts from one call to the next.
    """
    choices: dict[fx.Node, Choice] = {}
    waiting = list(demands.values)
    while waiting:
        node = waiting.pop()
        if node in choices:
            continue
        keep, recompute = pricing.keep(node), pricing.recompute(node)
        if (node in barred and is_repeatable(node)) or _is_mask_of(node, barred):
            keep = None
        elif node in forced or (None not in (keep, recompute) and pricing.never_pays(node, recompute or 0)):
            recompute = None
        read = () if recompute is None and keep is not None else tuple(demands.operands(node))
        choices[node] = Choice(keep, recompute, read)
        waiting += read
    return cheapest(choices, demands.values, solved)


@dataclass(frozen=True)
class Estimate:
    """What keeping a set of values comes to: the bytes alive at once in the relevance pass, the price of the rest."""

    peak: int
    price: int


def estimate(demands: Demands, pricing: Pricing, kept: set[fx.Node]) -> Estimate:
    """Follow kept values to their last reader, and computed ones from their first one to their last."""
    first: dict[fx.Node, int] = {}
    last: dict[fx.Node, int] = {}
    price = 0
    for place, demanded in demands.readings:
        waiting = [demanded]
        while waiting:
            node = waiting.pop()
            last[node] = place
            if node in first or node in kept:
                continue
            first[node] = place
            price += (pricing.recompute(node) or 0) if facts(node).part == "forward" else 0
            waiting += demands.operands(node)
    changes: dict[int, int] = {}
    passing: dict[int, list[int]] = {}
    for node, end in last.items():
        if (facts(node).part == "forward" and pricing.keep(node) is not None) or node in kept:
            size = bytes_of(value_of(node))
            start = 0 if node in kept else first[node]
            if start == end:
                passing.setdefault(start, []).append(size)
                continue
            changes[start] = changes.get(start, 0) + size
            changes[end + 1] = changes.get(end + 1, 0) - size
    for place, sizes in passing.items():
        # Of a chain that is computed for one reader a value goes when the next is there.
        most = sum(sorted(sizes)[-2:])
        changes[place] = changes.get(place, 0) + most
        changes[place + 1] = changes.get(place + 1, 0) - most
    alive, peak = 0, 0
    for place in sorted(changes):
        alive += changes[place]
        peak = max(peak, alive)
    return Estimate(peak, price)


def _is_mask_of(node: fx.Node, values: frozenset[fx.Node]) -> bool:
    """Whether ``node`` is a mask of one of the values, of a byte per element; bits are few enough to keep anywhere."""
    return PACKERS.get(node.target) in BY_BYTES and _without_promise(first_argument(node)) in values


def _without_promise(node: fx.Node) -> fx.Node:
    """The forward value that a promise stands for; any other node itself."""
    return first_argument(node) if node.target is promise else node
