"""Relevance of several targets by one pass: how many at once, so that memory stays bounded, and the mapped pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from lrp_compiler.passes.errors import ArgumentError
from lrp_compiler.passes.lifetimes import footprint
from lrp_compiler.passes.program import Program

MOST_BYTES = 2**28
"""What relevance values of targets side by side may take, unless one target takes more."""

UNMAPPED = frozenset({torch.ops.aten.as_strided_scatter.default})
"""Ops of relevance graphs that torch.vmap refuses: with one of them, targets take their turns."""

_MAPPING = threading.Lock()
"""Whether torch warns of ops that it maps one by one is a setting of the process; threads change it in turns."""


def targets_side_by_side(program: Program) -> int:
    """How many targets' relevance values fit into MOST_BYTES by the plan, in the captured call; at least one."""
    assert program.relevance_graph is not None
    return max(1, MOST_BYTES // max(1, footprint(program.relevance_graph).peak))


def chunks(targets: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The targets in order, at most ``size`` at a time."""
    return (targets[start : start + size] for start in range(0, len(targets), size))


def check_targets(targets: Any, chunk: Any, function: str) -> None:
    """Raise ArgumentError unless ``targets`` is a sequence with something in it and ``chunk`` None or positive."""
    if not hasattr(targets, "__len__") or isinstance(targets, (str, dict)) or len(targets) == 0:
        cause = "it is a list with at least one target"
        raise ArgumentError(function=function, name="targets", value=targets, cause=cause)
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ArgumentError(function=function, name="chunk", value=chunk, cause="it is a positive number or None")


def run_side_by_side(
    code: Callable[..., tuple[Tensor, ...]],
    graph: fx.Graph,
    values: list[Tensor],
    of_targets: list[bool],
    masks: list[Tensor],
) -> tuple[Tensor, ...]:
    """The results of ``code``, made of a relevance graph, with one more dimension in front, an entry per target.

    So have those among its ``values`` that are ``of_targets``; ``masks``, behind these, are the same for all.
    """
    if any(node.target in UNMAPPED for node in graph.nodes):
        return _in_turns(code, values, of_targets, masks)
    in_dims = (*(0 if own else None for own in of_targets), *(None for _ in masks))
    with _MAPPING, _without_fallback_warnings():
        # What the forward pass drew and relevance draws again is the same for all targets.
        mapped: tuple[Tensor, ...] = torch.vmap(code, in_dims=in_dims, randomness="same")(*values, *masks)
    return mapped


def _in_turns(
    code: Callable[..., tuple[Tensor, ...]], values: list[Tensor], of_targets: list[bool], masks: list[Tensor]
) -> tuple[Tensor, ...]:
    count = next(len(value) for value, own in zip(values, of_targets, strict=True) if own)
    each = [
        code(*(value[place] if own else value for value, own in zip(values, of_targets, strict=True)), *masks)
        for place in range(count)
    ]
    return tuple(map(torch.stack, zip(*each, strict=True)))


@contextmanager
def _without_fallback_warnings() -> Iterator[None]:
    """Ops without a batching rule (CPU flash attention) run once per target; the result is the same."""
    warn = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
    warn(False)
    try:
        yield
    finally:
        # Torch's default: it does not tell what was set.
        warn(True)
