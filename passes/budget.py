"""Fewer bytes for relevance at the price of computing values again: which values to keep under a memory budget."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from lrp_compiler.passes.checkpoints import Regions, narrow_places, regions_of
from lrp_compiler.passes.min_cut import Solved
from lrp_compiler.passes.prices import Prices, Pricing
from lrp_compiler.passes.program import Program, facts
from lrp_compiler.passes.retain import Demands, demands_of, estimate, late_nodes, retained

SPACINGS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""How many narrow places lie between two kept ones."""
FACTORS = (8.0, 64.0, 4096.0)
"""How much more a byte may cost than without a budget, in compute."""


@dataclass(frozen=True)
class MemoryGoal:
    """What a user asks of memory: ``budget`` in [0, 1] is the share that deferred buffers may take at once of what
    they take without one, or the least that can be reached; values in modules matching ``recompute`` are not kept.
    """

    budget: float = 1.0
    recompute: tuple[str, ...] = ()
    prices: Prices = field(default_factory=Prices)


def values_to_keep(program: Program, goal: MemoryGoal) -> set[fx.Node]:
    """The values of the joint graph that the forward pass keeps: what costs least under the goal."""
    demands, pricing = demands_of(program.graph), Pricing(goal.prices, late_nodes(program))
    regions = regions_of(program, goal.recompute) if goal.recompute else Regions(frozenset(), ())
    kept = retained(demands, pricing, frozenset(regions.ends), regions.inside)
    if goal.budget >= 1:
        return kept
    unbounded = retained(demands, pricing) if goal.recompute else kept
    limit = int(goal.budget * estimate(demands, pricing, unbounded).peak)
    if estimate(demands, pricing, kept).peak <= limit:
        return kept
    places = list(regions.ends) or narrow_places(program)
    return _Search(demands, pricing, kept, limit, places, regions.inside).best()


@dataclass
class _Search:
    """Plans that keep every k-th narrow place and compute again what lies between, in the first part of the network."""

    demands: Demands
    pricing: Pricing
    base: set[fx.Node]
    limit: int
    places: list[fx.Node]
    barred: frozenset[fx.Node]
    solved: Solved = field(default_factory=dict)

    def best(self) -> set[fx.Node]:
        """The cheapest plan within the limit; where there is none, the one with the lowest peak."""
        found: list[tuple[int, int, set[fx.Node]]] = []
        for spacing in (k for k in SPACINGS if k <= max(1, len(self.places))):
            for factor in FACTORS:
                found += self.plans(spacing, factor)
        within = [plan for plan in found if plan[0] <= self.limit]
        order = (lambda plan: plan[1]) if within else (lambda plan: plan[0])
        return min(within or found, key=order)[2]

    def plans(self, spacing: int, factor: float) -> list[tuple[int, int, set[fx.Node]]]:
        """(peak, price, values to keep) of the plan for the whole network, and of the least part of it that will do."""
        # Counted from the end: the part that relevance reads first needs no long way back.
        chosen = self.places[::-1][spacing - 1 :: spacing][::-1]
        barred = self.barred | (frozenset(self.places) - frozenset(chosen) if spacing > 1 else frozenset())
        kept = retained(self.demands, self.pricing.dearer(factor), frozenset(chosen), barred, self.solved)
        whole = self.judged(kept)
        if whole[0] > self.limit:
            return [whole]
        low, high, best = 0, len(chosen), whole
        while low < high:
            middle = (low + high) // 2
            plan = self.judged(self.mixed(kept, chosen[:middle]))
            if plan[0] <= self.limit:
                high, best = middle, plan
            else:
                low = middle + 1
        return [whole, best]

    def mixed(self, kept: set[fx.Node], chosen: list[fx.Node]) -> set[fx.Node]:
        """``kept`` up to the last of the ``chosen`` places, behind it what is kept without a budget."""
        if not chosen:
            return self.base
        first = {node for node in kept if self.made_by(node) <= chosen[-1]}
        return first | {node for node in self.base if self.made_by(node) > chosen[-1]}

    def made_by(self, node: fx.Node) -> fx.Node:
        """The last forward op that a value takes; of a small form, of what it is a form of."""
        while facts(node).part != "forward":
            node = max(self.demands.operands(node), default=self.places[0])
        return node

    def judged(self, kept: set[fx.Node]) -> tuple[int, int, set[fx.Node]]:
        found = estimate(self.demands, self.pricing, kept)
        return found.peak, found.price, kept
