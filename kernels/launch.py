"""Launches of Triton kernels: what runs on a device, and what the ahead-of-time compiler is given."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Config:
    """One shipped configuration: tile sizes by constexpr name, warps per program, pipeline stages."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    def __getitem__(self, block: str) -> int:
        return dict(self.blocks)[block]

    def __str__(self) -> str:
        tiles = " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in self.blocks)
        return f"{tiles} w{self.num_warps} s{self.num_stages}"


def config(num_warps: int = 4, num_stages: int = 2, **blocks: int) -> Config:
    """A Config from keyword arguments."""
    return Config(tuple(blocks.items()), num_warps, num_stages)


@dataclass(frozen=True)
class Launch:
    """One kernel call: the jit function, its grid, and its arguments by name: tensors, numbers, tuples, constexprs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any] = field(repr=False)
    num_warps: int = 4
    num_stages: int = 2

    def run(self) -> None:
        """Run it on the device of its tensors; an empty grid runs nothing."""
        if 0 in self.grid:
            return
        device = next(leaf.device for leaf in pytree.tree_leaves(self.arguments) if isinstance(leaf, Tensor))
        here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with here:
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


def cdiv(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The least power of two that is not below ``size``; 1 for 0."""
    return 1 << max(size - 1, 0).bit_length()
