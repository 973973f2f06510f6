"""The table of the relevance dialect: every op that has a kernel."""

from __future__ import annotations

from lrp_compiler.kernels.dialect.embedding import EMBEDDING_RELEVANCE, TOKEN_RELEVANCE
from lrp_compiler.kernels.dialect.norm import NORM_BWD
from lrp_compiler.kernels.dialect.pooling import MAXPOOL_BWD
from lrp_compiler.kernels.dialect.topk import TOPK_FILTER
from lrp_compiler.kernels.spec import KernelSpec

DIALECT: tuple[KernelSpec, ...] = (NORM_BWD, MAXPOOL_BWD, EMBEDDING_RELEVANCE, TOKEN_RELEVANCE, TOPK_FILTER)


def spec_named(name: str) -> KernelSpec:
    """The spec of ``lrp::<name>``; KeyError for none."""
    return {spec.name: spec for spec in DIALECT}[name]
