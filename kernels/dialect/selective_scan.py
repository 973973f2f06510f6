"""selective_scan_transpose: coefficients through h_t = a_t h_{t-1} + w_t u_t with a and w held constant (MambaLRP)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lrp_compiler.kernels.spec import (
    FLOATS,
    KernelSpec,
    Refusal,
    Sample,
    Supported,
    all_supported,
    same_device,
)
from lrp_compiler.kernels.strides import collapse

LARGEST_STATE = 1024
"""States per channel that one program holds in registers."""
KEPT_AXES = 3
"""Axes of the result, after those that lie one in the other are merged, that a program's index is taken apart into."""

Axis = tuple[int, tuple[int, ...]]
"""The size of a dimension behind time, and the strides of states, decay, write and result; 0 where one repeats."""


def selective_scan_transpose(states: Tensor, decay: Tensor, write: Tensor | None, sizes: list[int]) -> Tensor:
    """lambda_t = s_t + a_{t+1} lambda_{t+1} and c_{u,t} = w_t lambda_t, summed over what u is broadcast along.

    ``states`` (T, ...) are the coefficients s that each readout y_t = r_t(h_t) gives to its state; ``decay`` (a) and
    ``write`` (w, or None for ones) are (T, ...) of the same rank and broadcast against it; ``decay[0]`` is not read.
    The result has the shape ``sizes`` = (T, ...) of u, and the dtype of ``states``. No state h is read (Jafari et al.
    2024; RULES.md 1.8).
    """
    parts: list[Tensor] = []
    carried: Tensor | None = None
    for t in reversed(range(states.shape[0])):
        carried = states[t] if carried is None else torch.addcmul(states[t], decay[t + 1], carried)
        parts.append((carried if write is None else write[t] * carried).sum_to_size(sizes[1:]))
    return torch.stack(parts[::-1]).to(states.dtype) if parts else states.new_empty(sizes)


def _fake(states: Tensor, decay: Tensor, write: Tensor | None, sizes: list[int]) -> Tensor:
    return states.new_empty(sizes)


def axes(states: Tensor, decay: Tensor, write: Tensor | None, sizes: list[int]) -> tuple[list[Axis], list[Axis]]:
    """(the axes that the result keeps, those it is summed over), with axes merged that all operands pass as one."""
    extents = _extents(states, decay, write)
    result = torch.empty(sizes, device="meta")
    spread = [
        [0] * len(extents) if value is None else value.expand(value.shape[0], *extents).stride()[1:]
        for value in (states, decay, write, result)
    ]
    kept = [dim for dim, extent in enumerate(extents) if sizes[1 + dim] == extent]
    summed = [dim for dim in range(len(extents)) if dim not in kept]
    merged = [
        collapse([extents[dim] for dim in dims], [[strides[dim] for dim in dims] for strides in spread])
        for dims in (kept, summed)
    ]
    return merged[0], merged[1]


def _extents(states: Tensor, decay: Tensor, write: Tensor | None) -> tuple[int, ...]:
    """The shape behind time of all operands together."""
    shapes = [value.shape[1:] for value in (states, decay, write) if value is not None]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*shapes, strict=True))


def _supports(states: Tensor, decay: Tensor, write: Tensor | None, sizes: list[int]) -> Supported:
    given = [value for value in (states, decay, write) if value is not None]
    if any(value.dim() != len(sizes) or value.shape[0] != sizes[0] for value in given):
        return Refusal("its operands and its result differ in rank or in time")
    if any(size not in (1, extent) for size, extent in zip(sizes[1:], _extents(states, decay, write), strict=True)):
        return Refusal(f"what it computes does not sum to {sizes}")
    kept, summed = axes(states, decay, write, sizes)
    unknown = sorted({str(value.dtype) for value in given} - set(map(str, FLOATS)))
    states_summed = summed[0][0] if summed else 1
    return all_supported(
        (
            same_device(*given),
            not unknown or Refusal(f"no kernel for {', '.join(unknown)}: kernels accumulate in float32"),
            len(kept) <= KEPT_AXES or Refusal(f"its operands lie along {len(kept)} axes, none in another"),
            len(summed) <= 1 or Refusal("it sums over axes that do not lie one in the other"),
            states_summed <= LARGEST_STATE
            or Refusal(f"{states_summed} states per channel do not fit in registers (at most {LARGEST_STATE})"),
        )
    )


