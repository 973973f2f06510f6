"""Composites by name: which rule each class of op gets (RULES.md sections 5.1 to 5.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lrp_compiler.passes.errors import UnknownCompositeError
from lrp_compiler.passes.operation import gates_a_product
from lrp_compiler.passes.optable import OpClass, classify
from lrp_compiler.passes.program import Program, facts, forward_nodes
from lrp_compiler.passes.rules.attention import Attention, AttentionValueOnly
from lrp_compiler.passes.rules.base import Composite, Matcher, Rule, on
from lrp_compiler.passes.rules.elementwise import Identity, IdentityRelevance
from lrp_compiler.passes.rules.gradient import Gradient
from lrp_compiler.passes.rules.norm import BatchNorm, LayerNorm, RMSNorm, SoftmaxGradient
from lrp_compiler.passes.rules.plain import Epsilon, Plain, Stop
from lrp_compiler.passes.rules.product import Numerator, Uniform

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


COMPOSITES: dict[str, Callable[[], Composite]] = {
    "attnlrp": attnlrp,
    "cp_lrp": cp_lrp,
    "epsilon": epsilon,
    "input_x_gradient": input_x_gradient,
    "gradient": gradient,
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
