"""The one table that says what every ATen op is to relevance; an op that is not here has no rule by accident."""

from __future__ import annotations

import enum
import operator
from dataclasses import dataclass

from torch import fx

from lrp_compiler.passes.branches import Conditional
from lrp_compiler.passes.program import facts


class OpClass(enum.Enum):
    """How an op treats relevance; composites choose a rule per class (RULES.md sections 1.1 to 1.9)."""

    LINEAR = "linear"
    BILINEAR = "bilinear"
    ADD = "add"
    MULTIPLY = "multiply"
    DIVIDE = "divide"
    ACTIVATION = "activation"
    NONLINEAR = "nonlinear"
    STATISTIC = "statistic"
    MOVEMENT = "movement"
    REDUCTION = "reduction"
    SELECTION = "selection"
    NORM = "norm"
    RMS_NORM = "rms_norm"
    BATCH_NORM = "batch_norm"
    SOFTMAX = "softmax"
    ATTENTION = "attention"
    LINEAR_ATTENTION = "linear_attention"
    SCAN = "scan"
    STATE_PRODUCT = "state_product"
    POWER = "power"
    RECURRENT = "recurrent"
    TUPLE = "tuple"
    CONDITIONAL = "conditional"
    NON_RELEVANCE = "non_relevance"


@dataclass(frozen=True)
class OpEntry:
    """The class of an op; ``factors`` and ``terms`` are argument positions it multiplies and adds."""

    op_class: OpClass
    factors: tuple[int, ...] = ()
    terms: tuple[int, ...] = ()


def aten_names(names: str) -> frozenset[str]:
    """Table keys of ATen ops from their names, separated by blanks."""
    return frozenset(f"aten::{name}" for name in names.split())


def _entries(op_class: OpClass, names: str) -> dict[str, OpEntry]:
    return {name: OpEntry(op_class) for name in sorted(aten_names(names))}


GROUPED_PRODUCT = "transformers::grouped_mm_fallback"
"""Rows times their group's matrix, as mixtures of experts make it: a custom op that torch.func cannot differentiate."""

