"""The table of kernel forms: function that rules emit -> the same function, computed by the dialect's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lrp_compiler.kernels.attention import attention_map_relevance
from lrp_compiler.kernels.linear import convolution_transpose, linear_transpose, token_relevance
from lrp_compiler.kernels.norm import (
    centred_norm_transpose,
    group_norm_transpose,
    layer_norm_transpose,
    rms_norm_transpose,
)
from lrp_compiler.kernels.pooling import max_pool_transpose
from lrp_compiler.kernels.softmax import softmax_transpose
from lrp_compiler.passes.fusing.attention import attention, attention_map_form
from lrp_compiler.passes.fusing.gated import gated_mlp
from lrp_compiler.passes.fusing.norms import centred_norm_form, group_norm_form, layer_norm_form, rms_norm_form
from lrp_compiler.passes.fusing.picking import max_pool, token_form, top_form
from lrp_compiler.passes.fusing.products import epsilon_convolution, epsilon_linear, sign_split_form
from lrp_compiler.passes.fusing.replacement import Form, Replacement, replacement_of
from lrp_compiler.passes.fusing.softmax import softmax_form
from lrp_compiler.passes.matching import Match
from lrp_compiler.passes.rules.elementwise import gated
from lrp_compiler.passes.rules.filter import keep_top
from lrp_compiler.passes.rules.signsplit import split_transpose
from lrp_compiler.passes.vjp import pullback

FORMS: dict[Callable[..., Any], Form] = {
    layer_norm_transpose: layer_norm_form,
    group_norm_transpose: group_norm_form,
    rms_norm_transpose: rms_norm_form,
    centred_norm_transpose: centred_norm_form,
    softmax_transpose: softmax_form,
    split_transpose: sign_split_form,
    keep_top: top_form,
    token_relevance: token_form,
    attention_map_relevance: attention_map_form,
}
"""A form takes the arguments of its function and gives its results."""

PATTERNS: dict[Callable[..., Any], Callable[[Match], Replacement | None]] = {
    linear_transpose: epsilon_linear,
    convolution_transpose: epsilon_convolution,
    pullback: attention,
    gated: gated_mlp,
    max_pool_transpose: max_pool,
}
"""Where more than the function decides: what to replace, None where there is nothing to fuse."""


def replacement_for(match: Match) -> Replacement | None:
    """What takes the place of a match, None where no kernel is meant for it; raises NotSupportedError."""
    function = match.emission.function
    if function in FORMS:
        return replacement_of(match, FORMS[function])
    return PATTERNS[function](match) if function in PATTERNS else None
