"""Rules and matchers by name, to build and change composites with."""

from lrp_compiler.passes.optable import OpClass
from lrp_compiler.passes.rules.attention import Attention, AttentionValueOnly
from lrp_compiler.passes.rules.base import Matcher, Rule, on
from lrp_compiler.passes.rules.elementwise import (
    BetaSmooth,
    DeconvNet,
    GuidedBackprop,
    Identity,
    IdentityRelevance,
    OffsetGate,
)
from lrp_compiler.passes.rules.filter import TopRelevance
from lrp_compiler.passes.rules.gradient import Gradient
from lrp_compiler.passes.rules.norm import BatchNorm, LayerNorm, RMSNorm, SoftmaxGradient
from lrp_compiler.passes.rules.pattern import OnRelevance, PatternAttribution, PatternNet
from lrp_compiler.passes.rules.plain import Epsilon, Plain, Stop
from lrp_compiler.passes.rules.product import Numerator, Uniform
from lrp_compiler.passes.rules.recurrent import Recurrent
from lrp_compiler.passes.rules.scan import SelectiveScan, SignalTakesAll
from lrp_compiler.passes.rules.signsplit import AlphaBeta, Gamma, ZPlus
from lrp_compiler.passes.rules.terminal import Flat, WSquare, ZBox

__all__ = [
    "AlphaBeta",
    "Attention",
    "AttentionValueOnly",
    "BatchNorm",
    "BetaSmooth",
    "DeconvNet",
    "Epsilon",
    "Flat",
    "Gamma",
    "Gradient",
    "GuidedBackprop",
    "Identity",
    "IdentityRelevance",
    "LayerNorm",
    "Matcher",
    "Numerator",
    "OffsetGate",
    "OnRelevance",
    "OpClass",
    "PatternAttribution",
    "PatternNet",
    "Plain",
    "RMSNorm",
    "Recurrent",
    "Rule",
    "SelectiveScan",
    "SignalTakesAll",
    "SoftmaxGradient",
    "Stop",
    "TopRelevance",
    "Uniform",
    "WSquare",
    "ZBox",
    "ZPlus",
    "on",
]
