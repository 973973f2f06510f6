"""The text of every stage for a few tiny models; ``make golden`` accepts changes.

Goldens leave out timings and source lines, so that they change only when a pass does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import compile_for_lrp

FOLDER = Path(__file__).parent / "golden"


class Residual(nn.Module):
    """A residual branch with an in-place sum and batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        out += x
        return self.head(out.relu_().mean((2, 3)))


class Attention(nn.Module):
    """Pre-norm self-attention with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, 1, 4)).unbind(2)
        mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)), is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """RMSNorm as Llama spells it, then SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return self.down(F.silu(self.gate(normed)) * self.up(normed))


class Tokens(nn.Module):
    """An embedding, a mean over tokens and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids)).mean(1))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "attnlrp", (2, 3)),
    "cnn_pool": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.MaxPool2d(2)),
        "epsilon",
        (1, 1, 6, 6),
    ),
    "residual": (Residual, "auto", (1, 2, 3, 3)),
    "attention": (Attention, "attnlrp", (1, 3, 4)),
    "gated_mlp": (GatedMLP, "cp_lrp", (2, 4)),
    "tokens": (Tokens, "input_x_gradient", None),
    "gated_mlp_bfloat16": (GatedMLP, "attnlrp", (2, 4)),
    "cnn_prepared": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), "epsilon_plus", (1, 1, 4, 4)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "gated_mlp_bfloat16": {"relevance_dtype": torch.bfloat16},
    "cnn_prepared": {"prepare_weights": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_stage_prints_as_before(name: str) -> None:
    make, composite, shape = MODELS[name]
    model = make().eval()
    x = torch.tensor([[1, 2, 3]]) if shape is None else torch.randn(shape)
    stages = compile_for_lrp(model, composite, **OPTIONS.get(name, {})).stages(x)
    bodies = [stage.text(sources=False).partition("\n")[2] for stage in stages]
    pairs = zip(stages, bodies, [None, *bodies], strict=False)
    text = "\n".join(f"# {stage.name}\n{body if body != last else '# (as before)'}" for stage, body, last in pairs)
    path = FOLDER / f"{name}.txt"
    if os.environ.get("EXPECTTEST_ACCEPT") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_a_stage_is_a_valid_python_program_with_provenance() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    for stage in compile_for_lrp(model).stages(torch.randn(1, 3)):
        text = str(stage)
        compile(text, stage.name, "exec")
        assert text.startswith(f"# {stage.name} (took ")


def test_compilation_is_deterministic() -> None:
    texts = []
    for _ in range(2):
        stages = compile_for_lrp(Attention(), "attnlrp").stages(torch.randn(1, 3, 4))
        texts.append([stage.text() for stage in stages])
    assert texts[0] == texts[1]


def test_passes_leave_their_input_untouched() -> None:
    """Every stage still prints the same after all later passes have run."""
    explained = compile_for_lrp(Residual().eval(), "attnlrp")
    x = torch.randn(1, 2, 3, 3)
    before = [stage.text() for stage in explained.stages(x)]
    _, tape = explained.run(x)
    tape.relevance(1, at="conv")
    tape.ledger(1)
    assert [stage.text() for stage in explained.stages(x)] == before