OP_TABLE: dict[str, OpEntry] = {
    "aten::linear": OpEntry(OpClass.LINEAR, factors=(0, 1), terms=(2,)),
    "aten::mm": OpEntry(OpClass.LINEAR, factors=(0, 1)),
    "aten::mv": OpEntry(OpClass.LINEAR, factors=(0, 1)),
    "aten::bmm": OpEntry(OpClass.LINEAR, factors=(0, 1)),
    "aten::dot": OpEntry(OpClass.LINEAR, factors=(0, 1)),
    "aten::matmul": OpEntry(OpClass.LINEAR, factors=(0, 1)),
    "aten::addmm": OpEntry(OpClass.LINEAR, factors=(1, 2), terms=(0,)),
    "aten::baddbmm": OpEntry(OpClass.LINEAR, factors=(1, 2), terms=(0,)),
    "aten::_grouped_mm": OpEntry(OpClass.LINEAR, factors=(0, 1), terms=(3,)),
    GROUPED_PRODUCT: OpEntry(OpClass.LINEAR, factors=(0, 1)),
    "aten::convolution": OpEntry(OpClass.LINEAR, factors=(0, 1), terms=(2,)),
    "aten::conv1d": OpEntry(OpClass.LINEAR, factors=(0, 1), terms=(2,)),
    "aten::conv2d": OpEntry(OpClass.LINEAR, factors=(0, 1), terms=(2,)),
    "aten::conv3d": OpEntry(OpClass.LINEAR, factors=(0, 1), terms=(2,)),
    "aten::conv_transpose1d": OpEntry(OpClass.LINEAR, factors=(0, 1), terms=(2,)),
    "aten::conv_transpose2d": OpEntry(OpClass.LINEAR, factors=(0, 1), terms=(2,)),
    "aten::conv_transpose3d": OpEntry(OpClass.LINEAR, factors=(0, 1), terms=(2,)),
    "aten::mul": OpEntry(OpClass.MULTIPLY, factors=(0, 1)),
    "aten::div": OpEntry(OpClass.DIVIDE, factors=(0, 1)),
    "aten::native_layer_norm": OpEntry(OpClass.NORM),
    "aten::native_group_norm": OpEntry(OpClass.NORM),
    "aten::native_batch_norm": OpEntry(OpClass.BATCH_NORM),
    "aten::scaled_dot_product_attention": OpEntry(OpClass.ATTENTION),
    "aten::_scaled_dot_product_flash_attention_for_cpu": OpEntry(OpClass.ATTENTION),
    "pattern::rms_norm": OpEntry(OpClass.RMS_NORM),
    "pattern::layer_norm": OpEntry(OpClass.NORM),
    "pattern::gelu_tanh": OpEntry(OpClass.ACTIVATION),
    "pattern::softcap": OpEntry(OpClass.ACTIVATION),
    "pattern::linear_attention": OpEntry(OpClass.LINEAR_ATTENTION, factors=(0, 1)),
    "pattern::scan": OpEntry(OpClass.SCAN),
    "pattern::state_product": OpEntry(OpClass.STATE_PRODUCT, factors=(0, 1)),
    "pattern::folded_batch_norm": OpEntry(OpClass.LINEAR, factors=(0, 1), terms=(2,)),
    "builtin::getitem": OpEntry(OpClass.TUPLE),
    "higher_order::cond": OpEntry(OpClass.CONDITIONAL),
    **_entries(OpClass.ADD, "add sub rsub neg"),
    **_entries(
        OpClass.ACTIVATION,
        "relu relu6 leaky_relu gelu silu mish hardswish elu selu celu tanh hardtanh hardshrink softshrink"
        " threshold prelu abs asinh atan sin sinh erf expm1 log1p clamp clamp_min clamp_max",
    ),
    **_entries(OpClass.NONLINEAR, "sigmoid softplus exp log cos cosh log_sigmoid hardsigmoid"),
    **_entries(OpClass.STATISTIC, "rsqrt sqrt reciprocal var std norm linalg_vector_norm angle"),
    **_entries(OpClass.POWER, "pow square"),
    **_entries(OpClass.RECURRENT, "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"),
    **_entries(
        OpClass.MOVEMENT,
        "view reshape _unsafe_view transpose permute t numpy_T mT squeeze unsqueeze flatten unflatten as_strided"
        " clone contiguous _to_copy to type_as alias expand expand_as view_as repeat repeat_interleave tile flip roll"
        " unfold im2col col2im cat concat stack hstack vstack split split_with_sizes chunk unbind select slice narrow"
        " index index_select gather masked_select take scatter scatter_add index_add index_put index_copy masked_fill"
        " masked_scatter where pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d"
        " replication_pad2d diagonal diag_embed tril triu select_scatter slice_scatter diagonal_scatter movedim"
        " swapaxes pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle max_unpool2d max_unpool3d"
        " _unsafe_index unsafe_split copy real imag view_as_real view_as_complex complex conj _conj conj_physical"
        " resolve_conj _neg_view resolve_neg unfold_backward nan_to_num",
    ),
    **_entries(
        OpClass.REDUCTION,
        "sum mean cumsum trace avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d"
        " _adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_bilinear2d"
        " upsample_bicubic2d upsample_nearest3d upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa"
        " _upsample_bicubic2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d"
        " _fft_r2c _fft_c2r _fft_c2c",
    ),
    **_entries(
        OpClass.SELECTION,
        "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d"
        " adaptive_max_pool3d max amax min amin maximum minimum topk sort logsumexp scatter_reduce",
    ),
    **_entries(OpClass.SOFTMAX, "softmax _softmax log_softmax _log_softmax _safe_softmax"),
    **_entries(
        OpClass.NON_RELEVANCE,
        "detach eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not"
        " __and__ __or__ __xor__ isnan isinf isfinite argmax argmin argsort floor ceil round trunc sign sgn"
        " floor_divide remainder any all count_nonzero nonzero one_hot bucketize searchsorted diff bernoulli rand_like"
        " randn_like zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full arange full"
        " zeros ones empty eye linspace scalar_tensor rand randn randint item _local_scalar_dense cumprod embedding"
        " empty_strided new_empty_strided fill bernoulli_ is_nonzero lift_fresh_copy triu_indices tril_indices",
    ),
}

UNCOVERED_MODES = {"aten::scatter_reduce": "prod"}
"""Ops of which one mode, named by a literal argument, is something else than the table says."""

TARGET_NAMES = {operator.getitem: "builtin::getitem"}


def op_name(node: fx.Node) -> str:
    """The table key of a node: ``pattern::<kind>``, ``aten::<op>`` without overload, or ``builtin::<fn>``."""
    pattern = facts(node).pattern
    if pattern is not None:
        return f"pattern::{pattern.kind}"
    if node.target in TARGET_NAMES:
        return TARGET_NAMES[node.target]
    if isinstance(node.target, Conditional):
        return "higher_order::cond"
    return schema_name(node.target)


def schema_name(target: object) -> str:
    """The name of an op without its overload."""
    schema = getattr(target, "_schema", None)
    return schema.name if schema is not None else str(target)


def classify(node: fx.Node) -> OpEntry | None:
    """The table's entry for a node, or None when the op is unknown."""
    name = op_name(node)
    return None if name in UNCOVERED_MODES and UNCOVERED_MODES[name] in node.args else OP_TABLE.get(name)
