"""A network as the linear map it is at one input: y = W(x) x + r (LinearScope, arXiv 1908.05168)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrp_compiler.passes.errors import ArgumentError

if TYPE_CHECKING:
    from lrp_compiler.seeds import Target

Values = dict[str, Tensor]


class Linearised:
    """The linear map that a composite's relevance pass transposes, for every sample of a batch.

    Made by ``Tape.linearised``. With the composite ``linear_interpreter`` W x + r is the network's output; x are the
    values at the sites it was made for. Other composites give other maps W, still with r = y - W x.
    """

    def __init__(
        self, pullback: Callable[[Tensor], Values], output: Tensor, at: Values, seed_of: Callable[[Target], Tensor]
    ) -> None:
        self._pullback = pullback
        self._output = output
        self._at = at
        self._seed_of = seed_of

    @property
    def offset(self) -> Tensor:
        """r, of the output's shape: what biases and other constants add."""
        return self._output - self.apply(self._at)

    def row(self, target: Target = None) -> Values:
        """W^T e for a target (any target of ``Tape.relevance``): site -> tensor of the site's shape."""
        return self._pullback(self._seed_of(target))

    def apply(self, directions: Values) -> Tensor:
        """W v, of the output's shape, for a vector v given per site (sites left out count as zero).

        A unit impulse as v gives a column of W. Raises ArgumentError for an unknown site or a wrong shape.
        """
        for name, direction in directions.items():
            known = self._at.get(name)
            if known is None or known.shape != direction.shape:
                have = {site: tuple(value.shape) for site, value in self._at.items()}
                cause = f"the sites and their shapes are {have}"
                value = f"{name}: {tuple(direction.shape)}"
                raise ArgumentError(function="tape.linearised().apply", name="directions", value=value, cause=cause)
        # The relevance pass is linear in its seed and is W^T; its own transpose is W.
        rows, pull, *_ = torch.func.vjp(self._pullback, torch.zeros_like(self._output))
        zeros = {name: torch.zeros_like(row) for name, row in rows.items()}
        (column,) = pull({**zeros, **{name: v.to(zeros[name]) for name, v in directions.items()}})
        made: Tensor = column
        return made
