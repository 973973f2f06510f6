"""What the conv2d ops share: the product and its transpose in torch, what is checked of a call, and calls to try.

Operands are ``x`` (N, C, H, W), ``weight`` (O, C / groups, KH, KW), and outputs (N, O, OH, OW); ``stride``, ``padding``
and ``dilation`` have two numbers, ``groups`` divides C and O.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrp_compiler.kernels.dialect.shares import widened
from lrp_compiler.kernels.linear import convolution_transpose
from lrp_compiler.kernels.spec import Refusal, Supported

aten = torch.ops.aten

MOST_PIXELS = 2**31 - 2**16
"""Pixels of all images that are counted in 32 bits; their addresses have 64."""


def product(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """The convolution without bias; 16-bit operands are widened to float32."""
    if 0 in (x.numel(), weight.numel()):
        return widened(x).new_zeros(output_size(x.shape, weight, stride, padding, dilation))
    made: Tensor = aten.convolution.default(
        widened(x), widened(weight), None, stride, padding, dilation, False, [0, 0], groups
    )
    return made


def transpose(
    c: Tensor, weight: Tensor, size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """W^T c of ``size`` (N, C, H, W); 16-bit operands are widened to float32."""
    if 0 in (c.numel(), weight.numel()):
        return widened(c).new_zeros(size)
    return convolution_transpose(widened(c), widened(weight), size, stride, padding, dilation, False, [0, 0], groups)


def output_size(
    size: torch.Size | list[int], weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[int, int, int, int]:
    """(N, O, OH, OW) of an input of ``size`` (N, C, H, W); negative where the window does not fit."""
    height, width = (
        (size[2 + dim] + 2 * padding[dim] - dilation[dim] * (weight.shape[2 + dim] - 1) - 1) // stride[dim] + 1
        for dim in range(2)
    )
    return size[0], weight.shape[0], height, width


def channels_last(size: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor (N, C, H, W) whose neighbouring elements are channels."""
    return torch.empty(size, dtype=dtype, device=device, memory_format=torch.channels_last)


def fits(
    size: torch.Size | list[int],
    weight: Tensor,
    outputs: torch.Size,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Supported:
    """An input of ``size`` under ``weight`` gives ``outputs``, in two dimensions of space."""
    if len(size) != 4 or weight.dim() != 4 or len(outputs) != 4:
        return Refusal("it is no conv2d of a batch: operands need four dimensions")
    if {len(stride), len(padding), len(dilation)} != {2} or min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        return Refusal(f"stride {stride}, padding {padding}, dilation {dilation} are not two natural numbers each")
    if groups < 1 or size[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return Refusal(f"{groups} groups of {weight.shape[1]} channels do not make {size[1]}")
    expected = output_size(size, weight, stride, padding, dilation)
    if min(expected) < 0 or tuple(outputs) != expected:
        return Refusal(f"its outputs are {tuple(outputs)}, not {expected}")
    pixels = max(size[0] * size[2] * size[3], outputs[0] * outputs[2] * outputs[3])
    return pixels <= MOST_PIXELS or Refusal(f"{pixels} pixels are more than 32 bits count")


def _paired(*size: int, device: torch.device, alternates: bool) -> Tensor:
    """Numbers of sizes from 0.5 to 1.5, pairs of channels (dimension 1) of one sign, or of both where it alternates.

    Products of either kind then have terms of both signs in every window. A part that is nearly but not quite nothing
    is all rounding error, in eager torch as in a kernel, and in few terms one such output would outweigh all others.
    """
    pairs = torch.randint(2, (size[0], (size[1] + 1) // 2, *size[2:]), device=device) * 2 - 1
    second = pairs.new_tensor([1, -1 if alternates else 1]).view(1, 1, 2, *[1] * (len(size) - 2))
    signs = (pairs.unsqueeze(2) * second).flatten(1, 2)[:, : size[1]]
    return (torch.rand(size, device=device) + 0.5) * signs


@dataclass(frozen=True)
class Case:
    """One convolution to try: ``layout`` says how its tensors lie in memory."""

    label: str
    batch: int
    channels: int
    size: tuple[int, int]
    outputs: int
    window: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    layout: str = "contiguous"

    def draw(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x, weight, c, bias) of random numbers, the bias with a stride where ``layout`` is strided."""
        x = self._laid(_paired(self.batch, self.channels, *self.size, device=device, alternates=False).to(dtype))
        kernel = (self.outputs, self.channels // self.groups, *self.window)
        weight = self._laid(_paired(*kernel, device=device, alternates=True).to(dtype))
        outputs = output_size(x.shape, weight, *self.lists[:3])
        c = self._laid(torch.randn(outputs, device=device).to(dtype))
        every = 2 if self.layout == "strided" else 1
        return x, weight, c, torch.randn(every * self.outputs, device=device).to(dtype)[::every]

    @property
    def lists(self) -> tuple[list[int], list[int], list[int], int]:
        """(stride, padding, dilation, groups) as arguments."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def _laid(self, value: Tensor) -> Tensor:
        if self.layout == "channels last":
            return value.contiguous(memory_format=torch.channels_last)
        if self.layout == "strided":
            # Columns far apart, rows and channels exchanged.
            apart = torch.stack([value, value], -1).permute(0, 2, 1, 3, 4).contiguous()
            return apart[..., 1].permute(0, 2, 1, 3)
        return value


CASES = (
    Case("2x2", 2, 5, (5, 7), 17, window=(2, 2), padding=(1, 0)),
    Case("3x3 channels last", 1, 9, (5, 6), 10, padding=(1, 1), layout="channels last"),
    Case("whole blocks of channels", 1, 64, (3, 4), 16, window=(1, 2), layout="channels last"),
    Case("1x1", 1, 33, (5, 13), 17, window=(1, 1)),
    Case("1x1 stride 2", 2, 5, (6, 7), 9, window=(1, 1), stride=(2, 1)),
    Case("stem", 1, 3, (7, 8), 8, window=(5, 4), stride=(2, 1), padding=(2, 1)),
    Case("dilated", 1, 16, (6, 5), 6, window=(2, 3), padding=(2, 3), dilation=(3, 2), layout="channels last"),
    Case("strided and dilated", 1, 4, (7, 8), 6, stride=(2, 2), padding=(3, 2), dilation=(3, 2)),
    Case("groups", 1, 4, (5, 4), 6, padding=(1, 1), groups=2, layout="channels last"),
    Case("depthwise", 1, 3, (5, 4), 3, padding=(1, 1), groups=3),
    Case("strides", 2, 6, (5, 6), 7, window=(2, 3), padding=(1, 0), layout="strided"),
    Case("nothing", 0, 4, (5, 5), 6),
    Case("no channels", 1, 0, (4, 4), 3),
)
"""Small convolutions, of more than one tile in every direction somewhere."""

WORKLOADS = (
    Case("VGG-16 3x3 8x128x112x112", 8, 128, (112, 112), 128, padding=(1, 1)),
    Case("ResNet-50 3x3 8x64x56x56 channels last", 8, 64, (56, 56), 64, padding=(1, 1), layout="channels last"),
    Case("ResNet-50 1x1 8x256x56x56", 8, 256, (56, 56), 64, window=(1, 1)),
    Case("ResNet-50 stem 7x7 8x3x224x224", 8, 3, (224, 224), 64, window=(7, 7), stride=(2, 2), padding=(3, 3)),
)
