"""Composites by name: which rule each class of op gets (RULES.md sections 5.1 to 5.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lrp_compiler.passes.errors import UnknownCompositeError
from lrp_compiler.passes.operation import Operation, gates_a_product
from lrp_compiler.passes.optable import OpClass, classify
from lrp_compiler.passes.program import Program, facts, forward_nodes
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
)
from lrp_compiler.passes.rules.gradient import Gradient
from lrp_compiler.passes.rules.norm import BatchNorm, LayerNorm, RMSNorm, SoftmaxGradient
from lrp_compiler.passes.rules.plain import Epsilon, Plain, Stop
from lrp_compiler.passes.rules.product import Numerator, Uniform
from lrp_compiler.passes.rules.pullback import SoftMaxPool
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
)


def attnlrp() -> Composite:
    """AttnLRP (Achtibat et al., ICML 2024) with epsilon -> 0: no division anywhere."""
    return Composite("attnlrp", BASE)


def cp_lrp() -> Composite:
    """CP-LRP (Ali et al., ICML 2022): attention maps and gates are constants, everything flows to the values."""
    lines: Lines = (
        (on(OpClass.SOFTMAX), Stop()),
        (on(OpClass.ATTENTION), AttentionValueOnly()),
        (on(OpClass.ACTIVATION, OpClass.NONLINEAR, where=gates_a_product), Stop()),
    )
    return Composite("cp_lrp", (*lines, *BASE))


def epsilon(epsilon: float = 0.0) -> Composite:
    """The epsilon rule on linear maps and convolutions; 0 is its limit, which needs no activation (LRP-0)."""
    if epsilon == 0:
        return Composite("epsilon", BASE)
    return Composite("epsilon", ((on(OpClass.LINEAR), Epsilon(epsilon=epsilon)), *BASE))


def input_x_gradient() -> Composite:
    """Input times the ordinary gradient, every op by its own derivative."""
    return Composite("input_x_gradient", ((on(), Gradient()),), patterns=False)


def gradient() -> Composite:
    """The ordinary gradient; results are coefficients, not multiplied by the input."""
    return Composite("gradient", ((on(), Gradient()),), readout="coefficient", patterns=False)


def is_convolution(op: Operation) -> bool:
    """Whether a linear op is a convolution, transposed or not."""
    return op.linear_name.startswith("aten::conv")


CONVOLUTION = on(OpClass.LINEAR, where=is_convolution)
FIRST_CONVOLUTION = replace(CONVOLUTION, first=True)
LINEAR = on(OpClass.LINEAR)
FIRST_LINEAR = replace(LINEAR, first=True)
RELU = on(target="aten::relu")


def attnlrp_gamma(conv: float = 0.25, linear: float = 0.05) -> Composite:
    """For vision transformers: gamma on convolutions and dense layers, CP-LRP inside attention (LXT's ViT)."""
    lines: Lines = ((CONVOLUTION, Gamma(gamma=conv)), (LINEAR, Gamma(gamma=linear)))
    return cp_lrp().override(*lines, name="attnlrp_gamma")


def relp() -> Composite:
    """RelP's default rules: LN-rule, identity, half for products of values; attention by its ordinary gradient."""
    return attnlrp().override((on(OpClass.ATTENTION, OpClass.SOFTMAX, OpClass.BILINEAR), Gradient()), name="relp")


def dynamiclrp() -> Composite:
    """DynamicLRP's rules: absolute-ratio sums and products, credited biases, identity at activations and norms.

    The rules of the paper, without the published engine's deviations (RULES.md 7.14).
    """
    sums = on(OpClass.REDUCTION, where=lambda op: op.linear_name in ("aten::sum", "aten::mean"))
    lines: Lines = (
        (LINEAR, CreditedBias()),
        (on(OpClass.ADD), AbsoluteAdd()),
        (on(OpClass.MULTIPLY), AbsoluteMultiply()),
        (sums, AbsoluteSum()),
        (on(OpClass.NORM, OpClass.RMS_NORM, OpClass.BATCH_NORM), NormIdentity()),
    )
    return Composite("dynamiclrp", (*lines, *BASE))


def excitation_pullback(temperature: float = 0.3) -> Composite:
    """The gradient with ReLU gates softened to sigmoid(x / T) and max-pools to softmax of temperature T."""
    lines: Lines = (
        (RELU, BetaSmooth(beta=1 / temperature)),
        (on(target="aten::max_pool2d_with_indices"), SoftMaxPool(temperature=temperature)),
    )
    return gradient().override(*lines, name="excitation_pullback")


def epsilon_gamma_box(low: Bound = -3.0, high: Bound = 3.0, epsilon: float = 1e-6, gamma: float = 0.25) -> Composite:
    """zennit's EpsilonGammaBox: z-box on the first convolution, gamma on the others, epsilon on dense layers.

    ``low`` and ``high`` bound the input, in all or per channel (a tuple); -3 and 3 suit images normalised by mean and
    deviation.
    """
    lines: Lines = (
        (FIRST_CONVOLUTION, ZBox(low=low, high=high)),
        (CONVOLUTION, Gamma(gamma=gamma)),
        (LINEAR, Epsilon(epsilon=epsilon)),
    )
    return Composite("epsilon_gamma_box", (*lines, *BASE))


def epsilon_plus(epsilon: float = 1e-6) -> Composite:
    """zennit's EpsilonPlus: z+ on convolutions, epsilon on dense layers."""
    return Composite("epsilon_plus", ((CONVOLUTION, ZPlus()), (LINEAR, Epsilon(epsilon=epsilon)), *BASE))


def epsilon_plus_flat(epsilon: float = 1e-6) -> Composite:
    """zennit's EpsilonPlusFlat: as epsilon_plus, flat on the first layer."""
    return replace(epsilon_plus(epsilon).override((FIRST_LINEAR, Flat())), name="epsilon_plus_flat")


def epsilon_alpha2_beta1(epsilon: float = 1e-6) -> Composite:
    """zennit's EpsilonAlpha2Beta1: alpha-beta (2, 1) on convolutions, epsilon on dense layers."""
    lines: Lines = ((CONVOLUTION, AlphaBeta(alpha=2.0, beta=1.0)), (LINEAR, Epsilon(epsilon=epsilon)))
    return Composite("epsilon_alpha2_beta1", (*lines, *BASE))


def epsilon_alpha2_beta1_flat(epsilon: float = 1e-6) -> Composite:
    """zennit's EpsilonAlpha2Beta1Flat: as epsilon_alpha2_beta1, flat on the first layer."""
    return replace(epsilon_alpha2_beta1(epsilon).override((FIRST_LINEAR, Flat())), name="epsilon_alpha2_beta1_flat")


def excitation_backprop() -> Composite:
    """zennit's ExcitationBackprop: z+ on every linear map (Zhang et al. 2016)."""
    return Composite("excitation_backprop", ((LINEAR, ZPlus()), *BASE))


def deconvnet() -> Composite:
    """DeconvNet: the gradient with ReLUs that keep positive signals, whatever their input."""
    return gradient().override((RELU, DeconvNet()), name="deconvnet")


def guided_backprop() -> Composite:
    """Guided backpropagation: the gradient with ReLUs that keep positive signals of active units."""
    return gradient().override((RELU, GuidedBackprop()), name="guided_backprop")


def beta_smooth(beta: float = 10.0) -> Composite:
    """The gradient with ReLU smoothed to a softplus of sharpness ``beta``."""
    return gradient().override((RELU, BetaSmooth(beta=beta)), name="beta_smooth")


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
    "attnlrp_gamma": attnlrp_gamma,
    "relp": relp,
    "dynamiclrp": dynamiclrp,
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
    """What "auto" means for a graph: attnlrp where values meet values, else epsilon; ``reason`` says which."""
    counts: dict[str, int] = {}
    for node in forward_nodes(program):
        if not facts(node).live or node.op != "call_function":
            continue
        entry = classify(node)
        if entry is None:
            continue
        live_operands = sum(facts(operand).live for operand in node.all_input_nodes)
        if entry.op_class in (OpClass.ATTENTION, OpClass.SOFTMAX):
            counts[entry.op_class.value] = counts.get(entry.op_class.value, 0) + 1
        elif entry.op_class in (OpClass.LINEAR, OpClass.MULTIPLY) and entry.factors and live_operands > 1:
            counts["product of two live values"] = counts.get("product of two live values", 0) + 1
    if counts:
        found = ", ".join(f"{count} x {kind}" for kind, count in counts.items())
        return replace(attnlrp(), reason=f"the graph holds {found}")
    return replace(epsilon(), reason="the graph holds no attention, softmax or product of two live values")
