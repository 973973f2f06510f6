"""Graph inputs that are made of weights alone, once for each version of these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from lrp_compiler.kernels.packed_products import pack


@dataclass(frozen=True)
class Preparation:
    """The further input ``name`` of a graph: what ``recipe`` makes of the values that the graph inputs ``of`` hold.

    With ``packed_for`` it is laid out for products of so many rows. It takes ``bytes`` as long as it is kept; recipes
    of the same ``key`` make the same.
    """

    name: str
    of: tuple[str, ...]
    recipe: fx.Graph = field(compare=False, repr=False)
    bytes: int
    packed_for: int = 0

    @cached_property
    def key(self) -> tuple[str, bool]:
        return str(self.recipe), self.packed_for > 0

    def make(self, *weights: Tensor) -> Tensor:
        """The input's value for these weights."""
        made: Tensor = self._made(*weights)
        return pack(made, self.packed_for) if self.packed_for else made

    @cached_property
    def _made(self) -> Callable[..., Any]:
        return fx.GraphModule(torch.nn.Module(), self.recipe).forward
