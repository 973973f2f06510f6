"""A graph compiler that explains neural networks by Layer-wise Relevance Propagation."""

from lrp_compiler import composites, errors, rules, seeds
from lrp_compiler.api import compile_for_lrp
from lrp_compiler.coverage import Coverage
from lrp_compiler.ledger import Ledger
from lrp_compiler.module import LRPModule
from lrp_compiler.passes.rules.base import Composite
from lrp_compiler.patching import patch_edge_effects, patch_effects, true_patch_effects
from lrp_compiler.patterns import fit_patterns
from lrp_compiler.positions import positional_relevance
from lrp_compiler.registry import register_rule
from lrp_compiler.report import Report
from lrp_compiler.seeds import Contrast, Token
from lrp_compiler.tape import Tape

__all__ = [
    "Composite",
    "Contrast",
    "Coverage",
    "LRPModule",
    "Ledger",
    "Report",
    "Tape",
    "Token",
    "compile_for_lrp",
    "composites",
    "errors",
    "fit_patterns",
    "patch_edge_effects",
    "patch_effects",
    "positional_relevance",
    "register_rule",
    "rules",
    "seeds",
    "true_patch_effects",
]
