"""How pointwise kernels walk over tensors of any strides: neighbouring dimensions that every operand allows are one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lrp_compiler.kernels.launch import cdiv, next_power_of_2
from lrp_compiler.kernels.spec import Refusal, Supported

OUTER = 4
"""Dimensions beside the innermost one that kernels divide the number of a row into."""


@dataclass(frozen=True)
class Walk:
    """Rows of columns over several operands at once; ``sizes`` and each entry of ``outer`` innermost first.

    Row r lies, in operand i, at the sum over d of (r / (sizes[0] ... sizes[d-1]) mod sizes[d]) * outer[i][d], its
    columns ``inner[i]`` apart.
    """

    rows: int
    columns: int
    sizes: tuple[int, ...]
    outer: tuple[tuple[int, ...], ...]
    inner: tuple[int, ...]


def walk(shape: Sequence[int], operands: Sequence[Tensor | None], rowwise: bool = False) -> Walk:
    """How to walk over ``operands``, which broadcast to ``shape``; None stands still.

    With ``rowwise`` the last dimension stays by itself, because something is summed along it.
    """
    spread = [(0,) * len(shape) if one is None else one.expand(list(shape)).stride() for one in operands]
    own = [(shape[-1], tuple(strides[-1] for strides in spread))] if rowwise else []
    dims = collapse(shape[:-1] if rowwise else shape, [strides[:-1] if rowwise else strides for strides in spread])
    *outer, (columns, inner) = [*dims, *own] or [(1, (0,) * len(spread))]
    outer = outer or [(1, (0,) * len(spread))]
    rows = 1
    for size, _ in outer:
        rows *= size
    sizes = tuple(size for size, _ in reversed(outer))
    return Walk(rows, columns, sizes, tuple(zip(*(strides for _, strides in reversed(outer)), strict=True)), inner)


def collapse(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> list[tuple[int, tuple[int, ...]]]:
    """(size, stride in every operand) of the fewest dimensions that visit the same elements in the same order."""
    made: list[tuple[int, tuple[int, ...]]] = []
    for dim, size in enumerate(shape):
        steps = tuple(one[dim] for one in strides)
        if size == 1:
            continue
        if made and made[-1][1] == tuple(size * step for step in steps):
            made[-1] = (made[-1][0] * size, steps)
        else:
            made.append((size, steps))
    return made


def walkable(shape: Sequence[int], operands: Sequence[Tensor | None], rowwise: bool = False) -> Supported:
    """Whether kernels can walk over ``operands``."""
    found = len(walk(shape, operands, rowwise).sizes)
    return found <= OUTER or Refusal(f"its strides need {found + 1} dimensions (at most {OUTER + 1})")


def tile_of(columns: int, block: int) -> tuple[int, int]:
    """(rows, columns) of a tile of ``block`` elements that leaves few lanes idle at the end of a row."""
    widths = [min(next_power_of_2(columns), block >> shift) for shift in range(3)]
    width = min(widths, key=lambda one: cdiv(columns, one) * one)
    return block // width, width
