"""Masks and signs as bytes and bits: a byte, or an eighth of one per element and plane, where a value takes four.

Eight bytes of 0 or 1 are read as one integer, so that one product collects or spreads them; comparisons of floats are
several times slower on CPU than clamping and casting, so there are none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

GATHER = 0x0102040810204080
"""The product with eight bytes of 0 or 1 has them in its highest byte, byte k as bit k."""
SPREAD = 0x0101010101010101
"""The product with a byte has that byte eight times."""
BIT_OF_EACH = 0x8040201008040201 - (1 << 64)
"""Bit k of byte k."""
TO_HIGHEST = 0x7F7F7F7F7F7F7F7F
"""Added to bytes with one bit or none, this leaves the highest bit set where there was one."""
BLOCK = 1 << 18
"""Elements of which a processor's cache holds the mask in floats."""


def is_positive(x: Tensor) -> Tensor:
    """Where ``x`` is not <= 0 (as in the derivative of ReLU, NaN counts), as bool."""
    return x.clamp(min=0).to(torch.bool)


def is_not_zero(x: Tensor) -> Tensor:
    """The same of what cannot be negative."""
    return x.to(torch.bool)


def of_positive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """1 where the tensor was not <= 0, else 0."""
    # As integers: from bool torch converts element by element.
    return mask.view(torch.uint8).to(dtype)


def through(c: Tensor, mask: Tensor) -> Tensor:
    """``c`` where the tensor was not <= 0, else 0, whatever ``c`` holds there."""
    made: Tensor = torch.ops.aten.threshold_backward.default(c, of_positive(mask, c.dtype), 0)
    return made


def through_(c: Tensor, mask: Tensor) -> Tensor:
    """The same bits, which take the place of ``c`` where that can be written to and lies as ``mask`` does."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    order = sorted(range(c.dim()), key=c.stride, reverse=True)
    dense = [c.permute(order), mask.permute(order)]
    if wrapped(c) or wrapped(mask) or c.requires_grad or not all(one.is_contiguous() for one in dense):
        return through(c, mask)
    # New memory costs more than the product: the kernel hands out each page of it zeroed, one by one.
    block = BLOCK if c.device.type == "cpu" else max(1, c.numel())
    for part, kept in zip(*(torch.split(one.view(-1), block) for one in dense), strict=True):
        torch.ops.aten.threshold_backward.grad_input(part, of_positive(kept, c.dtype), 0, grad_input=part)
    return c


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor of n elements as uint8 (ceil(n / 8),), in the order of ``mask.flatten()``."""
    # Converted, not viewed: what is read as int64 has to lie densely, from a multiple of eight bytes on.
    flat = mask.flatten().to(torch.uint8)
    missing = -flat.shape[0] % 8
    if missing:
        flat = F.pad(flat, (0, missing))
    # Rows of eight, since a tensor of nothing may have any stride.
    words = flat.view(flat.shape[0] // 8, 8).view(torch.int64).flatten()
    return (words * GATHER).bitwise_right_shift_(56).to(torch.uint8)


def _bytes(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The packed elements as uint8 of ``shape``, 0 or 1."""
    words = bits.to(torch.int64).mul_(SPREAD).bitwise_and_(BIT_OF_EACH)
    words.add_(TO_HIGHEST).bitwise_right_shift_(7).bitwise_and_(SPREAD)
    return words.view(torch.uint8)[: math.prod(shape)].view(shape)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool tensor of ``shape`` that ``pack_bits`` packed."""
    return _bytes(bits, shape).view(torch.bool)


def pack_positive(x: Tensor) -> Tensor:
    """``is_positive`` as bits."""
    return pack_bits(is_positive(x))


def unpack_quotient(bits: Tensor, shape: Sequence[int], dtype: torch.dtype, divisor: float) -> Tensor:
    """1 / ``divisor`` where the packed tensor was not <= 0, else 0."""
    return _bytes(bits, shape).to(dtype).div_(divisor)


def pack_sign(x: Tensor) -> Tensor:
    """The sign of every element of ``x`` as two bits: uint8 (2, ceil(n / 8))."""
    return torch.stack([pack_positive(x), pack_positive(-x)])


def unpack_sign(bits: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """sign(x) of the packed tensor."""
    positive, negative = (_bytes(plane, shape).view(torch.int8) for plane in bits)
    return (positive - negative).to(dtype)
