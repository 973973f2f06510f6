"""A model as it is at one call: its parameters and buffers, and what else of it decides what calls compile to.

Everything is read anew at every call. While nothing has changed since the last one, that takes a few comparisons for
every module and parameter; else the model is walked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards

from lrp_compiler.hooks import KINDS, refuse_global_hooks, refuse_hooks
from lrp_compiler.passes.cast_explicitly import without_autocast
from lrp_compiler.watched_dicts import WatchedDicts
from lrp_compiler.weightless import has_values

Contents = dict[str, Any]
"""What a module keeps under its own names: ``vars`` of it, or one of the dicts in there."""

ATTRIBUTES = attrgetter("shape", "dtype", "device", "requires_grad")
"""What code depends on of a parameter; assigning ``data`` changes it in place and leaves no other trace."""

HELD = ("_parameters", "_buffers", "_modules")
PARTS = itemgetter("training", *HELD, *KINDS)
"""Of the ``vars`` of a module: its training flag and the dicts of parameters, buffers, children and hooks."""


@dataclass(frozen=True)
class ModelState:
    """What of a model decides what its calls compile to, hashed once.

    ``weights`` holds, of every parameter and buffer, which of them it is tied to and its ATTRIBUTES; ``training`` the
    flag of every module.
    """

    names: tuple[str, ...]
    weights: tuple[tuple[Any, ...], ...]
    training: tuple[bool, ...]

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of each name."""
        return {name: place for place, name in enumerate(self.names)}

    @cached_property
    def _hash(self) -> int:
        return hash((self.names, self.weights, self.training))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, eq=False)
class Live:
    """The state of a model at one call, its parameters and buffers by place, and whether these are more than shapes."""

    state: ModelState
    tensors: tuple[Tensor, ...]
    has_values: bool


class LiveModel:
    """Reads one model again and again; safe to share between threads that hold ``TRACING``."""

    def __init__(self) -> None:
        self._last: _Witness | None = None

    def read(self, model: nn.Module) -> Live:
        """The model as it is now; raises HookError for hooks that no compiled call would run."""
        refuse_global_hooks()
        last = self._last
        if last is not None and last.model is model and last.is_unchanged():
            return last.live
        self._last, live = _walk(model)
        return live


@dataclass(eq=False)
class _Witness:
    """What was seen when a model was walked, in the form in which it is compared the fastest.

    ``slots`` are where the tensors of ``live`` are kept; ``fixed`` is what else must be the same object: children, and
    parameters that are None. ``empty`` (hooks among them) and ``filled`` (with their ``lengths``) are the dicts of all
    ``modules``, which stand with their PARTS; ``hooked`` are those with hooks.
    ``read`` is what was read of the ``watched`` dicts when they were last found unchanged: while it stays, none of them
    needs a look. ``guards`` compare tensors, with inference mode off and on; they take none
    twice, and ``distinct`` are those they take.
    """

    model: nn.Module
    live: Live
    modules: list[tuple[Contents, tuple[Any, ...]]]
    hooked: list[tuple[Contents, tuple[Any, ...]]]
    fixed: list[tuple[Contents, str, Any]]
    slots: list[tuple[Contents, str]]
    empty: tuple[Contents, ...]
    filled: list[Contents]
    lengths: list[int]
    distinct: tuple[Tensor, ...]
    attributes: list[Any]
    watched: WatchedDicts
    read: bytes
    guards: dict[bool, TensorGuards] = field(default_factory=dict)

    def is_unchanged(self) -> bool:
        """Whether the model is in the same state."""
        read = self.watched.read()
        if read != self.read or self.hooked:
            try:
                if not self._same_modules() or not self._same_tensors():
                    return False
            except KeyError:
                return False
            self.read = read
        return self._same_attributes()

    def _same_tensors(self) -> bool:
        return all(kept[name] is tensor for (kept, name), tensor in zip(self.slots, self.live.tensors, strict=True))

    def _same_modules(self) -> bool:
        for contents, parts in self.modules:
            # Deleting from a Sequential gives it another dict of children.
            if not all(map(is_, PARTS(contents), parts)):
                return False
        if any(hooks != _hooks_of(contents) for contents, hooks in self.hooked):
            return False
        if any(self.empty) or list(map(len, self.filled)) != self.lengths:
            return False
        return not [name for kept, name, value in self.fixed if kept[name] is not value]

    def _same_attributes(self) -> bool:
        if not self.distinct:
            return True
        # What dispatches differently is another tensor to the guards.
        mode = torch.is_inference_mode_enabled()
        guards = self.guards.get(mode)
        with without_autocast():
            if guards is not None and guards.check(*self.distinct):
                return True
            if list(map(ATTRIBUTES, self.live.tensors)) != self.attributes:
                return False
            if guards is None:
                self.guards[mode] = _guards(self.distinct)
        return True


