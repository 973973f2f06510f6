"""The cheapest set of values to keep, as a minimum cut between what is at hand and what is demanded.

Each value v is an edge whose capacity is the price of keeping it; an uncapacitated edge leads to it from every operand
it can be computed from, and one from the inputs whose capacity is the price of computing it. Values on the side of the
demand are computed again; values whose edge is cut are kept (as in AOTAutograd's partitioner, with the price of
recomputing as a further edge, so that the cut trades one against the other).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import networkx as nx

V = TypeVar("V", bound=Hashable)
AT_HAND, DEMANDED = "at hand", "demanded"


@dataclass(frozen=True)
class Choice:
    """The prices of keeping one value and of computing it from ``operands``; None where that cannot be done."""

    keep: int | None
    recompute: int | None
    operands: tuple[Hashable, ...] = ()


def cheapest(choices: Mapping[V, Choice], demanded: Iterable[V]) -> set[V]:
    """The values to keep so that every demanded one is kept or can be computed from kept ones, at the lowest price.

    Between equally cheap sets the one nearest to the inputs. ``choices`` holds every value that a demanded one can be
    computed from, and what cannot be computed there can be kept.
    """
    demanded = set(demanded)
    kept: set[V] = set()
    for part in _parts(choices):
        ends = [value for value in part if value in demanded]
        if len(ends) == len(part) == 1 and choices[ends[0]].recompute is None:
            kept.add(ends[0])
        elif ends:
            kept |= _cut(choices, part, ends)
    return kept


def _parts(choices: Mapping[V, Choice]) -> Iterable[list[V]]:
    """The values that hang together, each in the order given."""
    together: nx.Graph[V] = nx.Graph()
    together.add_nodes_from(choices)
    for value, choice in choices.items():
        together.add_edges_from((value, operand) for operand in choice.operands)
    order = {value: place for place, value in enumerate(choices)}
    for part in nx.connected_components(together):
        yield sorted(part, key=order.__getitem__)


def _cut(choices: Mapping[V, Choice], part: list[V], ends: list[V]) -> set[V]:
    # Drawn backwards: networkx returns the cut that is nearest to its target.
    graph: nx.DiGraph[Hashable] = nx.DiGraph()
    for value in part:
        choice = choices[value]
        graph.add_edge((value, "out"), (value, "in"), **_capacity(choice.keep))
        if choice.recompute != 0:
            graph.add_edge((value, "in"), AT_HAND, **_capacity(choice.recompute))
        for operand in choice.operands:
            graph.add_edge((value, "in"), (operand, "out"))
    for value in ends:
        graph.add_edge(DEMANDED, (value, "out"))
    if AT_HAND not in graph:
        return set()
    _, (_, near) = nx.minimum_cut(graph, DEMANDED, AT_HAND)
    return {value for value in part if (value, "in") in near and (value, "out") not in near}


def _capacity(price: int | None) -> dict[str, int]:
    """No capacity at all is an infinite one."""
    return {} if price is None else {"capacity": price}
