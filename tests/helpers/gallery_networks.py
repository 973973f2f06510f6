"""Networks of the gallery that are defined here, from their papers."""

from __future__ import annotations

import torch
from gallery import Call, Entry
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Batch norm, ReLU, convolution; the input is concatenated to the output (Huang et al., 2017)."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


def densenet() -> Call:
    stem = (nn.Conv2d(3, 6, 3, padding=1), DenseLayer(6, 4), DenseLayer(10, 4))
    transition = (nn.BatchNorm2d(14), nn.ReLU(inplace=True), nn.Conv2d(14, 7, 1), nn.AvgPool2d(2), DenseLayer(7, 4))
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(11, 5))
    return Call(nn.Sequential(*stem, *transition, *head), (torch.randn(2, 3, 8, 8),))


ENTRIES = {"densenet": Entry(densenet, 2, ("input",))}
