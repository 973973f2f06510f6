"""Rules of convolutions restated with the explicit matrix of the convolution: a row per output, an entry per term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Windows = tuple[list[int], list[int], list[int], int]


def _matrix(weight: Tensor, size: tuple[int, ...], planes: tuple[int, ...], windows: Windows) -> Tensor:
    """The matrix of a convolution of one image: (O OH OW, C H W) from the definition, an entry per window and tap."""
    stride, padding, dilation, groups = windows
    (outputs, per_group, rows, columns), (channels, height, width) = weight.shape, size
    made = torch.zeros(*planes, channels, height, width, dtype=torch.float64)
    for group in range(groups):
        o = slice(group * outputs // groups, (group + 1) * outputs // groups)
        i = slice(group * per_group, (group + 1) * per_group)
        for row in range(planes[1]):
            for column in range(planes[2]):
                for down in range(rows):
                    for right in range(columns):
                        y = row * stride[0] - padding[0] + down * dilation[0]
                        x = column * stride[1] - padding[1] + right * dilation[1]
                        if 0 <= y < height and 0 <= x < width:
                            made[o, row, column, i, y, x] += weight[o, :, down, right]
    return made.reshape(torch.Size(planes).numel(), torch.Size(size).numel())


def _stabilised(z: Tensor, epsilon: float) -> Tensor:
    return z + epsilon * torch.where(z < 0, -1.0, 1.0)


def signsplit_conv2d_fwd(
    c: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    method: str,
    first: float,
    second: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Shares from the terms x_i W_ji themselves, sorted by sign (Bach et al. 2015, eq. 60; Montavon et al. 2019)."""
    matrix = _matrix(weight, x.shape[1:], c.shape[1:], (stride, padding, dilation, groups))
    batch, outputs, height, width = c.shape
    added = torch.zeros(outputs, dtype=torch.float64) if bias is None else bias
    added = added.repeat_interleave(height * width)
    ratio, aside = torch.zeros(c.shape, dtype=torch.float64), torch.zeros(c.shape, dtype=torch.float64)
    negative = torch.zeros(c.shape, dtype=torch.bool)
    for image in range(batch):
        terms = matrix * x[image].flatten()
        raising, lowering = terms.clamp(min=0).sum(1), terms.clamp(max=0).sum(1)
        output = raising + lowering + added
        relevance = output * c[image].flatten()
        up = torch.where(raising > 0, relevance / _stabilised(raising + added.clamp(min=0), epsilon), 0)
        down = torch.where(lowering < 0, relevance / _stabilised(lowering + added.clamp(max=0), epsilon), 0)
        favoured = torch.where(output > 0, raising + added.clamp(min=0), lowering + added.clamp(max=0))
        gamma = torch.where(output == 0, 0, relevance / _stabilised(output + first * favoured, epsilon))
        kept = {"z_plus": up / 2, "alpha_beta": first * up / 2, "gamma": gamma}[method]
        ratio[image], aside[image] = kept.view(c.shape[1:]), (second * down / 2).view(c.shape[1:])
        negative[image] = (output < 0).view(c.shape[1:])
    if method == "z_plus":
        return ratio, torch.zeros(0, dtype=torch.float64)
    return ratio, aside if method == "alpha_beta" else _bytes(negative)


def _bytes(negative: Tensor) -> Tensor:
    """Eight pixels to a byte, the pixels of all images counted together, for every output."""
    flags = negative.permute(0, 2, 3, 1).flatten(0, 2)
    made = torch.zeros(-(-flags.shape[0] // 8), flags.shape[1], dtype=torch.uint8)
    for pixel, flag in enumerate(flags):
        made[pixel // 8] += flag.to(torch.uint8) * 2 ** (pixel % 8)
    return made


def signsplit_conv2d_bwd(
    ratio: Tensor,
    aside: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    method: str,
    first: float,
    second: float,
    as_relevance: bool,
) -> Tensor:
    """Every raising entry of the matrix passes one share back, every lowering one the other, by the sign of x."""
    matrix = _matrix(weight, x.shape[1:], ratio.shape[1:], (stride, padding, dilation, groups))
    made = torch.zeros(x.shape, dtype=torch.float64)
    pixels = ratio.shape[2] * ratio.shape[3]
    for image in range(x.shape[0]):
        share = ratio[image].flatten()
        if method == "z_plus":
            up, down = 2 * share, 0 * share
        elif method == "alpha_beta":
            up, down = 2 * share, -2 * aside[image].flatten()
        else:
            counted = image * pixels + torch.arange(pixels)
            negative = ((aside[counted // 8] >> (counted % 8).to(torch.uint8).unsqueeze(1)) & 1).t().flatten().bool()
            up = torch.where(negative, share, (1 + first) * share)
            down = torch.where(negative, (1 + first) * share, share)
        positive, lowered = matrix.clamp(min=0), matrix.clamp(max=0)
        where_positive, where_negative = up @ positive + down @ lowered, up @ lowered + down @ positive
        given = x[image].flatten()
        middle = (where_positive + where_negative) / 2
        at = torch.where(given > 0, where_positive, torch.where(given < 0, where_negative, middle))
        made[image] = (at * given if as_relevance else at).view(x.shape[1:])
    return made


def epsilon_conv2d_bwd(
    c: Tensor,
    z: Tensor,
    weight: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    epsilon: float,
    x: Tensor | None,
) -> Tensor:
    """Each output's relevance z c over its stabilised self, back through the matrix (Bach et al. 2015, eq. 58)."""
    matrix = _matrix(weight, tuple(input_size[1:]), c.shape[1:], (stride, padding, dilation, groups))
    made = torch.zeros(input_size, dtype=torch.float64)
    for image in range(input_size[0]):
        ratio = z[image] * c[image] / _stabilised(z[image], epsilon)
        made[image] = (ratio.flatten() @ matrix).view(input_size[1:])
    return made if x is None else made * x


RESTATED_CONVOLUTIONS: dict[str, Callable[..., Any]] = {
    "signsplit_conv2d_fwd": signsplit_conv2d_fwd,
    "signsplit_conv2d_bwd": signsplit_conv2d_bwd,
    "epsilon_conv2d_bwd": epsilon_conv2d_bwd,
}
