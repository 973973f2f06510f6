"""Triton's interpreter, as these tests run it, rounds bfloat16 to the nearest."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from lrp_compiler.kernels.spec import interpreting


@triton.jit
def _narrowed(value, out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, SIZE)
    tl.store(out + place, tl.load(value + place).to(out.dtype.element_ty))


@pytest.mark.skipif(not interpreting(), reason="kernels run compiled here")
def test_bfloat16_is_rounded_to_the_nearest() -> None:
    special = torch.tensor([1.0, 1.0039, -1.9999, 3.4e38, float("inf"), float("nan"), 1e-40, -0.0])
    value = torch.cat([special, torch.randn(120, generator=torch.Generator().manual_seed(0))])
    out = torch.empty(128, dtype=torch.bfloat16)
    _narrowed[(1,)](value, out, SIZE=128)
    assert torch.equal(out.view(torch.int16), value.bfloat16().view(torch.int16))
