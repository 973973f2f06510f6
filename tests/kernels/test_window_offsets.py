"""A pooling's winners as offsets in their windows: one byte each, and every index comes back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lrp_compiler.kernels.pooling import indices_of_offsets, window_offsets

POOLS = {2: F.max_pool2d, 3: F.max_pool3d}


@dataclass(frozen=True)
class Pooling:
    """Input sizes and geometry of one max pooling, a number per spatial dimension each."""

    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool

    def fits(self) -> bool:
        """Whether every window fits into the padded input and meets the input itself: torch's pick is none else."""
        reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        fits = all(r <= n + 2 * p for r, n, p in zip(reach, self.sizes, self.padding, strict=True))
        return fits and bool(self.pooled(torch.zeros(1, *self.sizes))[0].isfinite().all())

    def winners(self, x: Tensor) -> Tensor:
        """The flat indices that torch's own pooling returns."""
        return self.pooled(x)[1]

    def pooled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What torch's own pooling returns: values and indices."""
        geometry = (self.kernel, self.stride, self.padding, self.dilation)
        found: tuple[Tensor, Tensor] = POOLS[len(self.sizes)](
            x, *geometry, ceil_mode=self.ceil_mode, return_indices=True
        )
        return found


@st.composite
def poolings(draw: st.DrawFn) -> Pooling:
    dims = draw(st.sampled_from((2, 3)))

    def each(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * dims))

    kernel = each(1, 5 if dims == 2 else 4)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    return Pooling(each(1, 11), kernel, each(1, 4), padding, each(1, 3), draw(st.booleans()))


@given(poolings(), st.sampled_from([(2, 3), (1,), (0, 2)]), st.booleans(), st.integers(0, 2**31))
@example(Pooling((32, 32), (16, 16), (16, 16), (0, 0), (1, 1), False), (2, 3), False, 0)
@example(Pooling((9, 12), (3, 2), (2, 3), (1, 1), (2, 1), True), (1,), True, 0)
def test_every_index_comes_back(pooling: Pooling, leading: tuple[int, ...], ties: bool, seed: int) -> None:
    """Also where all of a window is equal or -inf and the first place inside the input wins."""
    assume(pooling.fits())
    x = torch.randn(*leading, *pooling.sizes, generator=torch.Generator().manual_seed(seed))
    x = torch.where(x > 0.5, x, -torch.inf) if ties else x
    indices = pooling.winners(x)
    geometry = (pooling.kernel, pooling.stride, pooling.padding, pooling.dilation)
    offsets = window_offsets(indices, pooling.sizes, geometry)
    assert offsets.dtype is torch.uint8
    assert offsets.shape == indices.shape
    found = indices_of_offsets(offsets, pooling.sizes, geometry)
    assert found.dtype is torch.int64
    assert torch.equal(found, indices)


@pytest.mark.parametrize(("dims", "channels_last"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_memory_formats_make_no_difference(dims: int, channels_last: torch.memory_format) -> None:
    sizes = (7, 8, 6)[:dims]
    pooling = Pooling(sizes, (3,) * dims, (2,) * dims, (1,) * dims, (1,) * dims, False)
    geometry = (pooling.kernel, pooling.stride, pooling.padding, pooling.dilation)
    indices = pooling.winners(torch.randn(2, 4, *sizes).contiguous(memory_format=channels_last))
    assert torch.equal(indices_of_offsets(window_offsets(indices, sizes, geometry), sizes, geometry), indices)


def test_offsets_count_the_places_of_a_window_row_by_row() -> None:
    """By hand: of a 2 x 3 window that begins at (-1, 2) the place (0, 4) is the last, number 5."""
    geometry = ((2, 3), (1, 2), (1, 0), (1, 1))
    indices = torch.full((1, 2), 4)
    assert window_offsets(indices, (5, 7), geometry).tolist() == [[3 + 4 - 0, 5]]
