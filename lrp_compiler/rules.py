"""Rules and matchers by name, to build and change composites with."""

from lrp_compiler.passes.optable import OpClass
from lrp_compiler.passes.rules.attention import Attention, AttentionValueOnly
from lrp_compiler.passes.rules.base import Matcher, Rule, on
from lrp_compiler.passes.rules.difference import (
    AttentionDifference,
    DifferenceRule,
    ExtremeDifference,
    MaxPoolDifference,
    Midpoint,
    NormalisedRescale,
    NormDifference,
    Quadratic,
    Quotient,
    Rescale,
    RootOfSquares,
    SoftmaxDifference,
    Transpose,
)
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
from lrp_compiler.passes.rules.routing import ConstantRouter
from lrp_compiler.passes.rules.scan import SelectiveScan, SignalTakesAll
from lrp_compiler.passes.rules.signsplit import AlphaBeta, Gamma, ZPlus
from lrp_compiler.passes.rules.terminal import Flat, WSquare, ZBox

__all__ = [
    "AlphaBeta",
    "Attention",
    "AttentionDifference",
    "AttentionValueOnly",
    "BatchNorm",
    "BetaSmooth",
    "ConstantRouter",
    "DeconvNet",
    "DifferenceRule",
    "Epsilon",
    "ExtremeDifference",
    "Flat",
    "Gamma",
    "Gradient",
    "GuidedBackprop",
    "Identity",
    "IdentityRelevance",
    "LayerNorm",
    "Matcher",
    "MaxPoolDifference",
    "Midpoint",
    "NormDifference",
    "NormalisedRescale",
    "Numerator",
    "OffsetGate",
    "OnRelevance",
    "OpClass",
    "PatternAttribution",
    "PatternNet",
    "Plain",
    "Quadratic",
    "Quotient",
    "RMSNorm",
    "Recurrent",
    "Rescale",
    "RootOfSquares",
    "Rule",
    "SelectiveScan",
    "SignalTakesAll",
    "SoftmaxDifference",
    "SoftmaxGradient",
    "Stop",
    "TopRelevance",
    "Transpose",
    "Uniform",
    "WSquare",
    "ZBox",
    "ZPlus",
    "on",
]