def _walk(model: nn.Module) -> tuple[_Witness | None, Live]:
    """The model as it is now, and what witnesses that it stays so (None for modules that keep things their own way)."""
    paths: list[tuple[str, nn.Module]] = []
    _add_paths(paths, model, "")
    modules = list({id(module): module for _, module in paths}.values())
    refuse_hooks(model, filter(_has_hooks, modules))
    slots = {
        path + name: (kept, name)
        for kind in ("_parameters", "_buffers")
        for path, module in paths
        for kept in (getattr(module, kind),)
        for name, value in kept.items()
        if value is not None
    }
    tensors = tuple(kept[name] for kept, name in slots.values())
    owners: dict[int, int] = {}
    tied = [owners.setdefault(id(tensor), len(owners)) for tensor in tensors]
    weights = tuple(zip(tied, map(ATTRIBUTES, tensors), strict=True))
    state = ModelState(tuple(slots), weights, tuple(module.training for module in modules))
    live = Live(state, tensors, all(map(has_values, tensors)))
    try:
        return _witness(model, modules, list(slots.values()), live), live
    except KeyError:
        return None, live


def _witness(
    model: nn.Module, modules: list[nn.Module], slots: list[tuple[Contents, str]], live: Live
) -> _Witness | None:
    """None for modules that keep things in mappings which are no dicts; KeyError for those that lack some."""
    contents = list(map(vars, modules))
    filled = [one[name] for one in contents for name in HELD if one[name]]
    empty = tuple(one[name] for one in contents for name in (*HELD, *KINDS) if not one[name])
    if not all(isinstance(one, dict) for one in (*filled, *empty)):
        return None
    watched = WatchedDicts([*contents, *filled], empty)
    return _Witness(
        model=model,
        live=live,
        modules=[(one, PARTS(one)) for one in contents],
        hooked=[(vars(module), _hooks_of(vars(module))) for module in filter(_has_hooks, modules)],
        fixed=[(kept, name, value) for kept in filled for name, value in kept.items() if not isinstance(value, Tensor)],
        slots=slots,
        empty=empty,
        filled=filled,
        lengths=list(map(len, filled)),
        distinct=tuple({id(tensor): tensor for tensor in live.tensors}.values()),
        attributes=list(map(ATTRIBUTES, live.tensors)),
        watched=watched,
        read=watched.read(),
    )


def _add_paths(paths: list[tuple[str, nn.Module]], module: nn.Module, path: str) -> None:
    """Add a module and all below with the starts of their names, one that has several names under each of them."""
    paths.append((path, module))
    for name, child in module._modules.items():
        if child is not None:
            _add_paths(paths, child, f"{path}{name}.")


def _has_hooks(module: nn.Module) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _hooks_of(contents: Contents) -> tuple[Any, ...]:
    return tuple(hook for kind in KINDS for hook in (kind, *list(contents[kind].values())))


def _guards(tensors: Sequence[Tensor]) -> TensorGuards:
    """What compares types, sizes, dtypes, devices and gradient flags of all tensors at once."""
    sizes = [list(tensor.shape) for tensor in tensors]
    strides: list[list[int | None]] = [[None] * len(shape) for shape in sizes]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)  # type: ignore[arg-type]
