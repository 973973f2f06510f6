"""topk_filter where the tests of all kernels do not reach: long samples, every float of 16 bits, any tie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from restated_picking import topk_filter
from torch import Tensor

from lrp_compiler.kernels.dialect.topk import TOPK_FILTER
from lrp_compiler.kernels.launch import Config, config


def _split(edge: Tensor, relevance: Tensor, fraction: float, chosen: Config) -> Tensor:
    """The result of the launches for long samples, however short these are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TOPK_FILTER.triton_module, "LONGEST_ROW", 0)
        out, launches = TOPK_FILTER.plan(edge, relevance, fraction, config=chosen)
    assert len(launches) == relevance.element_size() + 1
    for launch in launches:
        launch.run()
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("dtype", TOPK_FILTER.dtypes, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("chosen", TOPK_FILTER.configs, ids=str)
def test_every_configuration_keeps_the_same(chosen: Config, dtype: torch.dtype, device: torch.device) -> None:
    relevance = torch.randn(2, 20001, device=device).mul(3).round().to(dtype)
    edge = torch.rand(2, 20001, device=device) + 1
    assert torch.equal(_split(edge, relevance, 0.4, chosen), TOPK_FILTER.reference(edge, relevance, 0.4))


@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_every_float_of_16_bits_is_ordered(dtype: torch.dtype, fraction: float, device: torch.device) -> None:
    order = torch.randperm(2**16, generator=torch.Generator().manual_seed(0)).to(torch.int16)
    relevance = order.view(1, -1).view(dtype).to(device)
    edge = torch.arange(1.0, 2**16 + 1, device=device).view(1, -1)
    found = TOPK_FILTER.launch(edge, relevance, fraction)
    assert torch.equal(found.cpu().double(), topk_filter(edge.cpu().double(), relevance.cpu().double(), fraction))


@pytest.mark.parametrize("splits", [1, 16, 17, 40])
def test_any_number_of_programs_shares_a_sample(splits: int, device: torch.device) -> None:
    """Parts are added up sixteen at a time."""
    relevance = torch.zeros(1, 40 * 16 - 3, device=device)
    relevance[0, ::5] = 1
    edge = torch.arange(1.0, 40 * 16 - 2, device=device).view(1, -1)
    found = _split(edge, relevance, 0.61, config(num_warps=1, BLOCK=16, PROGRAMS=splits))
    assert torch.equal(found.cpu().double(), topk_filter(edge.cpu().double(), relevance.cpu().double(), 0.61))


@hypothesis_settings(max_examples=15, deadline=None)
@given(
    values=st.lists(st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0]), min_size=1, max_size=40),
    fraction=st.floats(0.01, 1),
)
def test_as_many_as_asked_are_kept_and_none_that_is_smaller(values: list[float], fraction: float) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    relevance = torch.tensor([values], device=device)
    edge = torch.arange(1.0, len(values) + 1, device=device).view(1, -1)
    exact = topk_filter(edge.cpu().double(), relevance.cpu().double(), fraction)
    assert int((exact != 0).sum()) == max(1, round(fraction * len(values)))
    found = TOPK_FILTER.launch(edge, relevance, fraction)
    parted = _split(edge, relevance, fraction, config(num_warps=1, BLOCK=16, PROGRAMS=3))
    for kept in (found, parted, TOPK_FILTER.reference(edge, relevance, fraction)):
        assert torch.equal(kept.cpu().double(), exact)


def test_what_is_dropped_is_zero_even_of_nan(device: torch.device) -> None:
    edge = torch.tensor([[float("nan"), float("inf"), -2.0, -3.0]], device=device)
    found = TOPK_FILTER.launch(edge, torch.tensor([[0.0, 0.0, 1.0, 0.0]], device=device), 0.25)
    assert torch.equal(found.cpu().view(torch.int32), torch.tensor([[0.0, 0.0, -2.0, 0.0]]).view(torch.int32))


def test_samples_may_lie_beyond_the_32_bits_of_an_index(device: torch.device) -> None:
    """Pages that nobody touches take no memory."""
    far = 2**30 + 8
    edge = torch.empty(2 * far + 3, dtype=torch.float16, device=device).as_strided((3, 3), (far, 1))
    edge.copy_(torch.arange(9, device=device).view(3, 3))
    expected = [[0, 0, 2], [0, 0, 5], [0, 0, 8]]
    assert TOPK_FILTER.launch(edge, edge, 0.3).tolist() == expected
    assert _split(edge, edge, 0.3, config(num_warps=1, BLOCK=16, PROGRAMS=2)).tolist() == expected
