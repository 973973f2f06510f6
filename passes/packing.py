"""The small forms of forward values: what packs them, what unpacks them, and what that takes of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lrp_compiler.kernels.bits import (
    pack_bits,
    pack_positive,
    pack_sign,
    unpack_bits,
    unpack_positive,
    unpack_quotient,
    unpack_sign,
)
from lrp_compiler.kernels.pooling import indices_of_offsets, window_offsets


@dataclass(frozen=True)
class Packing:
    """A pair of functions: (value, ...) -> small form, (small form, ...) -> what is read of the value.

    ``memory`` are the bytes that either takes meanwhile, per element of what it reads.
    """

    packs: Callable[..., torch.Tensor]
    unpacks: Callable[..., torch.Tensor]
    memory: tuple[int, int]
    planes: tuple[int, ...] = ()

    def arguments(self, shape: list[Any], extra: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What both functions take beside a tensor."""
        return (extra, extra) if self is WINNERS else ((), (shape, *extra))

    def packed_like(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor like the small form of ``value``, or of a value of its shape."""
        shape = value.shape if self is WINNERS else (*self.planes, (value.numel() + 7) // 8)
        return torch.empty(shape, dtype=torch.uint8, device=value.device)


MASK = Packing(pack_bits, unpack_bits, (1, 16))
POSITIVE = Packing(pack_positive, unpack_positive, (5, 16))
SIGN = Packing(pack_sign, unpack_sign, (9, 16), planes=(2,))
DRAWN = Packing(pack_positive, unpack_quotient, (5, 16))
WINNERS = Packing(window_offsets, indices_of_offsets, (24, 24))

PACKINGS = (MASK, POSITIVE, SIGN, DRAWN, WINNERS)
PACKERS = frozenset(packing.packs for packing in PACKINGS)
"""Functions that make a small value of a large one, from which others make what relevance reads."""
WORKING_MEMORY: dict[object, int] = {
    function: taken
    for packing in PACKINGS
    for function, taken in zip((packing.packs, packing.unpacks), packing.memory, strict=True)
}
"""Bytes that packing and unpacking take meanwhile, per element of what they read."""
