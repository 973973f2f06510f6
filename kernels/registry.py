"""The table of the relevance dialect: every op that has a kernel."""

from __future__ import annotations

from typing import Any

from lrp_compiler.kernels.dialect.elementwise import ELEMENTWISE_CHAIN
from lrp_compiler.kernels.dialect.gated_mlp import GATED_MLP_BWD
from lrp_compiler.kernels.dialect.norm import NORM_BWD
from lrp_compiler.kernels.dialect.rope import ROPE_BWD
from lrp_compiler.kernels.dialect.softmax import SOFTMAX_BWD
from lrp_compiler.kernels.spec import KernelSpec

DIALECT: tuple[KernelSpec, ...] = (NORM_BWD, GATED_MLP_BWD, SOFTMAX_BWD, ROPE_BWD, ELEMENTWISE_CHAIN)


def spec_named(name: str) -> KernelSpec:
    """The spec of ``lrp::<name>``; KeyError for none."""
    return {spec.name: spec for spec in DIALECT}[name]


def spec_of(target: Any) -> KernelSpec | None:
    """The spec of a call target of a graph; None for what is no op of the dialect."""
    schema = getattr(target, "_schema", None)
    name = str(getattr(schema, "name", ""))
    return next((spec for spec in DIALECT if name == f"lrp::{spec.name}"), None)
