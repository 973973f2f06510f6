"""Networks of the gallery that torch provides or that are defined here, from their papers: attention, recurrence,
convolution, normalisation, and python's own structures."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from gallery import Call, Entry
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, CLASSES = 50, 16, 4, 5


def tokens(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length))


def padding(batch: int = 2, length: int = 6) -> Tensor:
    """Ones for real tokens; the last sample ends two tokens early."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -2:] = 0
    return mask


class Embedded(nn.Module):
    """Tokens with learned positions added."""

    def __init__(self, longest: int = 8) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(longest, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.places[: ids.shape[1]]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over real tokens, as sentence encoders pool."""
    weights = mask.unsqueeze(-1).to(x.dtype)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


# --- attention ----------------------------------------------------------------------------------------------


class EncoderClassifier(nn.Module):
    """nn.TransformerEncoder with a padding mask, pooled over real tokens."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedded, self.head = Embedded(), nn.Linear(WIDTH, CLASSES)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(self.embedded(ids), src_key_padding_mask=mask == 0)
        return self.head(masked_mean(hidden, mask))


def transformer_encoder() -> Call:
    return Call(EncoderClassifier(), (), {"ids": tokens(), "mask": padding()})


def transformer_encoder_pre_norm() -> Call:
    model = EncoderClassifier(norm_first=True, activation="gelu", bias=False)
    return Call(model, (), {"ids": tokens(), "mask": padding()})


class DecoderModel(nn.Module):
    """nn.TransformerDecoder: causal over its tokens, cross-attention to a padded memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded, self.head = Embedded(), nn.Linear(WIDTH, VOCABULARY)
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1, norm=nn.LayerNorm(WIDTH))

    def forward(self, ids: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        hidden = self.decoder(
            self.embedded(ids), memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=mask == 0
        )
        return self.head(hidden)


def transformer_decoder() -> Call:
    kwargs = {"ids": tokens(length=4), "memory": torch.randn(2, 6, WIDTH), "mask": padding()}
    return Call(DecoderModel(), (), kwargs)


class AttentionWithWeights(nn.Module):
    """nn.MultiheadAttention that returns its map, averaged over heads or one per head."""

    def __init__(self, average: bool) -> None:
        super().__init__()
        self.average = average
        self.attention, self.head = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        attended, weights = self.attention(
            x, x, x, key_padding_mask=mask == 0, need_weights=True, average_attn_weights=self.average
        )
        return self.head(masked_mean(attended, mask)), weights


def mha_average_weights() -> Call:
    return Call(AttentionWithWeights(True), (), {"x": torch.randn(2, 6, WIDTH), "mask": padding()})


def mha_head_weights() -> Call:
    return Call(AttentionWithWeights(False), (), {"x": torch.randn(2, 6, WIDTH), "mask": padding()})


class MeanOfTokens(nn.Module):
    """Embeddings, one dense layer, mean over real tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.dense, self.head = (
            nn.Embedding(VOCABULARY, WIDTH, padding_idx=0),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, CLASSES),
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        pooled = masked_mean(torch.tanh(self.dense(self.words(ids))), mask)
        return self.head(F.normalize(pooled, dim=-1))


def masked_mean_pooling() -> Call:
    return Call(MeanOfTokens(), (), {"ids": tokens(), "mask": padding()})


# --- recurrence ---------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Embeddings, a recurrent network, a head on its last output."""

    def __init__(self, cell: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.recurrent = cell(WIDTH, WIDTH, batch_first=True, **options)
        self.head = nn.Linear(WIDTH * (1 + self.recurrent.bidirectional), CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        outputs, _ = self.recurrent(self.words(ids))
        return self.head(outputs[:, -1])


def lstm() -> Call:
    return Call(Recurrent(nn.LSTM, num_layers=2, bidirectional=True), (), {"ids": tokens()})


def gru() -> Call:
    return Call(Recurrent(nn.GRU, num_layers=2), (), {"ids": tokens()})


# --- convolution --------------------------------------------------------------------------------------------


class DenseLayer(nn.Module):
    """Batch norm, ReLU, convolution; the input is concatenated to the output (Huang et al., 2017)."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


def densenet() -> Call:
    stem = (nn.Conv2d(3, 6, 3, padding=1), DenseLayer(6, 4), DenseLayer(10, 4))
    transition = (nn.BatchNorm2d(14), nn.ReLU(inplace=True), nn.Conv2d(14, 7, 1), nn.AvgPool2d(2), DenseLayer(7, 4))
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(11, 5))
    return Call(nn.Sequential(*stem, *transition, *head), (torch.randn(2, 3, 8, 8),))


class GatedBlock(nn.Module):
    """Dilated causal convolutions for signal and gate, a residual and a skip output (van den Oord et al., 2016)."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.reach = dilation
        self.signal = nn.Conv1d(channels, channels, 2, dilation=dilation)
        self.gate = nn.Conv1d(channels, channels, 2, dilation=dilation)
        self.residual, self.skip = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        past = F.pad(x, (self.reach, 0))
        gated = torch.tanh(self.signal(past)) * torch.sigmoid(self.gate(past))
        return x + self.residual(gated), self.skip(gated)


class WaveNet(nn.Module):
    """Gated blocks whose skip outputs add up before two pointwise convolutions."""

    def __init__(self, channels: int = 8, dilations: tuple[int, ...] = (1, 2, 4)) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, channels, 1)
        self.blocks = nn.ModuleList(GatedBlock(channels, dilation) for dilation in dilations)
        self.out1, self.out2 = nn.Conv1d(2 * channels, 2 * channels, 1), nn.Conv1d(2 * channels, 12, 1)

    def forward(self, wave: Tensor) -> Tensor:
        x, skips = self.stem(wave), []
        for block in self.blocks:
            x, skip = block(x)
            skips.append(skip)
        return self.out2(torch.relu(self.out1(torch.relu(sum(skips)))))


def wavenet() -> Call:
    return Call(WaveNet(), (torch.randn(2, 1, 16),))


class MixerBlock(nn.Module):
    """An MLP across patches, then one across channels (Tolstikhin et al., 2021)."""

    def __init__(self, patches: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.across = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.within = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x))


class MLPMixer(nn.Module):
    """Patches embedded by a strided convolution, mixed, averaged."""

    def __init__(self, size: int = 16, patch: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, patch, patch)
        self.blocks = nn.Sequential(*(MixerBlock((size // patch) ** 2, WIDTH) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.embed(image).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(patches)).mean(1))


def mlp_mixer() -> Call:
    return Call(MLPMixer(), (torch.randn(2, 3, 16, 16),))


class PoolingZoo(nn.Module):
    """Every pooling, resampling and per-sample normalisation on one image, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.group, self.instance = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
        self.tracked = nn.InstanceNorm2d(8, track_running_stats=True)
        self.local = nn.LocalResponseNorm(3)
        self.head = nn.Linear(8 * 4 * 8 + 8, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.group(F.leaky_relu(self.conv(image)))
        pooled = [
            F.adaptive_avg_pool2d(self.instance(x), 2),
            F.adaptive_max_pool2d(self.tracked(x), 2),
            F.avg_pool2d(F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False), 4),
            F.max_pool2d(F.interpolate(x, size=(4, 4), mode="nearest"), 2),
            F.adaptive_avg_pool2d(F.interpolate(x, size=5, mode="bicubic"), 2),
            F.lp_pool2d(x.abs() + 0.1, 2, 8),
            F.adaptive_avg_pool2d(F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), 2),
            F.adaptive_max_pool2d(self.local(x), 2),
        ]
        return self.head(torch.cat([torch.cat(pooled, 1).flatten(1), x.amax((2, 3))], 1))


def pooling_zoo() -> Call:
    return Call(PoolingZoo(), (torch.randn(2, 3, 16, 16),))


FUSED = "without gradients eager calls one opaque kernel (torch.backends.mha) that no trace can look into"

ENTRIES = {
    "transformer_encoder": Entry(transformer_encoder, 2, ("ids",), mask="mask", tokens="ids", fused=FUSED),
    "transformer_encoder_pre_norm": Entry(transformer_encoder_pre_norm, 2, ("ids",), mask="mask", tokens="ids"),
    "transformer_decoder": Entry(transformer_decoder, (3, 7), ("ids", "memory"), mask="mask", tokens="memory"),
    "mha_average_weights": Entry(mha_average_weights, 2, ("x",), mask="mask", tokens="x", fused=FUSED),
    "mha_head_weights": Entry(mha_head_weights, 2, ("x",), mask="mask", tokens="x", fused=FUSED),
    "masked_mean_pooling": Entry(masked_mean_pooling, 2, ("ids",), mask="mask", tokens="ids"),
    "lstm": Entry(lstm, 2, ("ids",)),
    "gru": Entry(gru, 2, ("ids",)),
    "densenet": Entry(densenet, 2, ("input",)),
    "wavenet": Entry(wavenet, (3, 15), ("wave",)),
    "mlp_mixer": Entry(mlp_mixer, 2, ("image",)),
    "pooling_zoo": Entry(pooling_zoo, 2, ("image",)),
}
