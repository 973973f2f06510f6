"""gated_mlp_bwd where its samples do not go: every configuration, rows far apart, equal shares, extremes."""

from __future__ import annotations

import pytest
import torch
from configured import assert_accurate_under, far_rows, launched
from hypothesis import given, settings
from hypothesis import strategies as st

from lrp_compiler.kernels.dialect.gated_mlp import ACTIVATIONS, GATED_MLP_BWD
from lrp_compiler.kernels.launch import Config


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("chosen", GATED_MLP_BWD.configs, ids=str)
@pytest.mark.parametrize("width", [900, 33])
def test_every_configuration(chosen: Config, width: int, device: torch.device) -> None:
    c, gate, up = torch.randn(3, 5, width + 1, device=device)[..., :width]
    assert_accurate_under(GATED_MLP_BWD, chosen, (c, gate, up, "silu", 0.5))


def test_rows_far_apart(device: torch.device) -> None:
    c, gate, up = torch.randn(3, 3, 40, device=device).half()
    near = launched(GATED_MLP_BWD, None, (c, gate, up, "silu", 0.5))
    far = launched(GATED_MLP_BWD, None, (far_rows(c), far_rows(gate), far_rows(up), "silu", 0.5))
    assert all(map(torch.equal, near, far))


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(list(ACTIVATIONS)), st.integers(1, 200), st.integers(0, 2**31))
def test_both_operands_have_the_same_relevance(activation: str, size: int, seed: int) -> None:
    """The half rule: share of R = c h each, R being activation times coefficient."""
    torch.manual_seed(seed)
    c, gate, up = torch.randn(3, size, device="cuda" if torch.cuda.is_available() else "cpu")
    c_gate, c_up = launched(GATED_MLP_BWD, None, (c, gate, up, activation, 0.5))
    assert torch.allclose(c_gate * gate, c_up * up, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_open_and_shut_far_from_zero(activation: str, dtype: torch.dtype, device: torch.device) -> None:
    gate = torch.tensor([-3e38, -1e3, -120.0, 120.0, 1e3, 3e38], device=device).to(dtype)
    one = torch.ones_like(gate)
    c_gate, _ = launched(GATED_MLP_BWD, None, (one, gate, one, activation, 1.0))
    wanted = one if activation == "identity" else (gate > 0).to(dtype)
    assert torch.equal(c_gate, wanted)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name not in ("identity", "relu")])
def test_a_gate_that_is_not_a_number_stays_so(activation: str, device: torch.device) -> None:
    gate = torch.tensor([float("nan"), 1.0], device=device)
    c_gate, c_up = launched(GATED_MLP_BWD, None, (torch.ones_like(gate), gate, torch.ones_like(gate), activation, 1.0))
    assert c_gate.isnan().tolist() == c_up.isnan().tolist() == [True, False]
