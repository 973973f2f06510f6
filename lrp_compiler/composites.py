"""Composites by name: which rule each class of op gets (RULES.md sections 5.1 to 5.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from lrp_compiler.composite_options import keep_top as keep_top
from lrp_compiler.composite_options import with_router as with_router
from lrp_compiler.kernels.offset_gates import OFFSET_GATES
from lrp_compiler.passes.branches import forward_nodes_everywhere
from lrp_compiler.passes.errors import UnknownCompositeError
from lrp_compiler.passes.operation import Operation, gates_a_product
from lrp_compiler.passes.optable import OpClass, classify, op_name
from lrp_compiler.passes.program import Program, facts
from lrp_compiler.passes.rules.absolute import AbsoluteAdd, AbsoluteMultiply, AbsoluteSum, CreditedBias, NormIdentity
from lrp_compiler.passes.rules.attention import Attention, AttentionValueOnly
from lrp_compiler.passes.rules.base import Composite, Matcher, Rule, on
from lrp_compiler.passes.rules.difference import (
    AttentionDifference,
    ExtremeDifference,
    MaxPoolDifference,
    Midpoint,
    NormDifference,
    Quadratic,
    Quotient,
    Rescale,
    RootOfSquares,
    SoftmaxDifference,
    Transpose,
    attends_alike,
    is_elementwise,
    is_extreme,
    is_log_sum_exp,
    is_max_pool,
    is_quotient,
    is_root_of_squares,
    is_variance,
    varies_in_input,
    varies_in_values,
)
from lrp_compiler.passes.rules.elementwise import (
    BetaSmooth,
    DeconvNet,
    GuidedBackprop,
    Identity,
    IdentityRelevance,
    OffsetGate,
)
from lrp_compiler.passes.rules.gradient import Gradient
from lrp_compiler.passes.rules.norm import BatchNorm, LayerNorm, RMSNorm, SoftmaxGradient
from lrp_compiler.passes.rules.pattern import OnRelevance, PatternAttribution, PatternNet, PatternSite
from lrp_compiler.passes.rules.plain import Epsilon, Plain, Stop
from lrp_compiler.passes.rules.position import PositionAdd, RotaryHalf, adds_position, is_rotary
from lrp_compiler.passes.rules.product import Numerator, Uniform
from lrp_compiler.passes.rules.pullback import SoftMaxPool
from lrp_compiler.passes.rules.recurrent import Recurrent
from lrp_compiler.passes.rules.scan import SelectiveScan, SignalTakesAll
from lrp_compiler.passes.rules.signsplit import AlphaBeta, Gamma, ZPlus
from lrp_compiler.passes.rules.terminal import Bound, Flat, ZBox

Lines = tuple[tuple[Matcher, Rule], ...]

BASE: Lines = (
    (
        on(OpClass.LINEAR, OpClass.ADD, OpClass.MOVEMENT, OpClass.REDUCTION, OpClass.SELECTION, OpClass.TUPLE),
        Plain(),
    ),
    (on(OpClass.BILINEAR, OpClass.MULTIPLY), Uniform()),
    (on(OpClass.DIVIDE), Numerator()),
    (on(OpClass.ACTIVATION, OpClass.POWER), Identity()),
    (on(OpClass.NONLINEAR), IdentityRelevance()),
    (on(OpClass.STATISTIC), Stop()),
    (on(OpClass.NORM), LayerNorm()),
    (on(OpClass.RMS_NORM), RMSNorm()),
    (on(OpClass.BATCH_NORM), BatchNorm()),
    (on(OpClass.SOFTMAX), SoftmaxGradient()),
    (on(OpClass.ATTENTION), Attention()),
    (on(OpClass.RECURRENT), Recurrent()),
    (on(OpClass.LINEAR_ATTENTION), Uniform()),
    (on(OpClass.SCAN), SelectiveScan()),
    (on(OpClass.STATE_PRODUCT), SignalTakesAll()),
)

VALUES_ONLY: Lines = (
    (on(OpClass.SOFTMAX), Stop()),
    (on(OpClass.ATTENTION), AttentionValueOnly()),
    (on(OpClass.LINEAR_ATTENTION), SignalTakesAll()),
)
"""Attention of every kind with constant attention maps."""


def attnlrp() -> Composite:
    """AttnLRP (Achtibat et al., ICML 2024) with epsilon -> 0: no division anywhere."""
    return Composite("attnlrp", BASE)


def cp_lrp() -> Composite:
    """CP-LRP (Ali et al., ICML 2022): attention maps and gates are constants, everything flows to the values."""
    gates = (on(OpClass.ACTIVATION, OpClass.NONLINEAR, where=gates_a_product), Stop())
    return Composite("cp_lrp", (*VALUES_ONLY, gates, *BASE))


def mamba_lrp() -> Composite:
    """MambaLRP (Jafari et al., NeurIPS 2024): A, B, C and Delta of state-space models constant, gates shared evenly.

    Attention of hybrid models is held constant likewise.
    """
    return Composite("mamba_lrp", (*VALUES_ONLY, *BASE))


ANY_LINEAR = on(OpClass.LINEAR)


def epsilon(epsilon: float = 0.0) -> Composite:
    """The epsilon rule on linear maps and convolutions; 0 is its limit, which needs no activation (LRP-0)."""
    if epsilon == 0:
        return Composite("epsilon", BASE)
    return Composite("epsilon", ((ANY_LINEAR, Epsilon(epsilon=epsilon)), *BASE))


def input_x_gradient() -> Composite:
    """Input times the ordinary gradient, every op by its own derivative."""
    return Composite("input_x_gradient", ((on(), Gradient()),), patterns=False)


def gradient() -> Composite:
    """The ordinary gradient; results are coefficients, not multiplied by the input."""
    return Composite("gradient", ((on(), Gradient()),), readout="coefficient", patterns=False)


def is_real(op: Operation) -> bool:
    """Whether an op has to do with real numbers alone: complex ones have no sign to split by."""
    return not op.is_complex


def is_convolution(op: Operation) -> bool:
    """Whether a linear op is a convolution of real numbers, transposed or not."""
    return op.linear_name.startswith("aten::conv") and is_real(op)


CONVOLUTION = on(OpClass.LINEAR, where=is_convolution)
FIRST_CONVOLUTION = replace(CONVOLUTION, first=True)
LINEAR = on(OpClass.LINEAR, where=is_real)
FIRST_LINEAR = replace(LINEAR, first=True)
RELU = on(target="aten::relu")


def pa_lrp() -> Composite:
    """PA-LRP (Bakish et al. 2025): AttnLRP with the shares of positions kept as sinks, per token.

    ``lrp_compiler.positional_relevance`` adds them to the tokens' relevance.
    """
    lines: Lines = ((on(where=is_rotary), RotaryHalf()), (on(where=adds_position), PositionAdd()))
    return attnlrp().override(*lines, name="pa_lrp")


def attnlrp_gamma(conv: float = 0.25, linear: float = 0.05) -> Composite:
    """For vision transformers: gamma on convolutions and dense layers, CP-LRP inside attention (LXT's ViT)."""
    lines: Lines = ((CONVOLUTION, Gamma(gamma=conv)), (LINEAR, Gamma(gamma=linear)))
    return cp_lrp().override(*lines, name="attnlrp_gamma")


def relp() -> Composite:
    """RelP's default rules: LN-rule, identity, half for products of values; attention by its ordinary gradient."""
    by_gradient = on(OpClass.ATTENTION, OpClass.LINEAR_ATTENTION, OpClass.SOFTMAX, OpClass.BILINEAR)
    return attnlrp().override((by_gradient, Gradient()), name="relp")


def is_sum(op: Operation) -> bool:
    """Whether a reduction is a sum or mean."""
    return op_name(op.node) in ("aten::sum", "aten::mean")


def dynamiclrp() -> Composite:
    """DynamicLRP's rules: absolute-ratio sums and products, credited biases, identity at activations and norms.

    The rules of the paper, without the published engine's deviations (RULES.md 7.14).
    """
    sums = on(OpClass.REDUCTION, where=is_sum)
    lines: Lines = (
        (LINEAR, CreditedBias()),
        (on(OpClass.ADD), AbsoluteAdd()),
        (on(OpClass.MULTIPLY), AbsoluteMultiply()),
        (sums, AbsoluteSum()),
        (on(OpClass.NORM, OpClass.RMS_NORM, OpClass.BATCH_NORM), NormIdentity()),
    )
    return Composite("dynamiclrp", (*lines, *BASE))


def bcos() -> Composite:
    """B-cos networks (Boehle et al. 2022, 2024) in explanation mode: the alignment |cos|^(B-1) of a unit is a constant.

    What a unit is scaled by comes from absolute values, norms and attention maps of its inputs, none of which gets
    relevance; what remains is the dynamic linear map, so a network without biases conserves exactly.
    """
    absolute = (on(target="aten::abs"), Stop())
    return cp_lrp().override(absolute, name="bcos")


def has_offset_gate(op: Operation) -> bool:
    """Whether an op is f(0) + x g(x) with a known g."""
    return op_name(op.node) in OFFSET_GATES


def linear_interpreter() -> Composite:
    """LinearScope (1908.05168): what is not linear is frozen, y = W(x) x + r; results are rows of W, not products.

    Gates, norm statistics, indices and attention maps are constants; ``tape.linearised()`` has rows, columns and r.
    """
    line = (on(OpClass.NONLINEAR, where=has_offset_gate), OffsetGate())
    frozen = cp_lrp().override(line, name="linear_interpreter")
    return replace(frozen, readout="coefficient")


def pattern_composite(name: str, rule: PatternSite) -> Composite:
    """``rule`` on linear maps, gates and movement applied to relevance; sums and products as in LRP."""
    moves = on(OpClass.MOVEMENT, OpClass.SELECTION, OpClass.REDUCTION, OpClass.TUPLE)
    lines: Lines = ((LINEAR, rule), (RELU, OnRelevance(Identity())), (moves, OnRelevance(Plain())))
    return Composite(name, (*lines, *BASE), conserves=False)


def pattern_net(patterns: Mapping[str, Tensor] | None = None) -> Composite:
    """PatternNet: the signal in the input, by ``patterns`` from ``lrp_compiler.fit_patterns``."""
    signal = (on(OpClass.ADD), OnRelevance(Plain()))
    return pattern_composite("pattern_net", PatternNet(patterns or {})).override(signal, name="pattern_net")


def pattern_attribution(patterns: Mapping[str, Tensor] | None = None) -> Composite:
    """PatternAttribution: each input's share in the signal, by ``patterns`` from ``lrp_compiler.fit_patterns``."""
    return pattern_composite("pattern_attribution", PatternAttribution(patterns or {}))


def excitation_pullback(temperature: float = 0.3) -> Composite:
    """The gradient with ReLU gates softened to sigmoid(x / T) and max-pools to softmax of temperature T."""
    lines: Lines = (
        (RELU, BetaSmooth(beta=1 / temperature)),
        (on(target="aten::max_pool2d_with_indices"), SoftMaxPool(temperature=temperature)),
    )
    return replace(gradient().override(*lines, name="excitation_pullback"), conserves=False)


def epsilon_gamma_box(low: Bound = -3.0, high: Bound = 3.0, epsilon: float = 1e-6, gamma: float = 0.25) -> Composite:
    """zennit's EpsilonGammaBox: z-box on the first convolution, gamma on the others, epsilon on dense layers.

    ``low`` and ``high`` bound the input: numbers, tuples of one number per channel, or tensors that broadcast to it;
    -3 and 3 suit images normalised by mean and deviation.
    """
    lines: Lines = (
        (FIRST_CONVOLUTION, ZBox(low=low, high=high)),
        (CONVOLUTION, Gamma(gamma=gamma)),
        (ANY_LINEAR, Epsilon(epsilon=epsilon)),
    )
    return Composite("epsilon_gamma_box", (*lines, *BASE))


def epsilon_plus(epsilon: float = 1e-6) -> Composite:
    """zennit's EpsilonPlus: z+ on convolutions, epsilon on dense layers."""
    return Composite("epsilon_plus", ((CONVOLUTION, ZPlus()), (ANY_LINEAR, Epsilon(epsilon=epsilon)), *BASE))


def epsilon_plus_flat(epsilon: float = 1e-6) -> Composite:
    """zennit's EpsilonPlusFlat: as epsilon_plus, flat on the first layer."""
    return replace(epsilon_plus(epsilon).override((FIRST_LINEAR, Flat())), name="epsilon_plus_flat")


def epsilon_alpha2_beta1(epsilon: float = 1e-6) -> Composite:
    """zennit's EpsilonAlpha2Beta1: alpha-beta (2, 1) on convolutions, epsilon on dense layers."""
    lines: Lines = ((CONVOLUTION, AlphaBeta(alpha=2.0, beta=1.0)), (ANY_LINEAR, Epsilon(epsilon=epsilon)))
    return Composite("epsilon_alpha2_beta1", (*lines, *BASE))


def epsilon_alpha2_beta1_flat(epsilon: float = 1e-6) -> Composite:
    """zennit's EpsilonAlpha2Beta1Flat: as epsilon_alpha2_beta1, flat on the first layer."""
    return replace(epsilon_alpha2_beta1(epsilon).override((FIRST_LINEAR, Flat())), name="epsilon_alpha2_beta1_flat")


def excitation_backprop() -> Composite:
    """zennit's ExcitationBackprop: z+ on every linear map (Zhang et al. 2016)."""
    return Composite("excitation_backprop", ((LINEAR, ZPlus()), *BASE))


def deconvnet() -> Composite:
    """DeconvNet: the gradient with ReLUs that keep positive signals, whatever their input."""
    return replace(gradient().override((RELU, DeconvNet()), name="deconvnet"), conserves=False)


def guided_backprop() -> Composite:
    """Guided backpropagation: the gradient with ReLUs that keep positive signals of active units."""
    return replace(gradient().override((RELU, GuidedBackprop()), name="guided_backprop"), conserves=False)


def beta_smooth(beta: float = 10.0) -> Composite:
    """The gradient with ReLU smoothed to a softplus of sharpness ``beta``."""
    return replace(gradient().override((RELU, BetaSmooth(beta=beta)), name="beta_smooth"), conserves=False)


def deep_lift() -> Composite:
    """DeepLIFT's rescale rule (Shrikumar et al., ICML 2017): what makes the output differ from a reference run's.

    Needs a reference run: ``baselines`` of ``run`` and ``attribute``, zeros where none are given. Products, quotients,
    norms, softmax and attention have exact rules too; an op without one is refused.
    """
    affine = on(OpClass.ADD, OpClass.MOVEMENT, OpClass.REDUCTION, OpClass.TUPLE, where=varies_in_values)
    norms = on(OpClass.NORM, OpClass.RMS_NORM, OpClass.BATCH_NORM, where=varies_in_input)
    lines: Lines = (
        (on(OpClass.LINEAR, OpClass.BILINEAR, OpClass.MULTIPLY, where=varies_in_values), Midpoint()),
        (affine, Transpose()),
        (on(where=is_quotient), Quotient()),
        (on(where=is_elementwise), Rescale()),
        (on(where=is_variance), Quadratic()),
        (on(where=is_root_of_squares), RootOfSquares()),
        (norms, NormDifference()),
        (on(where=is_max_pool), MaxPoolDifference()),
        (on(where=is_extreme), ExtremeDifference()),
        (on(OpClass.SOFTMAX, where=varies_in_input), SoftmaxDifference()),
        (on(where=is_log_sum_exp), SoftmaxDifference()),
        (on(OpClass.ATTENTION, where=attends_alike), AttentionDifference()),
    )
    return Composite("deep_lift", lines, against_reference=True)


COMPOSITES: dict[str, Callable[[], Composite]] = {
    "attnlrp": attnlrp,
    "cp_lrp": cp_lrp,
    "epsilon": epsilon,
    "mamba_lrp": mamba_lrp,
    "attnlrp_gamma": attnlrp_gamma,
    "relp": relp,
    "pa_lrp": pa_lrp,
    "dynamiclrp": dynamiclrp,
    "bcos": bcos,
    "linear_interpreter": linear_interpreter,
    "pattern_net": pattern_net,
    "pattern_attribution": pattern_attribution,
    "excitation_pullback": excitation_pullback,
    "epsilon_gamma_box": epsilon_gamma_box,
    "epsilon_plus": epsilon_plus,
    "epsilon_plus_flat": epsilon_plus_flat,
    "epsilon_alpha2_beta1": epsilon_alpha2_beta1,
    "epsilon_alpha2_beta1_flat": epsilon_alpha2_beta1_flat,
    "excitation_backprop": excitation_backprop,
    "deconvnet": deconvnet,
    "guided_backprop": guided_backprop,
    "beta_smooth": beta_smooth,
    "input_x_gradient": input_x_gradient,
    "gradient": gradient,
    "deep_lift": deep_lift,
}
"""Composite names as compile_for_lrp takes them."""

AUTO = "auto"


def composite_named(name: str) -> Composite:
    """The composite called ``name``; raises UnknownCompositeError."""
    if name not in COMPOSITES:
        raise UnknownCompositeError(name=name, known=", ".join([AUTO, *COMPOSITES]))
    return COMPOSITES[name]()


def choose_composite(program: Program) -> Composite:
    """What "auto" means for a graph; ``reason`` says what decided.

    mamba_lrp where there are state-space models, else attnlrp where values meet values, else epsilon.
    """
    counts: dict[str, int] = {}
    for node in forward_nodes_everywhere(program):
        if not facts(node).live or node.op != "call_function":
            continue
        entry = classify(node)
        if entry is None:
            continue
        live_operands = sum(facts(operand).live for operand in node.all_input_nodes)
        if entry.op_class in DECISIVE:
            kind = entry.op_class.value.replace("_", " ")
            counts[kind] = counts.get(kind, 0) + 1
        elif entry.op_class in (OpClass.LINEAR, OpClass.MULTIPLY) and entry.factors and live_operands > 1:
            counts["product of two live values"] = counts.get("product of two live values", 0) + 1
    states = {kind: counts[kind] for kind in ("scan", "state product") if kind in counts}
    found = ", ".join(f"{count} x {kind}" for kind, count in (states or counts).items())
    if states:
        return replace(mamba_lrp(), reason=f"the graph holds {found}")
    if counts:
        return replace(attnlrp(), reason=f"the graph holds {found}")
    return replace(epsilon(), reason="the graph holds no attention, softmax or product of two live values")


DECISIVE = (OpClass.ATTENTION, OpClass.SOFTMAX, OpClass.LINEAR_ATTENTION, OpClass.SCAN, OpClass.STATE_PRODUCT)
"""The classes of ops that "auto" looks for."""
