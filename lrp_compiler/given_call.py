"""A call as it is given: its arguments, and the model as it is then."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrp_compiler.live_model import Live, LiveModel
from lrp_compiler.passes.cast_explicitly import current_autocast, is_trained
from lrp_compiler.passes.program import TRACING


class Nesting:
    """How the leaves of arguments are nested, hashed once."""

    def __init__(self, tree: pytree.TreeSpec) -> None:
        self._tree = tree
        self._hash = hash(tree)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Nesting) and self._tree == other._tree)


@lru_cache(maxsize=256)
def _flat(count: int, names: tuple[str, ...]) -> tuple[tuple[int, ...], Nesting]:
    """In which order ``count`` arguments and those named are leaves when none is nested, and that nesting."""
    named = {name: count + place for place, name in enumerate(names)}
    order, tree = pytree.tree_flatten((tuple(range(count)), named))
    return tuple(order), Nesting(tree)


def _flattened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Nesting]:
    """The leaves of arguments, and how they are nested; tensors are their own leaves, which need no look into trees."""
    given = [*args, *kwargs.values()]
    if all(map(isinstance, given, itertools.repeat(Tensor))):
        order, nesting = _flat(len(args), tuple(kwargs))
        return list(map(given.__getitem__, order)), nesting
    leaves, tree = pytree.tree_flatten((args, kwargs))
    return leaves, Nesting(tree)


@dataclass(eq=False, slots=True)
class GivenCall:
    """The call ``model(*args, **kwargs)``: its leaves and their nesting, and what the model held when it was made.

    Not changed once it is made; one is made at every call, which takes several times as long of a frozen class.

    Raises HookError for hooks that no compiled call would run.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    nesting: Nesting
    live: Live

    @classmethod
    def of(cls, known: LiveModel, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GivenCall:
        """The call as of now; ``known`` is what was read of the model before."""
        leaves, nesting = _flattened(args, kwargs)
        with TRACING:
            return cls(model, args, kwargs, leaves, nesting, known.read(model))

    def key(self) -> Any:
        """Everything but sizes that decides what it compiles to: arguments, the model's state, autocast."""
        what = (tuple(map(_leaf_key, self.leaves)), self.nesting, self.live.state)
        if not torch._C._is_any_autocast_enabled():
            return *what, None, ()
        autocast = current_autocast(leaf.device.type for leaf in self.leaves if isinstance(leaf, Tensor))
        return (*what, autocast, tuple(map(is_trained, self.leaves))) if autocast.dtypes else (*what, None, ())


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return ("tensor", leaf.dim(), leaf.dtype, leaf.device)
    return (type(leaf), leaf)
