"""The table of the relevance dialect: every op that has a kernel."""

from __future__ import annotations

from lrp_compiler.kernels.dialect.attention import ATTENTION_LRP_BWD
from lrp_compiler.kernels.dialect.attention_map import ATTENTION_LRP_HEADS, ATTENTION_LRP_MAP
from lrp_compiler.kernels.dialect.norm import NORM_BWD
from lrp_compiler.kernels.spec import KernelSpec

DIALECT: tuple[KernelSpec, ...] = (
    NORM_BWD,
    ATTENTION_LRP_BWD,
    ATTENTION_LRP_MAP,
    ATTENTION_LRP_HEADS,
)


def spec_named(name: str) -> KernelSpec:
    """The spec of ``lrp::<name>``; KeyError for none."""
    return {spec.name: spec for spec in DIALECT}[name]
