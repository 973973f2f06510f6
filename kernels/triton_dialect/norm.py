"""norm_bwd in Triton: one program per row, the row in registers, one read and one write."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.launch import Launch, next_power_of_2
from lrp_compiler.kernels.spec import contiguous_like


@triton.jit
def norm_bwd_kernel(
    c, weight, rstd, residual, out,
    size, c_row, c_column, weight_stride, rstd_stride, residual_row, residual_column,
    groups, channels_per_group, elements_per_channel,
    HAS_WEIGHT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CENTRED: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Rows times strides pass 2^31 in large tensors.
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    far = column.to(tl.int64)
    value = tl.load(c + row * c_row + far * c_column, mask=inside, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        place = column
        if GROUPED:
            place = (row % groups).to(tl.int32) * channels_per_group + column // elements_per_channel
        value *= tl.load(weight + place * weight_stride, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        value -= tl.sum(value, 0) / size
    value *= tl.load(rstd + row * rstd_stride).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * residual_row + far * residual_column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + far, value.to(out.dtype.element_ty), mask=inside)


def plan_norm_bwd(
    c: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    residual: Tensor | None,
    centred: bool,
    groups: int,
    config: None = None,
) -> tuple[Tensor, list[Launch]]:
    """The result and the launch that fills it."""
    out = contiguous_like(c)
    rows, size = c.shape
    block = next_power_of_2(size)
    channels = weight.shape[0] // groups if weight is not None and groups else 1
    arguments = {
        "c": c, "weight": weight, "rstd": rstd, "residual": residual, "out": out,
        "size": size, "c_row": c.stride(0), "c_column": c.stride(1),
        "weight_stride": 0 if weight is None else weight.stride(0), "rstd_stride": rstd.stride(0),
        "residual_row": 0 if residual is None else residual.stride(0),
        "residual_column": 0 if residual is None else residual.stride(1),
        "groups": max(groups, 1), "channels_per_group": channels, "elements_per_channel": max(size // channels, 1),
        "HAS_WEIGHT": weight is not None, "HAS_RESIDUAL": residual is not None, "CENTRED": centred,
        "GROUPED": groups > 0, "BLOCK": block,
    }  # fmt: skip
    warps = min(max(block // 512, 1), 16)
    return out, [Launch(norm_bwd_kernel, (rows if size else 0,), arguments, num_warps=warps)]
