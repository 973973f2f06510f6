"""Products with weights that were laid out beforehand, as torch's CPU library reads them; that takes a copy of each.

Every product of a few rows lays its weight out anew, which takes a fifth to a half of its time. Whether the product has
the same bits is up to the library: for long sums it splits them differently.
"""

from __future__ import annotations

import torch

LEAST_ROWS = 4
"""Below, a product reads its weight in whatever layout it has."""
LEAST_ELEMENTS = 2**16
"""Of a smaller weight the layout costs less than another op's call."""


def packs(weight: torch.Tensor, rows: int) -> bool:
    """Whether products of ``rows`` rows with ``weight`` (2-D) gain by packing it, and this build of torch can."""
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.dim() == 2
    gains = rows >= LEAST_ROWS and weight.shape[0] * weight.shape[1] >= LEAST_ELEMENTS
    can = torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")  # type: ignore[no-untyped-call]
    return is_plain and gains and can


def pack(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """``weight`` (N, K) as products of ``rows`` rows with its transpose read it; opaque to all other ops."""
    packed: torch.Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    return packed
