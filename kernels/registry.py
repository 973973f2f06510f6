"""The table of the relevance dialect: every op that has a kernel."""

from __future__ import annotations

from lrp_compiler.kernels.dialect.epsilon_conv2d import EPSILON_CONV2D_BWD
from lrp_compiler.kernels.dialect.epsilon_linear import EPSILON_LINEAR_BWD
from lrp_compiler.kernels.dialect.norm import NORM_BWD
from lrp_compiler.kernels.dialect.signsplit_conv2d import SIGNSPLIT_CONV2D_BWD, SIGNSPLIT_CONV2D_FWD
from lrp_compiler.kernels.dialect.signsplit_linear import SIGNSPLIT_LINEAR_BWD, SIGNSPLIT_LINEAR_FWD
from lrp_compiler.kernels.spec import KernelSpec

DIALECT: tuple[KernelSpec, ...] = (
    NORM_BWD,
    SIGNSPLIT_LINEAR_FWD,
    SIGNSPLIT_LINEAR_BWD,
    EPSILON_LINEAR_BWD,
    SIGNSPLIT_CONV2D_FWD,
    SIGNSPLIT_CONV2D_BWD,
    EPSILON_CONV2D_BWD,
)


def spec_named(name: str) -> KernelSpec:
    """The spec of ``lrp::<name>``; KeyError for none."""
    return {spec.name: spec for spec in DIALECT}[name]
