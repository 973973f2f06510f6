"""Rules and matchers by name, to build and change composites with."""

from lrp_compiler.passes.optable import OpClass
from lrp_compiler.passes.rules.attention import Attention, AttentionValueOnly
from lrp_compiler.passes.rules.base import Matcher, Rule, on
from lrp_compiler.passes.rules.elementwise import Identity, IdentityRelevance
from lrp_compiler.passes.rules.gradient import Gradient
from lrp_compiler.passes.rules.norm import BatchNorm, LayerNorm, RMSNorm, SoftmaxGradient
from lrp_compiler.passes.rules.plain import Epsilon, Plain, Stop
from lrp_compiler.passes.rules.product import Numerator, Uniform

__all__ = [
    "Attention",
    "AttentionValueOnly",
    "BatchNorm",
    "Epsilon",
    "Gradient",
    "Identity",
    "IdentityRelevance",
    "LayerNorm",
    "Matcher",
    "Numerator",
    "OpClass",
    "Plain",
    "RMSNorm",
    "Rule",
    "SoftmaxGradient",
    "Stop",
    "Uniform",
    "on",
]
