"""The gradient composites against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from matrix_form import Case, assert_same
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp

pytestmark = pytest.mark.usefixtures("float64")


class Block(nn.Module):
    """A pre-norm transformer block with a gated MLP and a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.RMSNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        hidden = self.norm2(x)
        x = x + self.down(F.silu(self.gate(hidden)) * self.up(hidden))
        return self.head(x.mean(1))


def cnn() -> nn.Module:
    """Convolutions, batch norm, both poolings, a classifier."""
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(4, 4, 3), nn.ELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).eval()


def mlp() -> nn.Module:
    """Layer norm, GELU and softmax, with functions that do not vanish at zero."""
    layers = [nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(approximate="tanh"), nn.Linear(6, 4), nn.Softplus()]
    return nn.Sequential(*layers, nn.Linear(4, 3), nn.Softmax(-1))


NETWORKS: dict[str, Case] = {
    "cnn": Case(cnn, ((2, 2, 8, 8),)),
    "block": Case(Block, ((2, 5, 8),)),
    "mlp": Case(mlp, ((3, 5),)),
}


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("composite", ["gradient", "input_x_gradient"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_composites_are_autograd(name: str, composite: str, reference: bool) -> None:
    model = NETWORKS[name].make()
    (x,) = NETWORKS[name].inputs()
    x.requires_grad_()
    output = model(x)
    seed = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, x, seed)
    explained = compile_for_lrp(model, composite, reference=reference)
    found = explained.attribute(x.detach(), seed)
    assert_same((found,), (gradient if composite == "gradient" else x.detach() * gradient,))
