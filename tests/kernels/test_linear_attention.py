"""linear_attention_transpose: every configuration, ends of chunks, steep decays, addresses past 2^31, TF32."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate, upcast
from hypothesis import given, settings
from hypothesis import strategies as st
from restated_scans import linear_attention_transpose
from torch import Tensor

from lrp_compiler.kernels.dialect.linear_attention import LINEAR_ATTENTION_TRANSPOSE
from lrp_compiler.kernels.dialect.selective_scan import SELECTIVE_SCAN_TRANSPOSE
from lrp_compiler.kernels.launch import Config, config

SPEC = LINEAR_ATTENTION_TRANSPOSE
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""As the fixture ``device``, for properties."""
Arguments = tuple[Tensor, Tensor, Tensor, Tensor]
SMALL = config(BLOCK_T=16, BLOCK_N=16, BLOCK_P=16, CARRIED_N=16, CARRIED_P=16)


def drawn(
    steps: int, width: int, states: int, dtype: torch.dtype = torch.float32, heads: int = 1, groups: int = 1
) -> Arguments:
    """(c, write, read, log decay) for one sample."""
    c = torch.randn(1, heads, steps, width).to(dtype)
    write, read = (torch.randn(1, groups, steps, states).to(dtype) for _ in range(2))
    return c, write, read, -torch.rand(1, heads, steps)


def check(arguments: Arguments, device: torch.device, chosen: Config | None = None) -> None:
    """The kernel, with a configuration of its own, against the recurrence's derivative."""
    given = [value.to(device) for value in arguments]
    assert SPEC.supports(*given)
    found, launches = SPEC.plan(*given, config=chosen)
    for launch in launches:
        launch.run()
    exact = linear_attention_transpose(*upcast(arguments))  # type: ignore[misc]
    assert_as_accurate(found.cpu(), SPEC.reference(*given).cpu(), exact, SPEC.tolerance)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chosen", [*SPEC.configs, SMALL], ids=str)
def test_every_configuration(chosen: Config, dtype: torch.dtype, device: torch.device) -> None:
    """More than one tile in every dimension, the last of them in part."""
    torch.manual_seed(0)
    steps, width, states = (chosen[name] + 5 for name in ("BLOCK_T", "BLOCK_P", "CARRIED_N"))
    check(drawn(steps, width, states, dtype), device, chosen)


@pytest.mark.parametrize("steps", [15, 16, 17, 63, 64, 65])
def test_ends_of_chunks(steps: int, device: torch.device) -> None:
    torch.manual_seed(steps)
    check(drawn(steps, 3, 2), device)


@settings(max_examples=10, deadline=None)
@given(
    steps=st.integers(1, 40),
    width=st.integers(1, 20),
    states=st.integers(1, 20),
    groups=st.integers(1, 2),
    heads=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_any_sizes(steps: int, width: int, states: int, groups: int, heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    arguments = drawn(steps, width, states, heads=groups * heads, groups=groups)
    exact = linear_attention_transpose(*(value.double() for value in arguments))
    found = SPEC.launch(*(value.to(HERE) for value in arguments)).cpu().double()
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rate", [-30.0, -1e-4, 0.05])
def test_steep_slow_and_negative_decay(rate: float, device: torch.device) -> None:
    """exp(-30 * 64) is zero, its inverse infinite: neither reaches a result."""
    torch.manual_seed(0)
    c, write, read, decay = drawn(130, 4, 3)
    check((c, write, read, torch.full_like(decay, rate)), device)


def test_one_state_is_a_selective_scan(device: torch.device) -> None:
    """With one state per channel both ops transpose the same recurrence."""
    c, write, read, decay = (value.to(device) for value in drawn(20, 4, 1))
    over_time = [value.movedim(2, 0) for value in (c * read, decay.exp().unsqueeze(-1), write)]
    expected = SELECTIVE_SCAN_TRANSPOSE.launch(*over_time, [20, 1, 1, 4]).movedim(0, 2)
    torch.testing.assert_close(SPEC.launch(c, write, read, decay), expected, rtol=1e-5, atol=1e-5)


def test_addresses_past_two_to_the_31(device: torch.device) -> None:
    """Steps lie 2^30 elements apart; only the pages that are read are touched."""
    wide = torch.empty(2**31 + 8, dtype=torch.float16, device=device)
    c, write, read, decay = (value.half().to(device) for value in drawn(3, 4, 4))
    expected = SPEC.launch(c, write, read, decay)
    for place, operand in enumerate((c, write, read)):
        operands = [c, write, read]
        operands[place] = wide.as_strided((1, 1, 3, 4), (0, 0, 2**30, 1)).copy_(operand)
        assert torch.equal(SPEC.launch(*operands, decay), expected)
    apart = wide.as_strided((1, 1, 3), (0, 0, 2**30)).copy_(decay)
    assert torch.equal(SPEC.launch(c, write, read, apart), expected)


@pytest.mark.parametrize("allowed", [False, True])
def test_float32_is_multiplied_exactly_unless_torch_may_use_tf32(allowed: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        _, launches = SPEC.plan(*drawn(5, 4, 3))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert {launch.arguments["PRECISION"] for launch in launches} == {"tf32" if allowed else "ieee"}
