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
from networkx.algorithms.flow import boykov_kolmogorov

V = TypeVar("V", bound=Hashable)
AT_HAND, DEMANDED = "at hand", "demanded"


@dataclass(frozen=True)
class Choice:
    """The prices of keeping one value and of computing it from ``operands``; None where that cannot be done."""

    keep: int | None
    recompute: int | None
    operands: tuple[Hashable, ...] = ()


Problem = tuple[tuple[int | None, int | None, tuple[int, ...], bool], ...]
"""Values that hang together, by prices, places of operands and whether they are demanded: all that a cut depends on."""

Solved = dict[Problem, tuple[int, ...]]
"""Cuts by problem: the places of the values kept. The layers of a network pose the same one again and again."""


def cheapest(choices: Mapping[V, Choice], demanded: Iterable[V], solved: Solved | None = None) -> set[V]:
    """The values to keep so that every demanded one is kept or can be computed from kept ones, at the lowest price.

    Between equally cheap sets the one nearest to the inputs. ``choices`` holds every value that a demanded one can be
    computed from, and what cannot be computed there can be kept. ``solved`` carries cuts from one call to the next.
    """
    demanded, solved = set(demanded), {} if solved is None else solved
    kept: set[V] = set()
    for part in _parts(choices):
        problem = _problem(choices, part, demanded)
        if problem not in solved:
            solved[problem] = tuple(_cut(problem))
        kept.update(part[place] for place in solved[problem])
    return kept


def _problem(choices: Mapping[V, Choice], part: list[V], demanded: set[V]) -> Problem:
    """A part of the choices without the names of its values."""
    places: dict[Hashable, int] = {value: place for place, value in enumerate(part)}
    rows = ((choices[value], value in demanded) for value in part)
    return tuple((one.keep, one.recompute, tuple(places[o] for o in one.operands), asked) for one, asked in rows)


def _parts(choices: Mapping[V, Choice]) -> Iterable[list[V]]:
    """The values that hang together, each in the order given."""
    together: nx.Graph[V] = nx.Graph()
    together.add_nodes_from(choices)
    for value, choice in choices.items():
        together.add_edges_from((value, operand) for operand in choice.operands)
    order = {value: place for place, value in enumerate(choices)}
    for part in nx.connected_components(together):
        yield sorted(part, key=order.__getitem__)


def _cut(problem: Problem) -> list[int]:
    """The places of the values to keep."""
    # Drawn backwards: networkx returns the cut that is nearest to its target.
    graph: nx.DiGraph[Hashable] = nx.DiGraph()
    for place, (keep, recompute, operands, is_demanded) in enumerate(problem):
        graph.add_edge((place, "out"), (place, "in"), **_capacity(keep))
        if recompute != 0:
            graph.add_edge((place, "in"), AT_HAND, **_capacity(recompute))
        for operand in operands:
            graph.add_edge((place, "in"), (operand, "out"))
        if is_demanded:
            graph.add_edge(DEMANDED, (place, "out"))
    if AT_HAND not in graph or DEMANDED not in graph:
        return []
    # Of networkx's algorithms the fastest by far on these long and narrow graphs.
    _, (_, near) = nx.minimum_cut(graph, DEMANDED, AT_HAND, flow_func=boykov_kolmogorov)
    return [place for place in range(len(problem)) if (place, "in") in near and (place, "out") not in near]


def _capacity(price: int | None) -> dict[str, int]:
    """No capacity at all is an infinite one."""
    return {} if price is None else {"capacity": price}
