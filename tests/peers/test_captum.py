"""Input x gradient, and epsilon-LRP where Captum's is right, against Captum 0.9.

Captum's LRP hooks a closed list of modules and refuses the rest (Flatten, LayerNorm, Embedding); on residual
networks its relevance explodes. On chains of convolutions, linear layers, ReLU and pooling it is epsilon-LRP.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accuracy import relative_error
from peers import captum
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp, composites

CAPTUM_EPSILON = 1e-9
"""The default of Captum's EpsilonRule; below float32's resolution, so LRP-0 is compared as well."""

FLOAT32 = 1e-5
"""Captum divides by activations layer by layer: eps * |a / z| summed over a few layers."""

INPUT_X_GRADIENT = 1e-6
"""Both sides run the same kernels; only the order of a few float32 sums may differ."""

CLASSES = 4


class CNN(nn.Module):
    """Captum refuses nn.Flatten, so the network flattens by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.ReLU()
        self.pool, self.average = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu2(self.conv2(self.relu1(self.conv1(x)))))
        return self.head(self.average(x).flatten(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, CLASSES))


class Attentive(nn.Module):
    """Layer norm, attention and a gated product, for input x gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.head = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.head((attended * F.silu(x)).mean(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn": (CNN, (3, 2, 16, 16)),
    "mlp": (mlp, (3, 8)),
    "attentive": (Attentive, (3, 5, 8)),
}

TARGETS = torch.tensor([0, 3, 1])


@pytest.mark.parametrize("name", NETWORKS)
def test_input_x_gradient_is_captums(name: str) -> None:
    make, shape = NETWORKS[name]
    model, x = make(), torch.randn(shape)
    expected = captum.InputXGradient(model).attribute(x.clone().requires_grad_(), target=TARGETS)
    found = compile_for_lrp(model, "input_x_gradient").attribute(x, target=TARGETS)
    assert relative_error(found, expected) <= INPUT_X_GRADIENT


@pytest.mark.parametrize("epsilon", [0.0, CAPTUM_EPSILON])
@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_epsilon_is_captums_where_captum_is_right(name: str, epsilon: float) -> None:
    make, shape = NETWORKS[name]
    model, x = make(), torch.randn(shape)
    expected = captum.LRP(model).attribute(x.clone().requires_grad_(), target=TARGETS)
    found = compile_for_lrp(model, composites.epsilon(epsilon)).attribute(x, target=TARGETS)
    assert relative_error(found, expected) <= FLOAT32
