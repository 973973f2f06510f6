"""Convolutional networks of the gallery, written from their papers: every kind of op and connection, few channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from gallery import Call, Entry
from torch import Tensor, nn

CLASSES = 4


def images(size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size)


# --- VGG16 (Simonyan and Zisserman, 2015) ---------------------------------------------------------------------------

VGG16 = ((2, 1), (2, 2), (3, 3), (3, 4), (3, 4))
"""Convolutions per stage and their width, of which the paper has 64 times as much."""


def vgg16(batch_norm: bool) -> Call:
    """13 convolutions of 3 x 3 in five stages that end in a max-pool, then three dense layers under dropout."""
    layers: list[nn.Module] = []
    channels = 3
    for convolutions, width in VGG16:
        for _ in range(convolutions):
            layers.append(nn.Conv2d(channels, 4 * width, 3, padding=1))
            layers += [nn.BatchNorm2d(4 * width)] if batch_norm else []
            layers.append(nn.ReLU(inplace=True))
            channels = 4 * width
        layers.append(nn.MaxPool2d(2, 2))
    dense = [nn.Linear(channels * 4, 24), nn.ReLU(inplace=True), nn.Dropout()]
    dense += [nn.Linear(24, 24), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(24, CLASSES)]
    return Call(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *dense), (images(),))


# --- EfficientNetV2 (Tan and Le, 2021) and MobileNetV3 (Howard et al., 2019) ----------------------------------------


def unit(channels: int, out: int, kernel: int, stride: int, groups: int, act: nn.Module | None) -> nn.Sequential:
    """Convolution without bias, batch norm, activation."""
    convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out, eps=1e-3), *([] if act is None else [act]))


class SqueezeExcitation(nn.Module):
    """Channels scaled by a gate that reads their means (Hu et al., 2018)."""

    def __init__(self, channels: int, squeezed: int, act: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze, self.act = nn.Conv2d(channels, squeezed, 1), act
        self.excite, self.gate = nn.Conv2d(squeezed, channels, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(self.excite(self.act(self.squeeze(self.pool(x)))))
        return gate * x


class StochasticDepth(nn.Module):
    """In training, whole samples of a branch are dropped (Huang et al., 2016)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        survival = 1 - self.probability
        kept = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype).bernoulli_(survival).div_(survival)
        return x * kept


class Residual(nn.Module):
    """A branch that is added to its input where the shapes allow."""

    def __init__(self, *branch: nn.Module, skips: bool, drop: float = 0.2) -> None:
        super().__init__()
        self.branch, self.skips, self.drop = nn.Sequential(*branch), skips, StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.branch(x)) if self.skips else self.branch(x)


def fused_mbconv(channels: int, out: int, stride: int, expansion: int) -> Residual:
    """A full convolution that expands, and a pointwise one that projects; without expansion the former alone."""
    skips, wide = stride == 1 and channels == out, expansion * channels
    if expansion == 1:
        return Residual(unit(channels, out, 3, stride, 1, nn.SiLU(inplace=True)), skips=skips)
    expand = unit(channels, wide, 3, stride, 1, nn.SiLU(inplace=True))
    return Residual(expand, unit(wide, out, 1, 1, 1, None), skips=skips)


