"""How pointwise kernels walk over operands: the same elements in the same order, in as few dimensions as can be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrp_compiler.kernels.strides import Walk, tile_of, walk, walkable


@st.composite
def operands(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Tensor]]:
    """A shape, and tensors of distinct numbers that broadcast to it: transposed, cut, of one element along some."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    made = []
    for _ in range(draw(st.integers(1, 3))):
        order = draw(st.permutations(range(len(shape))))
        sizes = [1 if draw(st.booleans()) and draw(st.booleans()) else size for size in shape]
        step = draw(st.sampled_from([1, 1, 2]))
        stored = [sizes[dim] * (step if place == len(order) - 1 else 1) for place, dim in enumerate(order)]
        value = torch.arange(math.prod(stored)).view(stored)[..., ::step]
        made.append(value.permute([order.index(dim) for dim in range(len(shape))]))
    return shape, made


def _offset(way: Walk, operand: int, row: int, column: int) -> int:
    offset = column * way.inner[operand]
    for size, stride in zip(way.sizes, way.outer[operand], strict=True):
        offset += row % size * stride
        row //= size
    return offset


@settings(max_examples=150, deadline=None)
@given(operands(), st.booleans())
def test_every_element_is_visited_in_order(drawn: tuple[tuple[int, ...], list[Tensor]], rowwise: bool) -> None:
    shape, values = drawn
    way = walk(shape, [*values, None], rowwise)
    assert way.rows * way.columns == math.prod(shape)
    assert not rowwise or way.columns == shape[-1]
    for operand, value in enumerate(values):
        places = [_offset(way, operand, row, column) for row in range(way.rows) for column in range(way.columns)]
        assert places == value.expand(shape).flatten().tolist()
    assert not any(way.outer[-1]) and way.inner[-1] == 0


@pytest.mark.parametrize(
    ("shape", "rowwise", "dims"),
    [((2, 3, 4), False, (1, 24)), ((2, 3, 4), True, (6, 4)), ((1, 1), False, (1, 1)), ((0, 4), True, (0, 4))],
)
def test_contiguous_operands_are_as_few_dimensions_as_can_be(
    shape: tuple[int, ...], rowwise: bool, dims: tuple[int, int]
) -> None:
    way = walk(shape, [torch.empty(shape), torch.empty(shape)], rowwise)
    assert (way.rows, way.columns) == dims and len(way.sizes) == 1


def test_bias_rows_and_columns_stay_two_dimensions() -> None:
    way = walk((5, 7), [torch.empty(5, 7), torch.empty(7), torch.empty(5, 1)])
    assert (way.outer, way.inner) == (((7,), (0,), (1,)), (1, 1, 0))


def test_too_many_dimensions_are_refused() -> None:
    wide = torch.empty((2,) * 12)[:, :1, :, :1, :, :1, :, :1, :, :1, :, :1]
    assert "dimensions" in str(walkable(wide.shape, [wide]))


@pytest.mark.parametrize(("columns", "tile"), [(1, (1024, 1)), (3072, (1, 1024)), (1100, (4, 256)), (130, (4, 256))])
def test_tiles_leave_few_lanes_idle(columns: int, tile: tuple[int, int]) -> None:
    assert tile_of(columns, 1024) == tile
