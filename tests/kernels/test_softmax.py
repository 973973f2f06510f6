"""softmax_bwd where its samples do not go: every configuration, long rows, rows far apart, what it conserves."""

from __future__ import annotations

import pytest
import torch
from configured import assert_accurate_under, far_rows, launched
from hypothesis import given, settings
from hypothesis import strategies as st

from lrp_compiler.kernels.dialect.softmax import SOFTMAX_BWD
from lrp_compiler.kernels.launch import Config, config

SMALL = config(num_warps=1, HELD=16, BLOCK=32, PER_THREAD=4, SHARED=16)
"""Holds 16 elements: the samples' rows go in chunks."""


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("label", [one.label for one in SOFTMAX_BWD.samples(torch.float32, torch.device("meta"))])
def test_a_sample_in_chunks(label: str, device: torch.device) -> None:
    samples = {sample.label: sample for sample in SOFTMAX_BWD.samples(torch.bfloat16, device)}
    if samples[label].arguments[0].numel() < 1000:
        assert_accurate_under(SOFTMAX_BWD, SMALL, samples[label].arguments)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("chosen", SOFTMAX_BWD.configs, ids=str)
@pytest.mark.parametrize("longer", [-3, 5])
def test_a_row_at_the_edge_of_what_is_held(chosen: Config, longer: int, device: torch.device) -> None:
    c, residual = torch.randn(2, 1, chosen["HELD"] + longer, device=device)
    assert_accurate_under(SOFTMAX_BWD, chosen, (c, torch.randn_like(c).softmax(-1), residual))


@pytest.mark.parametrize("chosen", [None, SMALL], ids=["held", "in chunks"])
def test_rows_far_apart(chosen: Config | None, device: torch.device) -> None:
    c, residual = torch.randn(2, 3, 40, device=device).half()
    s = torch.randn_like(c).softmax(-1)
    near = launched(SOFTMAX_BWD, chosen, (c, s, residual))
    assert torch.equal(near, launched(SOFTMAX_BWD, chosen, (far_rows(c), far_rows(s), far_rows(residual))))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 9), st.integers(1, 90), st.integers(16, 64), st.integers(0, 2**31))
def test_a_row_hands_on_nothing_to_a_constant(rows: int, size: int, held: int, seed: int) -> None:
    """Softmax of x + constant is that of x, so what it transposes to sums to zero over a row."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    c = torch.randn(rows, size, device=device)
    chosen = config(num_warps=1, HELD=held, BLOCK=32, PER_THREAD=4, SHARED=64)
    made = launched(SOFTMAX_BWD, chosen, (c, torch.randn_like(c).softmax(-1), None))
    assert torch.allclose(made.double().sum(-1).cpu(), torch.zeros(rows, dtype=torch.float64), atol=1e-5)