def mbconv(channels: int, out: int, stride: int, expansion: int) -> Residual:
    """Expansion, depthwise convolution, squeeze-and-excitation, projection."""
    wide = expansion * channels
    parts = [
        unit(channels, wide, 1, 1, 1, nn.SiLU(inplace=True)),
        unit(wide, wide, 3, stride, wide, nn.SiLU(inplace=True)),
        SqueezeExcitation(wide, max(1, channels // 4), nn.SiLU(inplace=True), nn.Sigmoid()),
        unit(wide, out, 1, 1, 1, None),
    ]
    return Residual(*parts, skips=stride == 1 and channels == out)


def efficientnet_v2() -> Call:
    """Stem, fused blocks without and with expansion, blocks with squeeze-and-excitation, head."""
    blocks = [fused_mbconv(4, 4, 1, 1), fused_mbconv(4, 6, 2, 4), fused_mbconv(6, 6, 1, 4)]
    blocks += [mbconv(6, 8, 2, 4), mbconv(8, 8, 1, 6)]
    stem, last = unit(3, 4, 3, 2, 1, nn.SiLU(inplace=True)), unit(8, 12, 1, 1, 1, nn.SiLU(inplace=True))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(12, CLASSES))
    return Call(nn.Sequential(stem, *blocks, last, *head), (images(),))


def bottleneck(
    channels: int, wide: int, out: int, kernel: int, stride: int, act: Callable[[], nn.Module], gated: bool
) -> Residual:
    """MobileNetV3's inverted residual; its squeeze-and-excitation has ReLU and a hard sigmoid."""
    parts: list[nn.Module] = [] if wide == channels else [unit(channels, wide, 1, 1, 1, act())]
    parts.append(unit(wide, wide, kernel, stride, wide, act()))
    parts += [SqueezeExcitation(wide, max(1, wide // 4), nn.ReLU(), nn.Hardsigmoid())] if gated else []
    return Residual(*parts, unit(wide, out, 1, 1, 1, None), skips=stride == 1 and channels == out, drop=0.0)


def mobilenet_v3() -> Call:
    """Blocks with ReLU and hard swish, of kernels 3 and 5, with and without gates; a head with hard swish."""
    blocks = [
        bottleneck(4, 4, 4, 3, 1, nn.ReLU, gated=True),
        bottleneck(4, 12, 6, 3, 2, nn.ReLU, gated=False),
        bottleneck(6, 16, 6, 5, 1, nn.Hardswish, gated=True),
    ]
    stem, last = unit(3, 4, 3, 2, 1, nn.Hardswish()), unit(6, 12, 1, 1, 1, nn.Hardswish())
    head = (nn.Linear(12, 16), nn.Hardswish(inplace=True), nn.Dropout(0.2), nn.Linear(16, CLASSES))
    return Call(nn.Sequential(stem, *blocks, last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head), (images(),))


# --- U-Net (Ronneberger et al., 2015) -------------------------------------------------------------------------------


def double_convolution(channels: int, out: int) -> nn.Sequential:
    first = (nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True))
    return nn.Sequential(*first, nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """A contracting path, an expanding one of transposed convolutions, and concatenated skips between them."""

    def __init__(self, widths: Sequence[int] = (4, 6, 8)) -> None:
        super().__init__()
        self.down = nn.ModuleList(map(double_convolution, (3, *widths), widths))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(deep, shallow, 2, 2) for deep, shallow in pairs)
        self.up = nn.ModuleList(double_convolution(2 * shallow, shallow) for _, shallow in pairs)
        self.head = nn.Conv2d(widths[0], CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            skips.append(block(x if not skips else F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for grow, block in zip(self.grow, self.up, strict=True):
            skip, grown = skips.pop(), grow(x)
            # An odd size loses its last row or column on the way down.
            rows, columns = skip.shape[2] - grown.shape[2], skip.shape[3] - grown.shape[3]
            x = block(torch.cat([skip, F.pad(grown, (0, columns, 0, rows))], 1))
        return self.head(x)  # type: ignore[no-any-return]


def unet() -> Call:
    return Call(UNet(), (torch.randn(2, 3, 13, 12),))


ENTRIES = {
    "vgg16": Entry(lambda: vgg16(batch_norm=False), 2, ("input",)),
    "vgg16_batch_norm": Entry(lambda: vgg16(batch_norm=True), 2, ("input",)),
    "efficientnet_v2": Entry(efficientnet_v2, 2, ("input",)),
    "mobilenet_v3": Entry(mobilenet_v3, 2, ("input",)),
    "unet": Entry(unet, (2, 5, 7), ("x",)),
}
