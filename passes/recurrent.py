"""A recurrent op's coefficients as one emitted op, for its rule and its derivative alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from lrp_compiler.kernels.recurrent import recurrent_pullback
from lrp_compiler.passes.errors import RecurrentError, user_source
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.optable import op_name

if TYPE_CHECKING:
    from lrp_compiler.passes.site import Site

INPUT, STATES = 0, 1


def carried(op: Operation) -> tuple[Operand, ...]:
    """Input and initial states, in the order of their leaves: what relevance can go to, weights never."""
    return tuple(operand for operand in op.operands if operand.argument in (INPUT, STATES))


def recurrent_edges(site: Site, edge: list[fx.Node | None], gradient: bool) -> list[fx.Node]:
    """Coefficients of input and states, then the biases' share; raises RecurrentError for dropout between layers."""
    x, states, params, _, layers, dropout, train, bidirectional, batch_first = site.op.args
    if dropout > 0 and train and layers > 1:
        raise RecurrentError(
            op=str(site.op),
            cause=f"its kernel hides the masks that its dropout of {dropout:g} between layers draws in training",
            remedy="Call model.eval(), or stack single-layer modules with nn.Dropout between them.",
            source=user_source(site.node),
        )
    initial = list(states) if isinstance(states, (list, tuple)) else [states]
    arriving = [*edge, None][:3]
    values = (x, site.output(0), initial, list(params), *arriving)
    kind = op_name(site.node).removeprefix("aten::")
    made: list[fx.Node] = site.emit(recurrent_pullback, kind, gradient, *values, layers, bidirectional, batch_first)
    return made
