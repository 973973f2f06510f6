"""selective_scan_transpose: every configuration, any sizes and broadcasts, addresses past 2^31, what is never read."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from restated_scans import selective_scan_transpose
from torch import Tensor

from lrp_compiler.kernels.dialect.selective_scan import SELECTIVE_SCAN_TRANSPOSE
from lrp_compiler.kernels.launch import Config, config

SPEC = SELECTIVE_SCAN_TRANSPOSE
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""As the fixture ``device``, for properties."""


def drawn(steps: int, batch: int, channels: int, states: int, device: torch.device = HERE) -> tuple[Tensor, ...]:
    """(states, decay, write) in float32."""
    shape = (steps, batch, channels, states)
    return torch.randn(shape).to(device), torch.rand(shape).to(device), torch.randn(shape).to(device)


def restated(states: Tensor, decay: Tensor, write: Tensor | None, sizes: list[int]) -> Tensor:
    """The recurrence's derivative in float64."""
    wide = [None if value is None else value.cpu().double() for value in (states, decay, write)]
    found: Tensor = selective_scan_transpose(*wide, sizes)  # type: ignore[arg-type]
    return found


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("chosen", [*SPEC.configs, config(num_warps=1, LANES=8, STEPS=4)], ids=str)
def test_every_configuration_over_several_blocks_of_time(chosen: Config, device: torch.device) -> None:
    operands, sizes = drawn(chosen["STEPS"] + 3, 1, 3, 5, device), [chosen["STEPS"] + 3, 1, 3, 1]
    found, (launch,) = SPEC.plan(*operands, sizes, config=chosen)
    launch.run()
    eager = SPEC.reference(*operands, sizes)
    assert_as_accurate(found.cpu(), eager.cpu(), restated(*operands, sizes), SPEC.tolerance)


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    seeds=st.integers(0, 2),
    repeats=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=2, max_size=2),
    summed=st.sampled_from([(False, False), (False, True), (True, False)]),
)
def test_any_operand_may_repeat_along_any_dimension(
    sizes: tuple[int, int, int, int],
    seeds: int,
    repeats: list[tuple[bool, bool, bool]],
    summed: tuple[bool, bool],
) -> None:
    """One value of a decay or write holds for a whole dimension; several seeds add one, and one at most is summed."""
    states, *others = drawn(*sizes)
    factors = []
    for value, repeated in zip(others, repeats, strict=True):
        for dim, once in enumerate(repeated, 1):
            value = value.narrow(dim, 0, 1) if once else value
        factors.append(value.unsqueeze(1) if seeds else value)
    states = torch.stack([states * (seed + 1) for seed in range(seeds)], 1) if seeds else states
    kept = [1 if once else size for size, once in zip(states.shape[-2:], summed, strict=True)]
    arguments = (states, *factors, [*states.shape[:-2], *kept])
    # Operands that repeat crosswise lie along more axes than the kernel walks; the refused calls have one.
    assume(SPEC.supports(*arguments))
    torch.testing.assert_close(SPEC.launch(*arguments).cpu().double(), restated(*arguments), rtol=1e-5, atol=1e-5)


def test_addresses_past_two_to_the_31(device: torch.device) -> None:
    """Steps lie 2^30 elements apart; only the pages that are read are touched."""
    wide = torch.empty(2**31 + 8, dtype=torch.float16, device=device)
    apart = wide.as_strided((3, 1, 2, 4), (2**30, 8, 4, 1))
    states, decay, write = (value.half() for value in drawn(3, 1, 2, 4, device))
    sizes = [3, 1, 2, 1]
    for place, operand in enumerate((states, decay, write)):
        operands = [states, decay, write]
        apart.copy_(operand)
        operands[place] = apart
        assert torch.equal(SPEC.launch(*operands, sizes), SPEC.launch(states, decay, write, sizes))


def test_the_first_decay_is_never_read(device: torch.device) -> None:
    states, decay, write = drawn(4, 1, 3, 2, device)
    expected = SPEC.launch(states, decay, write, [4, 1, 3, 1])
    decay[0] = torch.nan
    assert torch.equal(SPEC.launch(states, decay, write, [4, 1, 3, 1]), expected)


def test_large_states_take_more_warps() -> None:
    """A channel's states stay in one program, at most 32 of them to a warp and step, or 128 where they are many."""
    for states, warps in ((16, 1), (128, 4), (256, 8), (1024, 8)):
        meta = [torch.empty(64, 1, 8, states, device="meta") for _ in range(3)]
        (launch,) = SPEC.plan(*meta, [64, 1, 8, 1])[1]
        assert (launch.arguments["BLOCK_N"], launch.num_warps) == (states, warps)
