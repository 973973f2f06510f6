"""The 15 architectures of DynamicLRP's tables at their published sizes, without weights.

Language, audio and transformer models are transformers' definitions with their checkpoints' configurations written out;
VGG-16 and EfficientNetV2-M are defined here from their papers, since torchvision has no build for CPU-only torch. Every
builder returns a model and one call; under ``weightless`` neither holds values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

TOKENS = 16
"""Tokens per sequence; state-space models are unrolled over them, others do not grow with them."""


@dataclass(frozen=True)
class Call:
    """One call ``model(*args, **kwargs)``; ``size`` says what of."""

    model: nn.Module
    size: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """One architecture: its name in DynamicLRP's tables, modality, width, depth and builder."""

    name: str
    modality: str
    d_model: int
    depth: str
    build: Callable[[], Call]

    def weightless_call(self) -> Call:
        """The call of a model for inference, neither with values."""
        with weightless():
            call = self.build()
        if isinstance(call.model, transformers.PreTrainedModel):
            # Tying belongs to the initialisation that was left out.
            call.model.tie_weights()
        call.model.eval().requires_grad_(False)
        return call


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Build models and tensors on fake tensors of this machine's device: sizes without values."""
    with FakeTensorMode(), no_init_weights():
        yield


def ids(vocabulary: int, tokens: int = TOKENS) -> Tensor:
    return torch.randint(0, vocabulary, (1, tokens))


def of_ids(model: nn.Module, vocabulary: int) -> Call:
    return Call(model, f"{TOKENS} tokens", (), {"input_ids": ids(vocabulary)})


def of_pixels(model: nn.Module, size: int, **kwargs: Any) -> Call:
    return Call(model, f"{size} px", (), {"pixel_values": torch.randn(1, 3, size, size), **kwargs})


VGG16_CHANNELS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
"""Output channels of VGG-16's convolutions, 0 for a pooling (configuration D of arXiv 1409.1556)."""


def vgg16() -> Call:
    layers: list[nn.Module] = []
    before = 3
    for channels in VGG16_CHANNELS:
        if channels == 0:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
            before = channels
    hidden = [nn.Linear(512 * 7 * 7, 4096), nn.ReLU(inplace=True), nn.Dropout()]
    hidden += [nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *hidden, nn.Linear(4096, 1000))
    return Call(model, "224 px", (torch.randn(1, 3, 224, 224),))


def resnet50() -> Call:
    return of_pixels(transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000)), 224)


def vit_b_16() -> Call:
    return of_pixels(transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)), 224)


class Normed(nn.Sequential):
    """Convolution, batch norm and, unless ``linear``, SiLU."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1, linear: bool = False):
        convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(after, eps=1e-3), *([] if linear else [nn.SiLU(inplace=True)]))


class SqueezeExcitation(nn.Module):
    """Channels scaled by a gate that two 1x1 convolutions compute from their means."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation, self.gate = nn.SiLU(inplace=True), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(x, 1)
        gate: Tensor = self.gate(self.excite(self.activation(self.squeeze(pooled))))
        return gate * x


