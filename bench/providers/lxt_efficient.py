"""LXT's efficient form (Achtibat et al., ICML 2024): gradients changed so that input x gradient is the relevance.

``monkey_patch`` and the maps of LXT 2.1 fail on transformers 5 (they import modelling code that is gone, and put a
plain dict where attention functions are looked up), and LXT has no map for RoBERTa and none for Hugging Face's ViT. So
the maps are written here, of LXT's own patches: its norms, activations, gated MLPs and attention wrappers. They patch
classes of the whole process, which is why each provider has a process of its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from providers.base import Prepared, Provider, Setting, of_input_alone
from providers.stand_ins import lxt_efficient
from torch import Tensor, nn
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.roberta import modeling_roberta
from workloads import Entry, input_x_gradient

ATTENTION = {"attnlrp": "wrap_attention_forward", "cp_lrp": "cp_wrap_attention_forward"}
GATED_MLP = {"attnlrp": "gated_mlp_forward", "cp_lrp": "cp_gated_mlp_forward"}
MODELS = ("vit", "roberta", "gpt2", "llama")


def classify_by_identity_rule(rules: Any, head: Any, features: Tensor) -> Tensor:
    """RoBERTa's head, whose tanh is a function that no patch of a class reaches, with the identity rule on it."""
    hidden = head.dense(head.dropout(features[:, 0, :]))
    logits: Tensor = head.out_proj(head.dropout(rules.identity_rule_implicit(torch.tanh, hidden)))
    return logits


def patch_classes(patches: Any, composite: str) -> None:
    """Give the classes that the models are made of LXT's rules of a composite."""
    nn.LayerNorm.forward = patches.layer_norm_forward
    modeling_llama.LlamaRMSNorm.forward = patches.rms_norm_forward
    modeling_llama.LlamaMLP.forward = getattr(patches, GATED_MLP[composite])
    for activation in (GELUActivation, NewGELUActivation, nn.Tanh):
        patches.patch_method(patches.non_linear_forward, activation, keep_original=True)
    head = modeling_roberta.RobertaClassificationHead
    head.forward = lambda self, features, **options: classify_by_identity_rule(patches, self, features)
    wrap = getattr(patches, ATTENTION[composite])
    ALL_ATTENTION_FUNCTIONS["sdpa"] = wrap(ALL_ATTENTION_FUNCTIONS["sdpa"])


def efficient(composite: str, setting: Setting) -> Prepared:
    """Input x gradient of the patched model."""
    patch_classes(lxt_efficient(), composite)
    return of_input_alone(setting.work, lambda: input_x_gradient(setting.work).detach())


def has_map(entry: Entry) -> bool:
    """Applies to the models that the patches above cover."""
    return entry.key in MODELS


def name_of(composite: str) -> str:
    return f"LXT efficient, {composite}"


PROVIDERS = tuple(
    Provider(name_of(composite), has_map, partial(efficient, composite), packages=("lxt",)) for composite in ATTENTION
)
