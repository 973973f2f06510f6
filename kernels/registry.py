"""The tables of the relevance dialect: every op that has a kernel, and what is left to torch, with the reason."""

from __future__ import annotations

from typing import Any

from lrp_compiler.kernels.dialect.attention import ATTENTION_LRP_BWD
from lrp_compiler.kernels.dialect.attention_map import ATTENTION_LRP_HEADS, ATTENTION_LRP_MAP
from lrp_compiler.kernels.dialect.elementwise import ELEMENTWISE_CHAIN
from lrp_compiler.kernels.dialect.embedding import EMBEDDING_RELEVANCE, TOKEN_RELEVANCE
from lrp_compiler.kernels.dialect.epsilon_conv2d import EPSILON_CONV2D_BWD
from lrp_compiler.kernels.dialect.epsilon_linear import EPSILON_LINEAR_BWD
from lrp_compiler.kernels.dialect.gated_mlp import GATED_MLP_BWD
from lrp_compiler.kernels.dialect.linear_attention import LINEAR_ATTENTION_TRANSPOSE
from lrp_compiler.kernels.dialect.norm import NORM_BWD
from lrp_compiler.kernels.dialect.pooling import MAXPOOL_BWD
from lrp_compiler.kernels.dialect.rope import ROPE_BWD
from lrp_compiler.kernels.dialect.selective_scan import SELECTIVE_SCAN_TRANSPOSE
from lrp_compiler.kernels.dialect.signsplit_conv2d import SIGNSPLIT_CONV2D_BWD, SIGNSPLIT_CONV2D_FWD
from lrp_compiler.kernels.dialect.signsplit_linear import SIGNSPLIT_LINEAR_BWD, SIGNSPLIT_LINEAR_FWD
from lrp_compiler.kernels.dialect.softmax import SOFTMAX_BWD
from lrp_compiler.kernels.dialect.topk import TOPK_FILTER
from lrp_compiler.kernels.spec import KernelSpec

DIALECT: tuple[KernelSpec, ...] = (
    NORM_BWD,
    GATED_MLP_BWD,
    SOFTMAX_BWD,
    ROPE_BWD,
    MAXPOOL_BWD,
    EMBEDDING_RELEVANCE,
    TOKEN_RELEVANCE,
    TOPK_FILTER,
    SIGNSPLIT_LINEAR_FWD,
    SIGNSPLIT_LINEAR_BWD,
    EPSILON_LINEAR_BWD,
    SIGNSPLIT_CONV2D_FWD,
    SIGNSPLIT_CONV2D_BWD,
    EPSILON_CONV2D_BWD,
    ELEMENTWISE_CHAIN,
    SELECTIVE_SCAN_TRANSPOSE,
    LINEAR_ATTENTION_TRANSPOSE,
    ATTENTION_LRP_BWD,
    ATTENTION_LRP_MAP,
    ATTENTION_LRP_HEADS,
)


def spec_named(name: str) -> KernelSpec:
    """The spec of ``lrp::<name>``; KeyError for none."""
    return {spec.name: spec for spec in DIALECT}[name]


def spec_of(target: Any) -> KernelSpec | None:
    """The spec of a call target of a graph; None for what is no op of the dialect."""
    schema = getattr(target, "_schema", None)
    name = str(getattr(schema, "name", ""))
    return next((spec for spec in DIALECT if name == f"lrp::{spec.name}"), None)


LEFT_TO_TORCH: dict[str, str] = {
    "plain linear": "c W is one product of cuBLAS; any kernel reads the same bytes and does the same operations",
    "plain convolution": "cuDNN's data gradient, likewise",
    "plain product": "both factors' coefficients are cuBLAS products like those of the gradient",
    "one-sided linear": "for x >= 0, z+, and gamma before a ReLU, are one cuBLAS product each way; a kernel could save"
    " the pass that clamps W, whose share falls with the number of tokens",
    "one-sided convolution": "as one-sided linear, by cuDNN; its weights are small beside its activations",
    "addition": "both terms get the coefficient as it is; where paths meet one addition runs as fast as a copy, or is"
    " the residual operand of a kernel",
    "movement": "views take no time; gathering, padding and concatenating move every byte once, as a copy does",
    "mean pooling and resizing": "torch's backward kernels read and write every element once",
    "batch norm": "in eval one factor per channel: a link of an elementwise chain",
    "lone elementwise": "a pointwise op that stands alone reads and writes what any kernel would",
    "Fourier transform": "one transform of cuFFT each way",
    "recurrence": "LSTM, GRU and RNN walk back through time in as many small dependent products of cuBLAS as there are"
    " steps; their latency takes the time, which no count of bytes and operations shows",
    "difference rules": "the plain products at the mean of both runs' factors, and elementwise chains",
    "differentiable relevance": "runs the eager references, whose derivatives autograd has: no kernel needs a backward",
}
"""What relevance asks for and no kernel of ours does -> why torch's own op or eager code is kept."""
