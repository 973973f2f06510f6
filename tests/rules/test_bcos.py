"""B-cos networks: relevance is the contribution map of their explanation mode, written with detach as they do."""

from __future__ import annotations

import pytest
import torch
from accuracy import relative_error
from catalogue import agreement
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import compile_for_lrp

FLOAT64 = 1e-10


class BcosConv(nn.Module):
    """|cos|^(B-1) w_hat^T x over patches, with MaxOut units (Boehle et al. 2022, eqs. 2 and 3)."""

    def __init__(self, channels: int, out: int, b: float, units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out * units, channels, 3, 3))
        self.b, self.units, self.explaining = b, units, False

    def forward(self, x: Tensor) -> Tensor:
        unit = self.weight / self.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        out = F.conv2d(x, unit, padding=1)
        if self.units > 1:
            out = out.unflatten(1, (-1, self.units)).max(2).values
        size = F.avg_pool2d((x**2).sum(1, keepdim=True), 3, padding=1, stride=1, count_include_pad=True) * 9
        cos = out.abs() / (size + 1e-6).sqrt()
        scale = cos if self.b == 2 else (cos + 1e-6) ** (self.b - 1)
        return out * (scale.detach() if self.explaining else scale)


class BcosNet(nn.Module):
    """Two B-cos layers, an uncentred norm, pooling; no biases anywhere."""

    def __init__(self, b: float, units: int) -> None:
        super().__init__()
        self.first, self.second = BcosConv(3, 5, b, units), BcosConv(5, 4, b, units)
        self.explaining = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        deviation = (hidden.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        hidden = hidden / (deviation.detach() if self.explaining else deviation)
        return self.second(F.avg_pool2d(hidden, 2)).mean((2, 3))


@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize("b", [2.0, 1.7])
def test_contributions_are_those_of_explanation_mode(b: float, units: int) -> None:
    model, x = BcosNet(b, units).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    explained = compile_for_lrp(model, "bcos")
    found = explained.attribute(x, 1)
    tape = explained.run(x)[1]
    assert sum(float(sink.abs().sum()) for sinks in tape.sinks(1).values() for sink in sinks.values()) == 0
    assert torch.allclose(found.flatten(1).sum(1), model(x)[:, 1].detach(), rtol=FLOAT64)
    for module in model.modules():
        module.explaining = True  # type: ignore[assignment]
    inputs = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs)[:, 1].sum(), inputs)
    assert agreement(explained, x, found, x * gradient, "explanation mode") <= FLOAT64


def test_attention_maps_are_constants() -> None:
    """As B-cos vision transformers have it: queries and keys are detached."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].mean(1)

    model, x = Attention().double(), torch.randn(2, 5, 4, dtype=torch.float64)
    inputs = x.clone().requires_grad_()
    q, k, v = model.qkv(inputs).chunk(3, -1)
    out = (torch.softmax(q.detach() @ k.detach().mT / 2, -1) @ v).mean(1)
    (gradient,) = torch.autograd.grad(out[:, 2].sum(), inputs)
    assert relative_error(compile_for_lrp(model, "bcos").attribute(x, 2), x * gradient) <= FLOAT64
