"""Small random models of the architectures this library promises, with one call and one target each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lrp_compiler import LRPModule, Token, compile_for_lrp

VOCABULARY = 99
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@dataclass
class Case:
    """A model with a call ``model(*args, **kwargs)`` and a target at its output."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    target: Any = None

    def __call__(self) -> Any:
        return self.model(*self.args, **self.kwargs)


class ResidualBlock(nn.Module):
    """Two convolutions with batch normalisation and a strided shortcut."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(channels, width, 1, stride=2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class ViTBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        split = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.proj(mixed)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches, class token, learned positions, blocks, head."""

    def __init__(self, width: int = 16, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 10, width))
        self.blocks = nn.ModuleList(ViTBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(x.shape[0], -1, -1), tokens], 1) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, 0])


class TwoHeads(nn.Module):
    """Two linear maps of one input: relevance of one output does not pass the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


def vgg() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(72, 16),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(16, 5),
    )
    return Case(model, (torch.randn(2, 3, 12, 12),), target=torch.tensor([3, 1]))


def resnet() -> Case:
    stem = (nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model = nn.Sequential(*stem, ResidualBlock(6, 8), *tail)
    return Case(model, (torch.randn(3, 3, 12, 12),), target=2)


def vit() -> Case:
    return Case(ViT(), (torch.randn(2, 3, 12, 12),), target=4)


def ids(batch: int = 2, tokens: int = 7) -> Tensor:
    return torch.randint(5, VOCABULARY - 5, (batch, tokens))


def padding(tokens: Tensor) -> Tensor:
    """An attention mask that pads the end of the last sample."""
    mask = torch.ones_like(tokens)
    mask[-1, -2:] = 0
    return mask


def _text(config: Any, model: Any, attention: str = "sdpa", **extra: Any) -> nn.Module:
    return model(config(vocab_size=VOCABULARY, attn_implementation=attention, **extra))


def bert(attention: str = "sdpa") -> Case:
    tokens = ids()
    config, model = transformers.BertConfig, transformers.BertForSequenceClassification
    return Case(_text(config, model, attention, **TEXT), (tokens, padding(tokens)), target=1)


def roberta() -> Case:
    tokens = ids()
    config, model = transformers.RobertaConfig, transformers.RobertaForSequenceClassification
    kwargs = {"input_ids": tokens, "attention_mask": padding(tokens)}
    return Case(_text(config, model, **TEXT), (), kwargs, target=torch.tensor([0, 1]))


def gpt2() -> Case:
    extra = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "use_cache": False,
    }
    model = _text(transformers.GPT2Config, transformers.GPT2LMHeadModel, **extra)
    return Case(model, (), {"input_ids": ids()}, target=Token(-1, 7))


def llama(attention: str = "sdpa") -> Case:
    tokens = ids()
    extra = {**TEXT, "num_key_value_heads": 2, "use_cache": False}
    model = _text(transformers.LlamaConfig, transformers.LlamaForCausalLM, attention, **extra)
    kwargs = {"input_ids": tokens, "attention_mask": padding(tokens)}
    return Case(model, (), kwargs, target=Token(torch.tensor([-1, 4]), torch.tensor([7, 8])))


def t5() -> Case:
    extra = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "use_cache": False}
    config = {**extra, "feed_forward_proj": "gated-gelu"}
    model = _text(transformers.T5Config, transformers.T5ForConditionalGeneration, **config)
    tokens = ids()
    kwargs = {"input_ids": tokens, "attention_mask": padding(tokens), "decoder_input_ids": ids(2, 5)}
    return Case(model, (), kwargs, target=(-1, 7))


class Recurrent(nn.Module):
    """Embedding, a bidirectional LSTM with dropout between its layers, a GRU, and a head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.lstm = nn.LSTM(12, 8, 2, batch_first=True, bidirectional=True, dropout=0.2)
        self.gru, self.head = nn.GRU(16, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(self.embedding(tokens))[0])[1][-1])


def lstm() -> Case:
    return Case(Recurrent(), (ids(),), target=torch.tensor([3, 1]))


BUILDERS: dict[str, Callable[[], Case]] = {
    "vgg": vgg,
    "resnet": resnet,
    "vit": vit,
    "bert": bert,
    "bert_eager": lambda: bert("eager"),
    "roberta": roberta,
    "gpt2": gpt2,
    "llama": llama,
    "llama_eager": lambda: llama("eager"),
    "t5": t5,
    "lstm": lstm,
}


class FullPrecisionRMSNorm(nn.Module):
    """Hugging Face's RMSNorm without its cast to float32, so that a float64 model computes in float64."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def _without_casts(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (LlamaRMSNorm, T5LayerNorm)):
                setattr(parent, name, FullPrecisionRMSNorm(child.weight, child.variance_epsilon))


@cache
def shared(name: str, *, double: bool = False) -> tuple[Case, LRPModule]:
    """A case that no test may change, and its model explained, whose tracing other composites share."""
    case = build(name, double=double)
    return case, compile_for_lrp(case.model, "gradient")


@cache
def explained_by(name: str, composite: str, *, double: bool = False, **options: Any) -> tuple[Case, LRPModule]:
    """A case that no test may change, explained with a composite; what is compiled for it serves every test."""
    case, explained = shared(name, double=double)
    return case, compile_for_lrp(explained, composite, **options)


def build(name: str, *, double: bool = False, seed: int = 0) -> Case:
    """A case in eval mode, every parameter random (norms and biases too); ``double`` makes it float64 throughout.

    Hugging Face's RMSNorm casts to float32 whatever the model's dtype; for ``double`` it is replaced.
    """
    torch.manual_seed(seed)
    case = BUILDERS[name]()
    case.model.eval()
    for parameter in case.model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
        else:
            nn.init.normal_(parameter, 0.0, 0.6 * parameter[0].numel() ** -0.5)
    for module in case.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    if double:
        _without_casts(case.model)
        case.model.double()
        case.args = tuple(_double(value) for value in case.args)
        case.kwargs = {key: _double(value) for key, value in case.kwargs.items()}
    return case


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype.is_floating_point else value
