"""norm_bwd where its samples do not go: every configuration, many long rows, rows far apart, what it conserves."""

from __future__ import annotations

import pytest
import torch
from configured import assert_accurate_under, far_rows, launched
from hypothesis import given, settings
from hypothesis import strategies as st

from lrp_compiler.kernels.dialect.norm import NORM_BWD
from lrp_compiler.kernels.launch import Config, config
from lrp_compiler.kernels.spec import Sample

SMALL = config(num_warps=1, HELD=16, BLOCK=32, PER_THREAD=4)
"""Holds 16 elements: the samples' rows go in chunks."""


def _drawn(device: torch.device, rows: int, size: int, channels: int | None = None) -> list[torch.Tensor]:
    c, residual = (torch.randn(rows, size, device=device) for _ in range(2))
    return [c, torch.randn(channels or size, device=device), torch.rand(rows, device=device) + 0.5, residual]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("label", [sample.label for sample in NORM_BWD.samples(torch.float32, torch.device("meta"))])
def test_a_sample_in_chunks(label: str, device: torch.device) -> None:
    samples: dict[str, Sample] = {sample.label: sample for sample in NORM_BWD.samples(torch.bfloat16, device)}
    if samples[label].arguments[0].numel() < 10000:
        assert_accurate_under(NORM_BWD, SMALL, samples[label].arguments)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("chosen", NORM_BWD.configs, ids=str)
@pytest.mark.parametrize("longer", [-3, 5])
def test_a_row_at_the_edge_of_what_is_held(chosen: Config, longer: int, device: torch.device) -> None:
    c, weight, scale, residual = _drawn(device, 1, chosen["HELD"] + longer)
    assert_accurate_under(NORM_BWD, chosen, (c, weight, scale, residual, True, 0, True))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("centred", [True, False])
def test_one_program_per_row_where_there_are_many_long_ones(
    centred: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NORM_BWD.triton_module, "FEW_ROWS", 6)
    c, weight, scale, residual = _drawn(device, 6, 20, 4)
    arguments = (c, weight, scale, residual, centred, 2)
    _, launches = NORM_BWD.plan(*arguments, config=SMALL)
    assert [one.grid for one in launches] == [(6,)]
    assert_accurate_under(NORM_BWD, SMALL, arguments)


@pytest.mark.parametrize("chosen", [None, SMALL], ids=["held", "in chunks"])
def test_rows_far_apart(chosen: Config | None, device: torch.device) -> None:
    c, weight, scale, residual = (value.half() for value in _drawn(device, 3, 40))
    near = launched(NORM_BWD, chosen, (c, weight, scale, residual, True, 0))
    far = launched(NORM_BWD, chosen, (far_rows(c), weight, scale, far_rows(residual), True, 0))
    assert torch.equal(near, far)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 9), st.integers(1, 90), st.integers(16, 64), st.integers(0, 2**31))
def test_a_centred_row_hands_on_nothing_to_a_constant(rows: int, size: int, held: int, seed: int) -> None:
    """The norm of x + constant is that of x, so what it transposes to sums to zero over a row."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    c, weight, scale, _ = _drawn(device, rows, size)
    chosen = config(num_warps=1, HELD=held, BLOCK=32, PER_THREAD=4)
    made = launched(NORM_BWD, chosen, (c, weight, scale, None, True, 0))
    assert torch.allclose(made.double().sum(-1).cpu(), torch.zeros(rows, dtype=torch.float64), atol=1e-4)
