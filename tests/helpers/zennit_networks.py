"""Networks that zennit's composites are compared on."""

from __future__ import annotations

import torch
from peers import zennit_layer
from torch import Tensor, nn

CLASSES = 4


def cnn() -> nn.Module:
    """Biases, strides, groups, dilation and both kinds of pooling."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 16),
        nn.ReLU(),
        nn.Linear(16, CLASSES),
    )


def sequence_net() -> nn.Module:
    """One dimension, and a transposed convolution."""
    return nn.Sequential(
        nn.Conv1d(3, 6, 5, stride=2),
        nn.ReLU(),
        nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(3),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


def volume_net() -> nn.Module:
    """Three dimensions, grouped."""
    layers = [nn.Conv3d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, CLASSES))


def smooth_mlp() -> nn.Module:
    """Activations that zennit passes relevance through and whose derivative is not f(x)/x."""
    return nn.Sequential(
        nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 12), nn.SiLU(), nn.Linear(12, 8), nn.Tanh()
    ).append(nn.Linear(8, CLASSES))


class ResidualBlock(nn.Module):
    """conv-bn-relu-conv-bn plus a strided shortcut, the sum a module, as zennit needs it."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
        self.sum = zennit_layer.Sum()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(self.sum(torch.stack([inner, self.shortcut(x)], -1)))


class FunctionalBlock(ResidualBlock):
    """The same block with ``+`` for its sum, which no hook sees."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))) + self.shortcut(x))


def resnet(block: type[ResidualBlock] = ResidualBlock) -> nn.Module:
    """A stem and two residual blocks with batch norms whose statistics are not trivial.

    Their eps is zero: zennit's fold leaves it in the batch norm, which divides by sqrt(1 + eps) once more.
    """
    stem = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)]
    model = nn.Sequential(*stem, block(4, 4, 1), block(4, 8, 2), *head)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()
