"""Seeds at a few entries of an output: which ones, dense, and on the rows alone that hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = dict[int, Tensor]
"""Dimension of an output -> the numbers of the rows that a seed starts at, (count,)."""


@dataclass(frozen=True)
class Entries:
    """Entries of an output and their coefficients: per sample k of them, the same one perhaps more than once.

    ``places`` holds a (batch, k) tensor of indices for every dimension behind the first, ``weights`` is (batch, k).
    """

    places: tuple[Tensor, ...]
    weights: Tensor

    @classmethod
    def single(cls, places: Sequence[Tensor], output: Tensor) -> Entries:
        """One entry per sample, of coefficient 1; ``places`` are (batch,)."""
        found = tuple(place.unsqueeze(1) for place in places)
        return cls(found, torch.ones(output.shape[0], 1, dtype=output.dtype, device=output.device))

    def __add__(self, other: Entries) -> Entries:
        places = tuple(torch.cat(pair, 1) for pair in zip(self.places, other.places, strict=True))
        return Entries(places, torch.cat([self.weights, other.weights], 1))

    def __neg__(self) -> Entries:
        return Entries(self.places, -self.weights)

    def dense(self, shape: Sequence[int]) -> Tensor:
        """The seed: zero but for the entries, of which equal ones add up."""
        seed = self.weights.new_zeros(tuple(shape))
        samples = torch.arange(self.weights.shape[0], device=seed.device).unsqueeze(1)
        return seed.index_put_((samples, *self.places), self.weights, accumulate=True)


@dataclass(frozen=True)
class SparseSeed:
    """A seed on some rows of its output's dimensions; several of them side by side have one more dimension in front."""

    values: Tensor
    rows: Rows


def on_rows(targets: Sequence[Entries], shape: Sequence[int], share: int) -> list[SparseSeed] | None:
    """Each seed on as many rows as the others, of dimensions of which at most one ``share``-th is needed.

    None where that is none. The number of rows is a power of two, so that few different graphs come of it.
    """
    batch, *sizes = shape
    dims = range(len(sizes))
    is_shared = [all(_is_shared(one.places[dim]) for one in targets) for dim in dims]
    most = max(one.weights.shape[1] for one in targets)
    counts = [_power_of_two(most if shared else batch * most) for shared in is_shared]
    picked = [dim for dim in dims if counts[dim] * share <= sizes[dim]]
    if not picked or 0 in shape:
        return None
    small = [batch, *(counts[dim] if dim in picked else sizes[dim] for dim in dims)]
    return [_on_rows(one, picked, is_shared, counts, sizes, small) for one in targets]


def _on_rows(
    entries: Entries, picked: list[int], is_shared: list[bool], counts: list[int], sizes: list[int], small: list[int]
) -> SparseSeed:
    rows: Rows = {}
    local = []
    batch, each = entries.weights.shape
    for dim, places in enumerate(entries.places):
        places = places % sizes[dim]
        if dim not in picked:
            local.append(places)
            continue
        own = torch.arange(each, device=places.device).expand(batch, each)
        step = 0 if is_shared[dim] else each
        local.append(own + step * torch.arange(batch, device=places.device).unsqueeze(1))
        needed = places[0] if is_shared[dim] else places.flatten()
        rows[dim + 1] = torch.cat([needed, needed[:1].expand(counts[dim] - len(needed))])
    return SparseSeed(Entries(tuple(local), entries.weights).dense(small), rows)


def _is_shared(places: Tensor) -> bool:
    """Whether all samples ask for the same entries; of a number given for all that is known without a look."""
    return places.shape[0] <= 1 or places.stride(0) == 0 or bool((places == places[:1]).all())


def _power_of_two(count: int) -> int:
    return 1 << max(0, math.ceil(math.log2(max(1, count))))


def rows_of(seed: Tensor, share: int) -> SparseSeed | None:
    """A seed on the rows that are not zero throughout, of dimensions where these are at most one ``share``-th."""
    rows: Rows = {}
    for dim in range(1, seed.dim()):
        others = [other for other in range(seed.dim()) if other != dim]
        numbers = (seed != 0).any(others).nonzero().flatten() if len(others) else seed.nonzero().flatten()
        count = _power_of_two(len(numbers))
        if len(numbers) and count * share <= seed.shape[dim]:
            # Rows of zeros make up the number; any will do that is not among them.
            spare = (seed == 0).all(others).nonzero().flatten()[: count - len(numbers)]
            rows[dim] = torch.cat([numbers, spare])
    for dim, numbers in rows.items():
        seed = seed.index_select(dim, numbers)
    return SparseSeed(seed, rows) if rows else None
