"""Masks and signs as bits: what comes out is what went in, for every shape, layout and number."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lrp_compiler.kernels.bits import (
    BLOCK,
    is_not_zero,
    is_positive,
    of_positive,
    pack_bits,
    pack_positive,
    pack_sign,
    through,
    through_,
    unpack_bits,
    unpack_quotient,
    unpack_sign,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "transposed": lambda x: x.movedim(0, -1) if x.dim() else x,
    "every second": lambda x: x[::2] if x.dim() else x,
    "from the second on": lambda x: x[1:] if x.dim() else x,
    "expanded": lambda x: x[:1].expand_as(x) if x.dim() and x.shape[0] else x,
    "last dimension cut": lambda x: x[..., 1:] if x.dim() else x,
}


def special(dtype: torch.dtype) -> Tensor:
    """The numbers that comparisons go wrong at, of either sign."""
    info = torch.finfo(dtype)
    numbers = [0.0, info.tiny, info.smallest_normal * info.eps, 1.0, info.eps, info.max, math.inf, math.nan]
    positive = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    return torch.cat([positive, -positive])


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers, about half of them special."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator).to(dtype)
    odd = special(dtype)
    chosen = odd[torch.randint(len(odd), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.5, drawn, chosen)


def packed(mask: Tensor) -> Tensor:
    """The bits of a mask by numpy, the first element in the lowest bit."""
    return torch.from_numpy(numpy.packbits(mask.numpy().ravel(), bitorder="little"))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers down to the sign of zero and the payload of nan."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    same_type = one.dtype == other.dtype and one.shape == other.shape
    return same_type and torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))


@given(SHAPES, st.sampled_from(sorted(LAYOUTS)), st.integers(0, 2**31))
@example((9,), "from the second on", 0)
@example((16,), "every second", 0)
@example((8,), "expanded", 0)
@example((), "dense", 0)
@example((0, 3), "dense", 0)
def test_a_mask_comes_back(shape: tuple[int, ...], layout: str, seed: int) -> None:
    mask = LAYOUTS[layout](torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5)
    bits = pack_bits(mask)
    assert bits.dtype is torch.uint8
    assert bits.shape == (math.ceil(mask.numel() / 8),)
    assert torch.equal(bits, packed(mask))
    found = unpack_bits(bits, mask.shape)
    assert found.dtype is torch.bool
    assert torch.equal(found, mask)


@given(SHAPES, st.sampled_from(sorted(LAYOUTS)), st.sampled_from(FLOATS), st.integers(0, 2**31))
def test_what_a_relu_passes_comes_back(shape: tuple[int, ...], layout: str, dtype: torch.dtype, seed: int) -> None:
    """Of any value, and of a ReLU's output, the derivative of ReLU is bitwise the one that reads the value itself."""
    drawn = LAYOUTS[layout](numbers(shape, dtype, seed))
    edge = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for value in (drawn, torch.relu(drawn)):
        mask = is_positive(value)
        assert torch.equal(mask, ~(value <= 0))
        assert torch.equal(pack_positive(value), packed(mask))
        read = of_positive(mask, dtype)
        assert read.dtype is dtype
        expected = torch.ops.aten.threshold_backward(edge, value, 0)
        assert same_bits(torch.ops.aten.threshold_backward(edge, read, 0), expected)
        assert same_bits(through(edge, mask), expected)
        for overwritten in (edge.clone(), torch.stack([edge, edge], -1)[..., 0]):
            assert same_bits(through_(overwritten, mask), expected)
    assert torch.equal(is_not_zero(torch.relu(drawn)), mask)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 3, BLOCK // 4, 2), (2, 4, 1, BLOCK // 8 + 1)])
def test_masks_are_applied_in_place(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """In blocks, the last of which may be short, whatever is masked; not where autograd or torch.func looks on."""
    edge = torch.randn(shape).to(memory_format=layout)
    mask = (torch.rand(shape) < 0.5).to(memory_format=layout)
    edge[mask.logical_not()] = math.inf
    expected = torch.where(mask, edge, 0.0)
    written = edge.clone(memory_format=torch.preserve_format)
    assert through_(written, mask).data_ptr() == written.data_ptr()
    assert torch.equal(written, expected)
    leaf = edge.clone().requires_grad_()
    assert torch.equal(through_(leaf, mask), expected) and torch.equal(leaf, edge)
    found = torch.vmap(through_, in_dims=(0, None))(torch.stack([edge, 2 * edge]), mask)
    assert torch.equal(found, torch.stack([expected, 2 * expected]))


@given(SHAPES, st.sampled_from(FLOATS), st.integers(0, 2**31))
def test_a_scaled_draw_comes_back(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    draw = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.7).to(dtype)
    assert same_bits(unpack_quotient(pack_positive(draw), shape, dtype, 0.7), draw / 0.7)


@given(SHAPES, st.sampled_from(sorted(LAYOUTS)), st.sampled_from(FLOATS), st.integers(0, 2**31))
def test_a_sign_comes_back(shape: tuple[int, ...], layout: str, dtype: torch.dtype, seed: int) -> None:
    value = LAYOUTS[layout](numbers(shape, dtype, seed))
    bits = pack_sign(value)
    assert bits.shape == (2, math.ceil(value.numel() / 8))
    assert same_bits(unpack_sign(bits, value.shape, dtype), value.sign())


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_special_number_by_hand(dtype: torch.dtype) -> None:
    """Zeros of either sign are not positive, the smallest numbers are; nan counts as positive and has the sign 0."""
    value = special(dtype)
    half = len(value) // 2
    assert of_positive(is_positive(value), dtype).tolist() == [0.0, *[1.0] * 7, *[0.0] * 7, 1.0]
    expected = [0.0, *[1.0] * (half - 2), 0.0]
    assert unpack_sign(pack_sign(value), value.shape, dtype).tolist() == [*expected, *(-x for x in expected)]
