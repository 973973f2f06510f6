"""Kernels take in what stands right before or behind them: scales, weights and sums that then cost no pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from lrp_compiler.kernels.dialect.attention import ATTENTION_LRP_BWD
from lrp_compiler.kernels.dialect.epsilon_conv2d import EPSILON_CONV2D_BWD
from lrp_compiler.kernels.dialect.epsilon_linear import EPSILON_LINEAR_BWD
from lrp_compiler.kernels.dialect.norm import NORM_BWD
from lrp_compiler.kernels.dialect.signsplit_conv2d import SIGNSPLIT_CONV2D_BWD
from lrp_compiler.kernels.dialect.signsplit_linear import SIGNSPLIT_LINEAR_BWD
from lrp_compiler.kernels.registry import spec_of
from lrp_compiler.passes.fusing.attention_neighbours import take_in_scales, take_in_shared_heads
from lrp_compiler.passes.fusing.norm_neighbours import take_in_weight_and_sum
from lrp_compiler.passes.fusing.product_neighbours import take_in_activation, take_in_own_activation
from lrp_compiler.passes.program import Program

Absorber = Callable[[Program, fx.Node], None]

ABSORBERS: dict[str, tuple[Absorber, ...]] = {
    NORM_BWD.name: (take_in_weight_and_sum,),
    ATTENTION_LRP_BWD.name: (take_in_scales, take_in_shared_heads),
    SIGNSPLIT_LINEAR_BWD.name: (take_in_own_activation(x=2, flag=7),),
    SIGNSPLIT_CONV2D_BWD.name: (take_in_own_activation(x=2, flag=11),),
    EPSILON_LINEAR_BWD.name: (take_in_activation(x=4),),
    EPSILON_CONV2D_BWD.name: (take_in_activation(x=9),),
}
"""Op of the dialect -> what takes in its neighbours, one kind after the other."""


def take_in_neighbours(program: Program) -> None:
    """Let every call of a kernel take in what it can."""
    for node in list(program.graph.nodes):
        spec = spec_of(node.target)
        for absorb in ABSORBERS.get(spec.name, ()) if spec is not None else ():
            absorb(program, node)
