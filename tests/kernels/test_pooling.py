"""maxpool_bwd where the tests of all kernels do not reach: every tile, any geometry, far addresses, nan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from restated_picking import maxpool_bwd
from torch import Tensor
from torch.nn import functional as F

from lrp_compiler.kernels.dialect.pooling import MAXPOOL_BWD
from lrp_compiler.kernels.launch import Config
from lrp_compiler.kernels.pooling import Geometry, window_offsets

FORMATS = (torch.contiguous_format, torch.channels_last)


def _offsets(image: Tensor, geometry: Geometry) -> Tensor:
    indices = F.max_pool2d(image, *geometry, return_indices=True)[1]
    return window_offsets(indices, image.shape[2:], geometry)


@pytest.mark.parametrize("memory_format", FORMATS, ids=("rows", "channels_last"))
@pytest.mark.parametrize("config", MAXPOOL_BWD.configs, ids=str)
def test_every_tile_gathers_the_same(config: Config, memory_format: torch.memory_format, device: torch.device) -> None:
    geometry = ((3, 3), (2, 2), (1, 1), (1, 1))
    image = torch.randn(1, 21, 19, 6, generator=torch.Generator().manual_seed(0))
    offsets = _offsets(image, geometry).to(device, memory_format=memory_format)
    # Whole numbers, whose sums are exact.
    c = torch.arange(offsets.numel(), dtype=torch.float32, device=device).view(offsets.shape)
    c = c.contiguous(memory_format=memory_format)
    arguments = (c, offsets, [19, 6], *map(list, geometry))
    out, launches = MAXPOOL_BWD.plan(*arguments, config=config)
    for launch in launches:
        launch.run()
    assert torch.equal(out.cpu().double(), maxpool_bwd(c.cpu().double(), offsets.cpu(), *arguments[2:]))
    assert out.is_contiguous(memory_format=memory_format)


@hypothesis_settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_geometry_gathers_what_its_windows_give(data: st.DataObject) -> None:
    kernel = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    dilation = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    size = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 40)))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    assume(all(r <= n + 2 * p for r, n, p in zip(reach, size, padding, strict=True)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image = torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(0))
    geometry = (kernel, stride, padding, dilation)
    # A dilated window may lie in the padding alone, and has no winner then.
    assume(bool(F.max_pool2d(image, *geometry).isfinite().all()))
    offsets = _offsets(image, geometry)
    c = torch.arange(offsets.numel(), dtype=torch.float32).view(offsets.shape)
    arguments = (list(size), *map(list, geometry))
    found = MAXPOOL_BWD.launch(c.to(device), offsets.to(device), *arguments)
    assert torch.equal(found.cpu().double(), maxpool_bwd(c.double(), offsets, *arguments))


def test_images_may_lie_beyond_the_32_bits_of_an_index(device: torch.device) -> None:
    """Pages that nobody touches take no memory."""
    far = 2**30 + 8
    c = torch.empty(2 * far + 4, dtype=torch.float16, device=device).as_strided((3, 1, 2, 2), (far, 4, 2, 1))
    offsets = torch.empty(2 * far + 4, dtype=torch.uint8, device=device).as_strided((3, 1, 2, 2), (far, 4, 2, 1))
    c.copy_(torch.arange(12, device=device).view(3, 1, 2, 2))
    offsets.copy_(torch.arange(12, device=device).remainder(4).view(3, 1, 2, 2))
    arguments = ([4, 4], [2, 2], [2, 2], [0, 0], [1, 1])
    found = MAXPOOL_BWD.launch(c, offsets, *arguments)
    assert torch.equal(found.cpu().double(), maxpool_bwd(c.cpu().double(), offsets.cpu(), *arguments))


def test_nan_goes_to_the_winner_alone(device: torch.device) -> None:
    c = torch.tensor([[[[float("nan"), 1.0], [2.0, float("inf")]]]], device=device)
    offsets = torch.tensor([[[[3, 3], [0, 1]]]], dtype=torch.uint8, device=device)
    found = MAXPOOL_BWD.launch(c, offsets, [3, 3], [2, 2], [1, 1], [0, 0], [1, 1]).cpu()
    expected = torch.tensor([[[[0.0, 0, 0], [2, float("nan"), 1 + float("inf")], [0, 0, 0]]]])
    assert torch.equal(found.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))
