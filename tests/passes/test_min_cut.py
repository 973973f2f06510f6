"""What is kept against all subsets that could be: the lowest price, and of equally cheap sets the nearest to inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from random import Random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lrp_compiler.passes.min_cut import Choice, cheapest

Choices = dict[int, Choice]


@st.composite
def problems(draw: st.DrawFn, first: int = 0) -> tuple[Choices, set[int]]:
    """Some values in order, each computed from earlier ones; every one can be kept or computed.

    Small prices, so that there are ties; ``first`` is the number of the first value.
    """
    choices: Choices = {}
    prices = st.integers(0, 4)
    for value in range(first, first + draw(st.integers(1, 8))):
        known = sorted(choices)
        operands = tuple(draw(st.lists(st.sampled_from(known), unique=True, max_size=3))) if known else ()
        keep, recompute = draw(st.one_of(st.none(), prices)), draw(st.one_of(st.none(), prices))
        if keep is None and recompute is None:
            keep = 1
        choices[value] = Choice(keep, recompute, () if recompute is None else operands)
    return choices, draw(st.sets(st.sampled_from(sorted(choices)), min_size=1))


def bill(choices: Choices, demanded: set[int], kept: frozenset[int]) -> tuple[int, frozenset[int]] | None:
    """What keeping ``kept`` costs in all, and the values computed again; None if a demanded value is out of reach."""
    price, again, waiting = 0, set(), list(demanded)
    for value in kept:
        keep = choices[value].keep
        if keep is None:
            return None
        price += keep
    while waiting:
        value = waiting.pop()
        if value in kept or value in again:
            continue
        recompute = choices[value].recompute
        if recompute is None:
            return None
        price += recompute
        again.add(value)
        waiting += choices[value].operands  # type: ignore[arg-type]
    return price, frozenset(again)


def bills(choices: Choices, demanded: set[int]) -> Iterator[tuple[int, frozenset[int]]]:
    """Of every subset that gives the demanded values."""
    for size in range(len(choices) + 1):
        for kept in itertools.combinations(choices, size):
            found = bill(choices, demanded, frozenset(kept))
            if found is not None:
                yield found


@settings(max_examples=150)
@given(problems())
@example(({0: Choice(1, None), 1: Choice(1, 1, (0,))}, {1}))
@example(({0: Choice(1, None), 1: Choice(0, 1)}, {1}))
@example(({0: Choice(None, 0), 1: Choice(2, 0, (0,)), 2: Choice(2, 0, (1,))}, {2}))
def test_no_subset_is_cheaper(problem: tuple[Choices, set[int]]) -> None:
    choices, demanded = problem
    kept = frozenset(cheapest(choices, demanded))
    ours = bill(choices, demanded, kept)
    assert ours is not None, "a demanded value is out of reach"
    possible = list(bills(choices, demanded))
    price = min(found[0] for found in possible)
    assert ours[0] == price
    # Nearest to the inputs: whatever any of the cheapest sets computes again is computed again.
    assert ours[1] == frozenset().union(*(again for found, again in possible if found == price))


@settings(max_examples=60)
@given(problems(), problems(first=8))
def test_parts_that_share_nothing_are_solved_apart(
    one: tuple[Choices, set[int]], other: tuple[Choices, set[int]]
) -> None:
    together = cheapest({**other[0], **one[0]}, one[1] | other[1])
    assert together == cheapest(*one) | cheapest(*other)


@given(problems(), st.randoms())
def test_the_order_of_values_makes_no_difference(problem: tuple[Choices, set[int]], random: Random) -> None:
    choices, demanded = problem
    order = list(choices)
    random.shuffle(order)
    assert cheapest({value: choices[value] for value in order}, demanded) == cheapest(choices, demanded)


def test_what_cannot_be_computed_is_kept() -> None:
    """A draw is kept whatever it costs, and so is what is demanded of it; what can be computed of it is not."""
    drawn = {"draw": Choice(1000, None), "scaled": Choice(10, 5, ("draw",)), "shifted": Choice(10, 1, ("scaled",))}
    assert cheapest(drawn, ["draw", "shifted"]) == {"draw"}
    assert cheapest(drawn, ["shifted"]) == {"shifted"}


def test_a_small_value_in_the_middle_serves_both_sides() -> None:
    """x -> mask (an eighth) -> two readers: the mask alone is kept; where x is kept anyway it is made again."""
    choices = {
        "x": Choice(80, None),
        "mask": Choice(10, 0, ("x",)),
        "left": Choice(80, 0, ("mask",)),
        "right": Choice(80, 0, ("mask",)),
    }
    assert cheapest(choices, ["left", "right"]) == {"mask"}
    assert cheapest(choices, ["left", "right", "x"]) == {"x"}


def test_ties_go_to_the_inputs() -> None:
    chain = {0: Choice(4, None), **{value: Choice(4, 0, (value - 1,)) for value in range(1, 6)}}
    assert cheapest(chain, [5]) == {0}
    assert cheapest({**chain, 3: Choice(3, 0, (2,))}, [5]) == {3}


def test_nothing_demanded_keeps_nothing() -> None:
    assert cheapest({0: Choice(1, None), 1: Choice(1, 1)}, []) == set()
