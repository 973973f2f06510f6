"""Models at full size that cost, memory and peers are measured on, and the bar: eager input x gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import published
import torch
import transformers
from torch import Tensor, nn

from lrp_compiler import LRPModule, compile_for_lrp

CLASS = 3
"""The logit that is explained; the weights are random, and so is what it stands for."""

WHITE = 3.0
"""Bounds of images that the z-box rule is given, in deviations from the mean."""


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


def of_image(name: str, call: published.Call, layers: str, batch: int = 1) -> Workload:
    """A published image classifier on images of the size of its call's."""
    image = call.kwargs["pixel_values"]
    images = image if batch == 1 else torch.randn(batch, *image.shape[1:])
    return Workload(name, Logits(call.model, "pixel_values").eval(), images, f"model.{layers}")


def vit(batch: int = 1) -> Workload:
    """ViT-B/16 at 224 px."""
    return of_image("ViT-B/16", published.vit_b_16(), "vit.layers.*", batch)


def resnet(batch: int = 1) -> Workload:
    """ResNet-50 at 224 px."""
    return of_image("ResNet-50", published.resnet50(), "resnet.encoder.stages.*.layers.*", batch)


def normed_resnet(batch: int = 1) -> Workload:
    """ResNet-50 whose batch norms do something, as those of a trained one do.

    Their eps is zero: zennit's fold into the convolution leaves it in the norm, which divides by it once more.
    """
    work = resnet(batch)
    for module in work.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.75, 1.5)
    return replace(work, x=work.x.clamp(-WHITE, WHITE))


def vgg16(batch: int = 1) -> Workload:
    """VGG-16 at 224 px, initialised as its paper does it, but with biases that count."""
    model = published.vgg16().model
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.01)
    return Workload("VGG16", model.eval(), torch.randn(batch, 3, 224, 224).clamp(-WHITE, WHITE), "*")


def gpt2() -> Workload:
    """GPT-2 of 12 layers from embeddings of 128 tokens, the last token's logit."""
    model = Logits(transformers.GPT2LMHeadModel(transformers.GPT2Config()), "inputs_embeds", use_cache=False)
    x = 0.02 * torch.randn(1, 128, 768)
    return Workload("GPT-2, 128 tokens", model.eval(), x, "model.transformer.h.*", (-1, CLASS))


def of_tokens(name: str, model: Any, layers: str, target: int | tuple[int, ...], size: tuple[int, int]) -> Workload:
    """A language model on the embeddings of (batch, tokens) random ids; what is attributed is the embeddings."""
    embeddings = model.get_input_embeddings()
    with torch.no_grad():
        x = embeddings(torch.randint(0, embeddings.num_embeddings, size))
    # Encoders have no cache to switch off.
    options = {"use_cache": False} if isinstance(target, tuple) else {}
    wrapped = Logits(model, "inputs_embeds", **options).eval()
    return Workload(f"{name}, {size[1]} tokens", wrapped, x, f"model.{layers}", target)


def roberta(batch: int = 1) -> Workload:
    """RoBERTa-base with a classification head, from embeddings of 128 tokens."""
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, num_labels=10
    )
    model = transformers.RobertaForSequenceClassification(config)
    return of_tokens("RoBERTa-base", model, "roberta.encoder.layer.*", CLASS, (batch, 128))


def gpt2_tokens(batch: int = 1) -> Workload:
    """GPT-2 of 12 layers from embeddings of 128 tokens, the last token's logit."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    return of_tokens("GPT-2", model, "transformer.h.*", (-1, CLASS), (batch, 128))


def llama(batch: int = 1) -> Workload:
    """A Llama of 8 layers x 512 and a 32k vocabulary from embeddings of 256 tokens, the last token's logit."""
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return of_tokens(
        "Llama 8 x 512", transformers.LlamaForCausalLM(config), "model.layers.*", (-1, CLASS), (batch, 256)
    )


def mamba(batch: int = 1) -> Workload:
    """Mamba-130m from embeddings of 128 tokens, the last token's logit."""
    return of_tokens("Mamba-130m", published.mamba_130m().model, "backbone.layers.*", (-1, CLASS), (batch, 128))


def tiny_cnn(batch: int = 1) -> Workload:
    """A convolution and a dense layer, to see in seconds that a benchmark runs."""
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(64, 10))
    return Workload("tiny CNN", nn.Sequential(*layers).eval(), torch.randn(batch, 3, 16, 16).clamp(-WHITE, WHITE), "*")


@dataclass(frozen=True)
class Entry:
    """A model that providers are compared on: its key on command lines, its kind and its builder from a batch size."""

    key: str
    kind: Literal["convolutional", "transformer", "state space"]
    build: Callable[[int], Workload]

    def seeded(self, batch: int, device: torch.device) -> Workload:
        """The same weights and inputs in every process that asks, for inference, parameters frozen."""
        torch.manual_seed(0)
        work = self.build(batch)
        return replace(work, model=work.model.requires_grad_(False).to(device), x=work.x.to(device))


TIMED = {"vit": vit, "roberta": roberta, "gpt2": gpt2, "llama": llama, "resnet": resnet, "vgg16": vgg16}
"""What ours alone is timed on, by name."""


def timed(names: Iterable[str] = TIMED) -> Iterator[Workload]:
    """The workloads of these names at batch 1, parameters frozen, each made when the one before it is done with."""
    torch.manual_seed(0)
    for name in names:
        work = TIMED[name]()
        work.model.requires_grad_(False)
        yield work


COMPARED = (
    Entry("vit", "transformer", vit),
    Entry("vgg16", "convolutional", vgg16),
    Entry("resnet50", "convolutional", normed_resnet),
    Entry("roberta", "transformer", roberta),
    Entry("gpt2", "transformer", gpt2_tokens),
    Entry("llama", "transformer", llama),
    Entry("mamba", "state space", mamba),
)
"""What peers are compared on."""

ENTRIES = {entry.key: entry for entry in (*COMPARED, Entry("tiny", "convolutional", tiny_cnn))}


def encoder(depth: int) -> Workload:
    """A transformer encoder of small width whose layers can be any number, on 256 tokens."""
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    model = nn.Sequential(stack, nn.Flatten(), nn.Linear(64 * 256, 10)).eval()
    return Workload(f"{depth} layers", model, torch.randn(1, 256, 64), "0.layers.*")


def plain_forward(work: Workload) -> object:
    """The model's own call, without gradients."""
    with torch.no_grad():
        return work.model(work.x)


def with_outputs(explained: LRPModule, work: Workload) -> object:
    """Relevance of the input, and the model's outputs as well."""
    with torch.no_grad():
        _, tape = explained.run(work.x)
        return tape.relevance(work.target)


def input_x_gradient(work: Workload) -> Tensor:
    """Autograd's gradient of the explained logit, times the input."""
    leaf = work.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(explained_logits(work.model(leaf), work.target).sum(), leaf)
    return gradient * work.x


def explained_logits(output: Tensor, target: int | tuple[int, ...]) -> Tensor:
    """The logit of every sample that a target names."""
    chosen = target if isinstance(target, tuple) else (target,)
    return output[(slice(None), *chosen)]


def agrees_with_autograd(work: Workload) -> bool:
    """Whether ours computes autograd's input x gradient, to float32 rounding."""
    expected = input_x_gradient(work)
    found = compile_for_lrp(work.model, "input_x_gradient").attribute(work.x, work.target)
    return bool((found - expected).norm() <= 1e-4 * expected.norm())
