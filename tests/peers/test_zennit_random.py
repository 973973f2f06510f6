"""zennit's composites on networks that nobody chose: hypothesis draws layers, strides, groups, norms and shortcuts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from accuracy import relative_error
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peers import zennit_layer
from torch import Tensor, nn
from zennit_networks import CLASSES
from zennit_oracle import HIGH, LOW, NAMES, ours, zennit_relevance

FLOAT64 = 1e-9


@dataclass(frozen=True)
class Layer:
    """One convolution and what follows it."""

    width: int
    kernel: int
    stride: int
    padding: int
    groups: int
    bias: bool
    norm: bool
    pool: str
    residual: bool


layers = st.builds(
    Layer,
    width=st.sampled_from([2, 4, 6]),
    kernel=st.sampled_from([1, 2, 3]),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([0, 1]),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    norm=st.booleans(),
    pool=st.sampled_from(["none", "max", "average"]),
    residual=st.booleans(),
)


class Shortcut(nn.Module):
    """x + relu(conv(x)), by the module that zennit has a rule for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.relu, self.sum = nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), zennit_layer.Sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(torch.stack([self.relu(self.conv(x)), x], -1))


def network(drawn: list[Layer]) -> nn.Module:
    """The drawn layers and a dense head, with random norms whose eps is zero (zennit's fold applies it twice)."""
    parts: list[nn.Module] = []
    width = 2
    for layer in drawn:
        options = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups, "bias": layer.bias}
        parts.append(nn.Conv2d(width, layer.width, layer.kernel, **options))
        width = layer.width
        if layer.norm:
            norm = nn.BatchNorm2d(width, eps=0.0)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            parts.append(norm)
        parts.append(nn.ReLU())
        if layer.pool != "none":
            parts.append(nn.MaxPool2d(2, 1) if layer.pool == "max" else nn.AvgPool2d(2, 1))
        if layer.residual:
            parts.append(Shortcut(width))
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)).double().eval()


@pytest.mark.parametrize("name", NAMES)
@given(drawn=st.lists(layers, min_size=1, max_size=3), batch=st.integers(1, 3), channels_last=st.booleans())
@settings(max_examples=3, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
def test_random_networks(name: str, drawn: list[Layer], batch: int, channels_last: bool) -> None:
    torch.manual_seed(0)
    model = network(drawn)
    x = torch.randn(batch, 2, 33, 29, dtype=torch.float64).clamp(LOW, HIGH)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = zennit_relevance(model, x, name, 1)
    found = ours(model, name).attribute(x, 1)
    assert relative_error(found, expected) <= FLOAT64 if expected.any() else not found.any()
    assert found.shape == x.shape and found.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_strided_and_empty_inputs(name: str) -> None:
    """Views with steps and transposed ones equal their copies; an empty batch gives an empty relevance."""
    model = network([Layer(4, 3, 2, 1, 2, True, True, "max", True)])
    base = torch.randn(2, 30, 13, 4, dtype=torch.float64).clamp(LOW, HIGH)
    views = [base[:, ::2, :, ::2].permute(0, 3, 1, 2), base[:, :15, :, 1:3].permute(0, 3, 1, 2)]
    for view in views:
        assert not view.is_contiguous()
        copied = ours(model, name).attribute(view.contiguous(), 2)
        torch.testing.assert_close(ours(model, name).attribute(view, 2), copied, rtol=1e-12, atol=1e-15)
    assert ours(model, name).attribute(base.new_zeros(0, 2, 15, 13), 2).shape == (0, 2, 15, 13)
