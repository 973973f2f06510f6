"""Audio models of the gallery: Hugging Face definitions from tiny configs, random weights."""

from __future__ import annotations

import torch
import transformers
from gallery import Call, Entry

from lrp_compiler import Token

HEARING = {
    "vocab_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (6, 8),
    "conv_kernel": (5, 3),
    "conv_stride": (3, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
"""A tiny encoder of raw audio: two strided convolutions, a grouped positional one under weight norm, attention."""


def wav2vec2() -> Call:
    """The base variant: a group norm over time after the first convolution, norms behind the sub-layers."""
    config = transformers.Wav2Vec2Config(**HEARING, feat_extract_norm="group")
    return Call(transformers.Wav2Vec2ForCTC(config), (torch.randn(2, 60),))


def wav2vec2_layer_norm() -> Call:
    """The large variant: layer norms after every convolution and before the sub-layers, and padded audio."""
    config = transformers.Wav2Vec2Config(
        **HEARING, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True
    )
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, -17:] = 0
    kwargs = {"input_values": torch.randn(2, 60) * mask, "attention_mask": mask}
    return Call(transformers.Wav2Vec2ForCTC(config), (), kwargs)


def whisper() -> Call:
    config = transformers.WhisperConfig(
        vocab_size=50,
        num_mel_bins=6,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=5,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    kwargs = {"input_features": torch.randn(2, 6, 10), "decoder_input_ids": torch.randint(4, 50, (2, 4))}
    return Call(transformers.WhisperForConditionalGeneration(config), (), kwargs)


ENTRIES = {
    "wav2vec2": Entry(wav2vec2, Token(3, 7), ("input_values",)),
    "wav2vec2_layer_norm": Entry(
        wav2vec2_layer_norm, Token(3, 7), ("input_values",), mask="attention_mask", tokens="input_values"
    ),
    "whisper": Entry(whisper, Token(2, 7), ("input_features", "decoder_input_ids")),
}
