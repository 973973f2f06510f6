"""Models at full size that cost and memory are measured on, and the bar: eager input x gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import published
import torch
import transformers
from torch import Tensor, nn

CLASS = 3
"""The logit that is explained; the weights are random, and so is what it stands for."""


@dataclass(frozen=True)
class Workload:
    """A model of one float input, what is explained of its output, and a pattern that matches its layers' names."""

    name: str
    model: nn.Module
    x: Tensor
    layers: str
    target: int | tuple[int, ...] = CLASS


class Logits(nn.Module):
    """A Hugging Face model as tensor -> logits."""

    def __init__(self, model: nn.Module, argument: str, **options: Any) -> None:
        super().__init__()
        self.model, self.argument, self.options = model, argument, options

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(**{self.argument: x}, **self.options).logits
        return logits


def of_image(name: str, call: published.Call, layers: str) -> Workload:
    """A published image classifier on the image of its call."""
    return Workload(name, Logits(call.model, "pixel_values").eval(), call.kwargs["pixel_values"], f"model.{layers}")


def vit() -> Workload:
    """ViT-B/16 at 224 px."""
    return of_image("ViT-B/16", published.vit_b_16(), "vit.layers.*")


def resnet() -> Workload:
    """ResNet-50 at 224 px."""
    return of_image("ResNet-50", published.resnet50(), "resnet.encoder.stages.*.layers.*")


def bert() -> Workload:
    """BERT-base from embeddings of 128 tokens."""
    model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=10))
    x = torch.randn(1, 128, 768)
    return Workload("BERT-base, 128 tokens", Logits(model, "inputs_embeds").eval(), x, "model.bert.encoder.layer.*")


def gpt2() -> Workload:
    """GPT-2 of 12 layers from embeddings of 128 tokens, the last token's logit."""
    model = Logits(transformers.GPT2LMHeadModel(transformers.GPT2Config()), "inputs_embeds", use_cache=False)
    x = 0.02 * torch.randn(1, 128, 768)
    return Workload("GPT-2, 128 tokens", model.eval(), x, "model.transformer.h.*", (-1, CLASS))


def encoder(depth: int) -> Workload:
    """A transformer encoder of small width whose layers can be any number, on 256 tokens."""
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    model = nn.Sequential(stack, nn.Flatten(), nn.Linear(64 * 256, 10)).eval()
    return Workload(f"{depth} layers", model, torch.randn(1, 256, 64), "0.layers.*")


def input_x_gradient(work: Workload) -> Tensor:
    """Autograd's gradient of the explained logit, times the input."""
    leaf = work.x.clone().requires_grad_()
    chosen = work.target if isinstance(work.target, tuple) else (work.target,)
    (gradient,) = torch.autograd.grad(work.model(leaf)[(slice(None), *chosen)].sum(), leaf)
    return gradient * work.x
