"""Pieces of a graph as hashable functions, so that the equal steps of an unrolled loop are one function over time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Ref:
    """A value inside a straight line: first its inputs, then the results of its calls."""

    index: int


@dataclass(frozen=True)
class Call:
    """One ATen call; values among its arguments are references."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class StraightLine:
    """A function of ``inputs`` tensors made of calls alone; the value of the last is its result."""

    inputs: int
    calls: tuple[Call, ...]

    def __call__(self, *tensors: Tensor) -> Tensor:
        values: list[Any] = list(tensors)
        for call in self.calls:
            args, kwargs = _resolved(call.args, values), {k: _resolved(v, values) for k, v in call.kwargs}
            values.append(call.target(*args, **kwargs))
        result: Tensor = values[-1]
        return result


def straight_line(inputs: list[fx.Node], nodes: list[fx.Node]) -> StraightLine:
    """The function of ``inputs`` that ``nodes``, in order, compute; they read nothing else."""
    places = {node: Ref(index) for index, node in enumerate([*inputs, *nodes])}
    calls = tuple(
        Call(
            node.target,  # type: ignore[arg-type]
            _frozen(node.args, places),
            tuple((key, _frozen(value, places)) for key, value in sorted(node.kwargs.items())),
        )
        for node in nodes
    )
    return StraightLine(len(inputs), calls)


def _frozen(value: Any, places: dict[fx.Node, Ref]) -> Any:
    if isinstance(value, fx.Node):
        return places[value]
    return tuple(_frozen(item, places) for item in value) if isinstance(value, (list, tuple)) else value


def _resolved(value: Any, values: list[Any]) -> Any:
    if isinstance(value, Ref):
        return values[value.index]
    return [_resolved(item, values) for item in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class OverTime:
    """How a tensor enters a loop: sliced along ``dim`` at every step (``keep`` leaves size 1 there), or whole."""

    dim: int | None
    keep: bool = False


def over_time(fn: Callable[..., Tensor], ways: tuple[OverTime, ...], tensors: list[Tensor], steps: int) -> Tensor:
    """``fn`` of the tensors at each of ``steps`` steps, stacked along a new first dimension."""
    if all(way.dim is None for way in ways):
        once = fn(*tensors)
        return once.expand(steps, *once.shape)
    widened = [
        tensor.unsqueeze(way.dim + 1) if way.keep and way.dim is not None else tensor
        for way, tensor in zip(ways, tensors, strict=True)
    ]
    mapped: Tensor = torch.vmap(fn, in_dims=tuple(way.dim for way in ways), out_dims=0)(*widened)
    return mapped
