"""How far results are from what they should be; against float64 at most so many times what eager torch loses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def upcast(values: object) -> object:
    """A tree of arguments with every float tensor in float64."""
    wide = {torch.float16, torch.bfloat16, torch.float32}
    return pytree.tree_map_only(Tensor, lambda value: value.double() if value.dtype in wide else value, values)


def error(found: Tensor, exact: Tensor) -> float:
    """The root mean square error; nan and inf must stand where they stand in the exact result."""
    wide = found.double()
    assert torch.equal(wide.isfinite(), exact.isfinite()), "nan, inf or unwritten memory where numbers should be"
    difference = torch.where(exact.isfinite(), wide - exact, 0)
    return float(difference.square().mean().sqrt()) if exact.numel() else 0.0


def rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """What rounding the exact result once to ``dtype`` loses: nobody can do better."""
    return error(exact.to(dtype), torch.where(exact.to(dtype).isfinite(), exact, exact.to(dtype).double()))


def assert_as_accurate(found: Tensor, eager: Tensor, exact: Tensor, factor: float) -> None:
    """The error of ``found`` is at most ``factor`` times that of ``eager``, or of rounding once."""
    allowed = factor * max(error(eager, exact), rounding(exact, found.dtype))
    made = error(found, exact)
    assert made <= allowed, f"error {made:.3g}, allowed {allowed:.3g} ({factor:g} times eager's)"


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest expected value; infinite unless ``found`` is finite."""
    if not torch.isfinite(found).all():
        return float("inf")
    return float(((found - expected).abs().max() / expected.abs().max()).detach())
