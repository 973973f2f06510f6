"""maxpool_bwd: coefficients through 2-D max pooling, every window's going to its winner, told by a byte."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lrp_compiler.kernels.pooling import indices_of_offsets, max_pool_transpose, window_offsets
from lrp_compiler.kernels.spec import (
    KernelSpec,
    Refusal,
    Sample,
    Supported,
    all_supported,
    known_dtypes,
    same_device,
)

LARGEST_WINDOW = 256
"""Places of a window that one byte tells apart."""
LARGEST_SIDE = 2**30
"""Positions along one side, so that those in the padding too are 32-bit integers."""


def maxpool_bwd(
    c: Tensor,
    offsets: Tensor,
    input_size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """The sum, at every input position, of ``c`` over the windows whose winner it is.

    ``c`` (N, C, OH, OW); ``offsets`` uint8 of the same shape, the winner's row * KW + column within its window, as
    ``window_offsets`` makes them; ``input_size`` [H, W]. Returns (N, C, H, W) in the dtype and memory format of ``c``.
    The kernel adds up in float32. Source: winner take all, Bach et al. 2015; the transpose of the pooling's selection.
    """
    indices = indices_of_offsets(offsets, input_size, (kernel, stride, padding, dilation))
    made = max_pool_transpose(c, indices, [*c.shape[:2], *input_size], 2)
    return made.contiguous(memory_format=_memory_format(c))


def _memory_format(c: Tensor) -> torch.memory_format:
    last = c.is_contiguous(memory_format=torch.channels_last) and not c.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def empty_input(c: Tensor, input_size: list[int]) -> Tensor:
    """A new tensor for coefficients of the pooling's input, in the dtype and memory format of ``c``."""
    shape = [*c.shape[:2], *input_size]
    return torch.empty(shape, dtype=c.dtype, device=c.device, memory_format=_memory_format(c))


