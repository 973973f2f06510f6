"""What is read of watched dicts differs after every change and is what the interpreter tells when asked."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from struct import unpack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._C._dynamo.guards import dict_version

from lrp_compiler import watched_dicts
from lrp_compiler.watched_dicts import Dict, WatchedDicts, are_in_known_places


class Named(OrderedDict[Any, Any]):
    """A subclass with room of its own before and behind what a dict keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "named"


class Slotted(dict[Any, Any]):
    __slots__ = ("first", "second")


MAKERS: list[Callable[[], Dict]] = [
    dict,
    OrderedDict,
    Counter,
    Named,
    Slotted,
    lambda: defaultdict(list),
    lambda: vars(nn.Linear(1, 1)),
    lambda: dict.fromkeys(range(1000)),
]
CHANGES: list[Callable[[Dict], object]] = [
    lambda one: one.__setitem__("new", object()),
    lambda one: one.pop("new", None),
    lambda one: one.clear(),
    lambda one: one.setdefault("other", 1),
    lambda one: one.update(dict.fromkeys(range(50), 1)),
]

dicts = st.lists(st.sampled_from(MAKERS).map(lambda make: make()), max_size=8)
changes = st.lists(st.tuples(st.integers(0, 15), st.sampled_from(CHANGES)), max_size=10)


def told(versioned: list[Dict], counted: list[Dict]) -> tuple[int, ...]:
    return *map(dict_version, versioned), *map(len, counted)


@pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "asked for"])
@given(versioned=dicts, counted=dicts, steps=changes)
def test_what_is_read_is_what_the_interpreter_tells(
    gathered: bool, versioned: list[Dict], counted: list[Dict], steps: list[tuple[int, Callable[[Dict], object]]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watched_dicts, "are_in_known_places", lambda: gathered)
        watched = WatchedDicts(versioned, counted)
    everything = [*versioned, *counted]
    for place, change in steps:
        if everything:
            change(everything[place % len(everything)])
        assert unpack(f"{len(everything)}Q", watched.read()) == told(versioned, counted)
    assert watched.read() == watched.read()


def test_a_value_replaced_by_an_equal_one_is_a_change() -> None:
    one = {"weight": [1]}
    watched = WatchedDicts([one], [])
    before = watched.read()
    one["weight"] = [1]
    assert watched.read() != before


def test_dicts_that_nobody_else_holds_stay_where_they_are() -> None:
    watched = WatchedDicts([{1: 2} for _ in range(100)], [{3: 4} for _ in range(100)])
    before = watched.read()
    others = [{5: 6, 7: 8} for _ in range(1000)]
    assert watched.read() == before
    assert len(others) == 1000


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="only CPython keeps them in the objects")
def test_this_interpreter_keeps_them_in_known_places() -> None:
    assert are_in_known_places()


def test_other_interpreters_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_dicts.sys.implementation, "name", "pypy")
    assert not are_in_known_places.__wrapped__()
