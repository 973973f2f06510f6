"""How many targets a relevance pass is mapped over at once, so that memory stays bounded however many are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lrp_compiler.passes.errors import ArgumentError
from lrp_compiler.passes.lifetimes import footprint
from lrp_compiler.passes.program import Program

MOST_BYTES = 2**28
"""What relevance values of targets side by side may take, unless one target takes more."""


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