class Inverted(nn.Module):
    """An inverted-bottleneck block; fused ones expand and filter in one convolution."""

    def __init__(self, before: int, after: int, expansion: int, stride: int, fused: bool) -> None:
        super().__init__()
        wide = before * expansion
        if fused and expansion == 1:
            parts: list[nn.Module] = [Normed(before, after, 3, stride)]
        elif fused:
            parts = [Normed(before, wide, 3, stride), Normed(wide, after, 1, linear=True)]
        else:
            parts = [Normed(before, wide, 1), Normed(wide, wide, 3, stride, groups=wide)]
            parts += [SqueezeExcitation(wide, before // 4), Normed(wide, after, 1, linear=True)]
        self.block = nn.Sequential(*parts)
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(x)
        return result + x if self.residual else result


EFFICIENTNET_V2_M = (
    (True, 1, 24, 3, 1),
    (True, 4, 48, 5, 2),
    (True, 4, 80, 5, 2),
    (False, 4, 160, 7, 2),
    (False, 6, 176, 14, 1),
    (False, 6, 304, 18, 2),
    (False, 6, 512, 5, 1),
)
"""(fused, expansion, channels, blocks, stride) per stage (arXiv 2104.00298)."""


def efficientnet_v2_m() -> Call:
    layers: list[nn.Module] = [Normed(3, 24, 3, 2)]
    before = 24
    for fused, expansion, channels, blocks, stride in EFFICIENTNET_V2_M:
        for block in range(blocks):
            layers.append(Inverted(before, channels, expansion, 1 if block else stride, fused))
            before = channels
    head = [Normed(before, 1280, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(1280, 1000)]
    return Call(nn.Sequential(*layers, *head), "480 px", (torch.randn(1, 3, 480, 480),))


def siglip2() -> Call:
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    vision = {**sizes, "patch_size": 14, "image_size": 384}
    text = {**sizes, "vocab_size": 256000, "max_position_embeddings": 64, "projection_size": 1152}
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    call = of_pixels(model, 384, input_ids=ids(256000, 64))
    return Call(call.model, "384 px, 64 tokens", (), call.kwargs)


def wav2vec2() -> Call:
    config = transformers.Wav2Vec2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        conv_bias=True,
        do_stable_layer_norm=True,
    )
    return Call(transformers.Wav2Vec2ForCTC(config), "1 s of audio", (), {"input_values": torch.randn(1, 16000)})


def whisper_small() -> Call:
    sizes = {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in (("layers", 12), ("ffn_dim", 3072))}
    heads = {"encoder_attention_heads": 12, "decoder_attention_heads": 12}
    config = transformers.WhisperConfig(vocab_size=51865, d_model=768, **sizes, **heads)
    inputs = {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": ids(51865, 4)}
    return Call(transformers.WhisperForConditionalGeneration(config), "30 s of audio, 4 tokens", (), inputs)


def gpt2() -> Call:
    return of_ids(transformers.GPT2LMHeadModel(transformers.GPT2Config()), 50257)


def roberta_large() -> Call:
    config = transformers.RobertaConfig(
        vocab_size=50265,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    return of_ids(transformers.RobertaForSequenceClassification(config), 50265)


def llama_1b_config() -> transformers.LlamaConfig:
    """The sizes of Llama-3.2-1B."""
    return transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )


def llama_1b() -> Call:
    return of_ids(transformers.LlamaForCausalLM(llama_1b_config()), 128256)


def gemma3_270m() -> Call:
    config = transformers.Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
    )
    return of_ids(transformers.Gemma3ForCausalLM(config), 262144)


def qwen3() -> Call:
    config = transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )
    return of_ids(transformers.Qwen3ForCausalLM(config), 151936)


def flan_t5_large() -> Call:
    config = transformers.T5Config(
        vocab_size=32128,
        d_model=1024,
        d_kv=64,
        d_ff=2816,
        num_layers=24,
        num_heads=16,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    inputs = {"input_ids": ids(32128), "decoder_input_ids": ids(32128, 4)}
    return Call(transformers.T5ForConditionalGeneration(config), f"{TOKENS} + 4 tokens", (), inputs)


class LowRank(nn.Module):
    """A linear layer with a low-rank addition (LoRA, arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: int) -> None:
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x)) * self.scaling
        return result


def flan_t5_large_lora() -> Call:
    """Adapters of rank 8 at every attention's queries and values, the projections that LoRA's authors adapt."""
    call = flan_t5_large()
    found = [(m, n) for m in call.model.modules() for n in ("q", "v") if isinstance(getattr(m, n, None), nn.Linear)]
    for module, name in found:
        setattr(module, name, LowRank(getattr(module, name), 8, 32))
    return call


def deplot() -> Call:
    patches = torch.randn(1, 2048, 770)
    inputs = {"flattened_patches": patches, "attention_mask": torch.ones(1, 2048), "decoder_input_ids": ids(50244, 4)}
    model = transformers.Pix2StructForConditionalGeneration(transformers.Pix2StructConfig())
    return Call(model, "2048 patches, 4 tokens", (), inputs)


def mamba_130m() -> Call:
    return of_ids(
        transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24)
        ),
        50280,
    )


THE_15 = (
    Published("VGG16", "vision", 512, "13 (C)", vgg16),
    Published("ResNet-50", "vision", 2048, "53 (C)", resnet50),
    Published("ViT-b-16", "vision", 768, "1 (C) 12 (T)", vit_b_16),
    Published("EfficientNetv2-medium", "vision", 1280, "57 (C)", efficientnet_v2_m),
    Published("SigLIP-2-So400m-base14-384", "vision", 1152, "1 (C) 54 (T)", siglip2),
    Published("Wav2Vec2-xls-r-300m", "audio", 1024, "8 (C) 24 (T)", wav2vec2),
    Published("whisper-small", "audio", 768, "2 (C) 24 (T)", whisper_small),
    Published("GPT-2", "language", 768, "12 (T)", gpt2),
    Published("RoBERTa-large", "language", 1024, "24 (T)", roberta_large),
    Published("Llama3.2-1B", "language", 2048, "16 (T)", llama_1b),
    Published("Gemma-3-270m-it", "language", 640, "18 (T)", gemma3_270m),
    Published("Qwen3-0.6B", "language", 1024, "28 (T)", qwen3),
    Published("Flan-T5-large", "language", 1024, "48 (T)", flan_t5_large),
    Published("DePlot", "vision and language", 768, "24 (T)", deplot),
    Published("Mamba-130m", "state space", 768, "24 blocks", mamba_130m),
)
FINE_TUNED = Published("Flan-T5-large (FT)", "language", 1024, "48 (T)", flan_t5_large_lora)
"""The same model with LoRA adapters, which DynamicLRP's Table 4 lists beside it."""