def _mapped(op: Any, batch: int, dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Tensor, int]:
    """One scan over all mapped elements: their dimension follows time; what is not mapped broadcasts along it."""
    states, decay, write, sizes = arguments
    states = _second(states, dims[0]).expand(-1, batch, *([-1] * (len(sizes) - 1)))
    mapped_write = None if write is None else _second(write, dims[2])
    return op(states, _second(decay, dims[1]), mapped_write, [sizes[0], batch, *sizes[1:]]), 1


def _second(value: Tensor, dim: int | None) -> Tensor:
    """``value`` with its mapped dimension, or one of size 1, behind time."""
    return value.unsqueeze(1) if dim is None else value.movedim(dim, 1)


def _arguments(
    dtype: torch.dtype, device: torch.device, steps: int, batch: int, channels: int, states: int
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    shape = (steps, batch, channels, states)
    given, write = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    decay = (torch.rand(shape, device=device) * 0.9 + 0.1).to(dtype)
    return given, decay, write, [steps, batch, channels, 1]


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    yield Sample("several blocks of channels", _arguments(dtype, device, 6, 2, 17, 3))
    given, decay, write, sizes = _arguments(dtype, device, 5, 2, 3, 7)
    yield Sample("nothing but the decay", (given, decay, None, sizes))
    yield Sample("the signal has every state", (given, decay, write, list(given.shape)))
    yield Sample("a signal for all channels", (given, decay, write, [5, 2, 1, 1]))
    yield Sample("broadcast operands", (given[:, :, :1], decay[..., :1], write[:, :1], sizes))
    yield Sample("one step", (given[:1], decay[:1], write[:1], [1, *sizes[1:]]))
    yield Sample("no step", (given[:0], decay[:0], write[:0], [0, *sizes[1:]]))
    yield Sample("no sample", (given[:, :0], decay[:, :0], write[:, :0], [5, 0, 3, 1]))
    yield Sample("no state", (given[..., :0], decay[..., :0], write[..., :0], sizes))
    for_all = torch.randn(7, 5, 2, 6, device=device).to(dtype).permute(1, 2, 3, 0)[:, :, ::2]
    per_channel = decay.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    yield Sample("strided", (given, per_channel, for_all, sizes))
    seeds, mixed = given.unsqueeze(1).expand(5, 2, 2, 3, 7), write.unsqueeze(2).expand(5, 2, 2, 3, 7).transpose(1, 2)
    yield Sample("mapped over seeds", (seeds, decay.unsqueeze(1), mixed, [5, 2, 2, 3, 1]))
    yield Sample("operands of several dtypes", (given, decay.float(), write, sizes))


def _refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    given, decay, write, sizes = _arguments(torch.float64, device, 3, 2, 2, 2)
    yield Sample("float64", (given, decay, write, sizes))
    given, decay, write, sizes = _arguments(dtype, device, 3, 2, 2, 2)
    yield Sample("another rank", (given, decay[:, 0], write, sizes))
    yield Sample("a size that is no sum", (given, decay, write, [3, 2, 3, 1]))
    yield Sample("a signal for all samples and states", (given, decay, write, [3, 1, 2, 1]))
    many = torch.randn(3, 2, 3, 2, 3, 2, device=device).to(dtype)
    yield Sample("too many axes", (many[..., :1], many[:, :, :1, :, :1], None, list(many.shape)))
    given, decay, write, sizes = _arguments(dtype, torch.device("meta"), 2, 1, 1, LARGEST_STATE + 1)
    yield Sample("too many states", (given, decay, write, sizes))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    yield Sample("2048x1x1536x16 (Mamba 130M)", _arguments(dtype, device, 2048, 1, 1536, 16))
    yield Sample("1024x4x5120x16 (Mamba 2.8B)", _arguments(dtype, device, 1024, 4, 5120, 16))


def _flops(states: Tensor, decay: Tensor, write: Tensor | None, sizes: list[int]) -> int:
    elements = states.shape[0]
    for extent in _extents(states, decay, write):
        elements *= extent
    return (2 if write is None else 4) * elements


SELECTIVE_SCAN_TRANSPOSE = KernelSpec(
    name="selective_scan_transpose",
    summary="w_t lambda_t, lambda_t = s_t + a_{t+1} lambda_{t+1}: the transpose of a selective scan",
    source="Jafari et al. 2024 (MambaLRP); RULES.md 1.8",
    reference=selective_scan_transpose,
    fake=_fake,
    supports=_supports,
    samples=_samples,
    refused=_refused,
    workloads=_workloads,
    flops=_flops,
    bound="memory",
    vmap=_mapped,
)