def _fake(
    c: Tensor,
    offsets: Tensor,
    input_size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    return empty_input(c, input_size)


def _supports(
    c: Tensor,
    offsets: Tensor,
    input_size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Supported:
    planar = c.dim() == 4 and {len(kernel), len(input_size)} == {2}
    if not planar:
        return Refusal(f"it pools {c.dim()}-D coefficients over {len(kernel)} dimensions: the kernel is for images")
    window, side = kernel[0] * kernel[1], max(*input_size, *c.shape[2:])
    return all_supported(
        (
            same_device(c, offsets),
            known_dtypes(c),
            offsets.dtype == torch.uint8 or Refusal(f"its offsets are {offsets.dtype}, not uint8"),
            window <= LARGEST_WINDOW or Refusal(f"a window of {window} places (at most {LARGEST_WINDOW})"),
            side <= LARGEST_SIDE or Refusal(f"a side of {side} positions (at most {LARGEST_SIDE})"),
        )
    )


Pooling = tuple[Tensor, Tensor, list[int], list[int], list[int], list[int], list[int]]


def _pooled(
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Pooling:
    """Arguments for the pooling of an image drawn at random."""
    # Drawn in float32, for which every device has the pooling.
    image = torch.randn(shape, device=device)
    geometry = (kernel, stride, padding, dilation)
    made, indices = F.max_pool2d(image, *geometry, ceil_mode=ceil_mode, return_indices=True)
    offsets = window_offsets(indices, shape[2:], geometry)
    # In steps of 1/32, so that sums are exact in float32 in whatever order.
    c = (32 * torch.randn(made.shape, device=device)).round().clamp(-127, 127).div(32).to(dtype)
    c, offsets = (value.contiguous(memory_format=memory_format) for value in (c, offsets))
    return c, offsets, list(shape[2:]), list(kernel), list(stride), list(padding), list(dilation)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    last = torch.channels_last
    yield Sample("2x2 by 2", _pooled(dtype, device, (2, 3, 9, 7), (2, 2), (2, 2)))
    yield Sample("3x3 by 2, padded", _pooled(dtype, device, (1, 2, 17, 35), (3, 3), (2, 2), (1, 1)))
    yield Sample("3x3 by 1", _pooled(dtype, device, (1, 2, 6, 37), (3, 3), (1, 1), (1, 1)))
    yield Sample("3x2 by 2x3, ceil", _pooled(dtype, device, (1, 2, 10, 11), (3, 2), (2, 3), (1, 0), ceil_mode=True))
    yield Sample("2x3 dilated", _pooled(dtype, device, (1, 2, 11, 12), (2, 3), (1, 2), (1, 1), (3, 2)))
    yield Sample("1x2 by 3, places in no window", _pooled(dtype, device, (1, 1, 5, 8), (1, 2), (3, 3)))
    yield Sample("5x5 by 1", _pooled(dtype, device, (1, 1, 7, 6), (5, 5), (1, 1), (2, 2)))
    stem = _pooled(dtype, device, (1, 37, 5, 10), (3, 3), (2, 2), (1, 1), memory_format=last)
    yield Sample("channels last", stem)
    wide = _pooled(dtype, device, (1, 140, 5, 4), (2, 2), (2, 2), memory_format=last)
    yield Sample("channels last, many channels", wide)
    c, offsets, size, *geometry = _pooled(dtype, device, (2, 4, 9, 11), (3, 3), (2, 2), (1, 1))
    yield Sample("offsets of another format", (c, offsets.contiguous(memory_format=last), size, *geometry))
    yield Sample("every other channel", (c[:, ::2], offsets[:, 1::2], size, *geometry))
    yield Sample("columns first", (c.mT.contiguous().mT, offsets.mT.contiguous().mT, size, *geometry))
    yield Sample("one coefficient for all", (c[:, :, :1, :1].expand(c.shape), offsets, size, *geometry))
    yield Sample("no images", (c[:0], offsets[:0], size, *geometry))
    yield Sample("no windows", (c[:, :, :0], offsets[:, :, :0], size, *geometry))


def _refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    c, offsets, size, kernel, *rest = _pooled(dtype, device, (1, 1, 4, 4), (2, 2), (2, 2))
    yield Sample("float64", (c.double(), offsets, size, kernel, *rest))
    yield Sample("flat indices", (c, offsets.long(), size, kernel, *rest))
    yield Sample("a large window", (c, offsets, size, [17, 17], *rest))
    yield Sample("a long side", (c, offsets, [1, LARGEST_SIDE + 1], kernel, *rest))
    yield Sample("one dimension", (c[0], offsets[0], [4], [2], [2], [0], [1]))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    vgg, stem = (8, 64, 224, 224), (8, 64, 112, 112)
    last = torch.channels_last
    yield Sample("2x2 by 2, 8x64x224x224 (VGG-16)", _pooled(dtype, device, vgg, (2, 2), (2, 2)))
    yield Sample("3x3 by 2, 8x64x112x112 (ResNet)", _pooled(dtype, device, stem, (3, 3), (2, 2), (1, 1)))
    resnet = _pooled(dtype, device, stem, (3, 3), (2, 2), (1, 1), memory_format=last)
    yield Sample("3x3 by 2, 8x64x112x112 channels last (ResNet)", resnet)
    yield Sample("2x2 by 2, 8x512x14x14 (VGG-16)", _pooled(dtype, device, (8, 512, 14, 14), (2, 2), (2, 2)))


def _flops(c: Tensor, *rest: object) -> int:
    return c.numel()


MAXPOOL_BWD = KernelSpec(
    name="maxpool_bwd",
    summary="every input position's sum of c over the windows it wins: the transpose of 2-D max pooling",
    source="Bach et al. 2015 (winner take all); kernels/dialect/README.md",
    reference=maxpool_bwd,
    fake=_fake,
    supports=_supports,
    samples=_samples,
    refused=_refused,
    workloads=_workloads,
    flops=_flops,
    bound="memory",
)
