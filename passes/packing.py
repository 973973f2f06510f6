"""The small forms of forward values: what packs them, what unpacks them, and what that takes of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lrp_compiler.kernels.bits import (
    is_not_zero,
    is_positive,
    of_positive,
    pack_bits,
    pack_positive,
    pack_sign,
    unpack_bits,
    unpack_quotient,
    unpack_sign,
)
from lrp_compiler.kernels.pooling import indices_of_offsets, window_offsets


@dataclass(frozen=True)
class Packing:
    """A pair of functions: (value, ...) -> small form, (small form, ...) -> what is read of the value.

    ``memory`` are the bytes that either takes meanwhile, per element of what it reads; ``time`` is what both take, in
    bytes that an elementwise op moves meanwhile, per element of the value (measured on two CPU cores).
    """

    packs: Callable[..., torch.Tensor]
    unpacks: Callable[..., torch.Tensor]
    memory: tuple[int, int]
    time: float
    planes: tuple[int, ...] = ()

    def arguments(self, shape: list[Any], extra: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What both functions take beside a tensor."""
        if self is WINNERS:
            return extra, extra
        return (), extra if self in BY_BYTES else (shape, *extra)

    def packed_like(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor like the small form of ``value``, or of a value of its shape."""
        if self in BY_BYTES:
            return torch.empty(value.shape, dtype=torch.bool, device=value.device)
        shape = value.shape if self is WINNERS else (*self.planes, (value.numel() + 7) // 8)
        return torch.empty(shape, dtype=torch.uint8, device=value.device)


MASK = Packing(pack_bits, unpack_bits, (1, 16), time=6)
POSITIVE = Packing(is_positive, of_positive, (4, 0), time=3)
NOT_ZERO = Packing(is_not_zero, of_positive, (0, 0), time=1.5)
SIGN = Packing(pack_sign, unpack_sign, (9, 16), time=16, planes=(2,))
DRAWN = Packing(pack_positive, unpack_quotient, (5, 16), time=8)
WINNERS = Packing(window_offsets, indices_of_offsets, (16, 4), time=45)

BY_BYTES = (POSITIVE, NOT_ZERO)
"""Those whose small form is a mask, which has a smaller one again: bits."""
PACKINGS = (MASK, POSITIVE, NOT_ZERO, SIGN, DRAWN, WINNERS)
PACKERS: dict[Any, Packing] = {packing.packs: packing for packing in PACKINGS}
"""Functions that make a small value of a large one, from which others make what relevance reads."""
UNPACKERS = frozenset(packing.unpacks for packing in PACKINGS)
WORKING_MEMORY: dict[object, int] = {
    function: taken
    for packing in PACKINGS
    for function, taken in zip((packing.packs, packing.unpacks), packing.memory, strict=True)
}
"""Bytes that packing and unpacking take meanwhile, per element of what they read."""
