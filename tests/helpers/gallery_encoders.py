"""Encoders and encoder-decoders of the gallery: sequence classifiers, translators and a text-image model."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from gallery import Call, Entry
from gallery_text import SPECIAL, VOCABULARY, ids, padding

from lrp_compiler import Token


def classifier(model: type[Any], config: Any, *, attention: str = "sdpa") -> Call:
    """An encoder that classifies a batch of two, the second padded."""
    config._attn_implementation = attention
    tokens = ids()
    return Call(model(config), (), {"input_ids": tokens, "attention_mask": padding(tokens)})


def shared(**more: Any) -> dict[str, Any]:
    """What the configs of encoders have in common."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
    }
    return {**sizes, "pad_token_id": 0, **more}


def bert(attention: str = "sdpa") -> Call:
    config = transformers.BertConfig(**shared())
    return classifier(transformers.BertForSequenceClassification, config, attention=attention)


def roberta() -> Call:
    config = transformers.RobertaConfig(**shared(pad_token_id=1))
    return classifier(transformers.RobertaForSequenceClassification, config)


def distilbert() -> Call:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=32
    )
    return classifier(transformers.DistilBertForSequenceClassification, config)


def electra() -> Call:
    config = transformers.ElectraConfig(**shared(embedding_size=8))
    return classifier(transformers.ElectraForSequenceClassification, config)


def deberta() -> Call:
    config = transformers.DebertaV2Config(
        **shared(
            num_hidden_layers=1,
            relative_attention=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            conv_kernel_size=3,
            conv_act="gelu",
            position_biased_input=False,
            max_relative_positions=-1,
        )
    )
    return classifier(transformers.DebertaV2ForSequenceClassification, config, attention="eager")


def translator(model: Any) -> Call:
    """An encoder-decoder: source tokens, the second sample padded, and target tokens."""
    source, target = ids(), ids(tokens=4)
    return Call(model, (), {"input_ids": source, "attention_mask": padding(source), "decoder_input_ids": target})


def flan_t5() -> Call:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    return translator(transformers.T5ForConditionalGeneration(config))


def bart() -> Call:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        scale_embedding=True,
        **SPECIAL,
    )
    return translator(transformers.BartForConditionalGeneration(config))


def clip() -> Call:
    text = {**shared(num_hidden_layers=1), "eos_token_id": 2, "bos_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    tokens = ids()
    tokens[0, -1] = tokens[1, -3] = 2
    inputs = {"input_ids": tokens, "attention_mask": padding(tokens), "pixel_values": torch.randn(2, 3, 16, 16)}
    return Call(transformers.CLIPModel(config), (), inputs)


def encoder(build: Any) -> Entry:
    return Entry(build, 1, ("input_ids",), mask="attention_mask")


ENTRIES = {
    "bert": encoder(bert),
    "bert_eager": encoder(functools.partial(bert, "eager")),
    "roberta": encoder(roberta),
    "distilbert": encoder(distilbert),
    "electra": encoder(electra),
    "deberta_v2": encoder(deberta),
    "flan_t5": Entry(flan_t5, Token(2, 7), ("input_ids", "decoder_input_ids"), mask="attention_mask"),
    "bart": Entry(bart, Token(2, 7), ("input_ids", "decoder_input_ids"), mask="attention_mask"),
    "clip_against_texts": Entry(
        clip,
        0,
        ("input_ids", "pixel_values"),
        mask="attention_mask",
        batched=False,
        because="each image is scored against all texts of the batch",
    ),
}
