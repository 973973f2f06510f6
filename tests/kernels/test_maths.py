"""Functions in kernels: exact ones lose what one rounding loses, fast ones less than a 16-bit result shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.triton_dialect import maths

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "log": torch.log,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erfc": torch.erfc,
}


@triton.jit
def _functions(x, exp, log, sigmoid, tanh, erfc, SIZE: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, SIZE)
    value = tl.load(x + place)
    tl.store(exp + place, maths.exp(value, EXACT))
    tl.store(log + place, maths.log(tl.abs(value), EXACT))
    tl.store(sigmoid + place, maths.sigmoid(value, EXACT))
    tl.store(tanh + place, maths.tanh(value, EXACT))
    tl.store(erfc + place, maths.erfc(value, EXACT))


def _computed(x: Tensor, exact: bool) -> dict[str, Tensor]:
    made = {name: torch.empty_like(x) for name in FUNCTIONS}
    _functions[(1,)](x, *made.values(), SIZE=x.numel(), EXACT=exact)
    return made


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 9.0])
def test_functions_against_float64(scale: float, exact: bool, device: torch.device) -> None:
    """Relative errors, in units of float32's; the fast ones stay far below bfloat16's, which is 2^15 times as large."""
    x = scale * torch.randn(1024, device=device)
    unit = torch.finfo(torch.float32).eps
    allowed = dict.fromkeys(FUNCTIONS, 2.0 if exact else 50.0)
    # Its exponent is x^2, of which a rounding counts x^2 times.
    allowed["erfc"] = 200.0
    for name, made in _computed(x, exact).items():
        wanted = FUNCTIONS[name](x.double().abs() if name == "log" else x.double())
        kept = wanted.abs() > 1e-30
        relative = ((made - wanted) / wanted).abs()[kept]
        assert relative.max() < allowed[name] * unit, name


@pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_functions_at_the_edges(exact: bool, device: torch.device) -> None:
    edges = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 88.7, -87.0, 1e-36, 200.0, -200.0, 3e38, -3e38]
    x = torch.tensor([*edges, 1.0, 1.0, 1.0, 1.0], device=device)
    for name, made in _computed(x, exact).items():
        wanted = FUNCTIONS[name](x.abs() if name == "log" else x)
        assert torch.allclose(made, wanted, rtol=1e-5, atol=1e-37, equal_nan=True), name
