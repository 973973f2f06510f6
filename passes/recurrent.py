"""A recurrent op's coefficients as one emitted op, for its rule and its derivative alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from lrp_compiler.kernels.recurrent import recurrent_pullback
from lrp_compiler.passes.errors import RecurrentError
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.source_lines import user_source

if TYPE_CHECKING:
    from lrp_compiler.passes.site import Site

INPUT, STATES = 0, 1


def carried(op: Operation) -> tuple[Operand, ...]:
    """Input and initial states, in the order of their leaves: what relevance can go to, weights never."""
    return tuple(operand for operand in op.operands if operand.argument in (INPUT, STATES))


def is_cell(op: Operation) -> bool:
    """Whether a recurrent op makes one step only (nn.LSTMCell and its like)."""
    return op_name(op.node).endswith("_cell")


def has_biases(op: Operation) -> bool:
    """Whether a recurrent op adds biases."""
    return op.argument(4, "b_ih") is not None if is_cell(op) else bool(op.args[3])


def recurrent_edges(site: Site, edge: Any, gradient: bool) -> list[fx.Node]:
    """Coefficients of input and states, then the biases' share; raises RecurrentError for dropout between layers."""
    kind = op_name(site.node).removeprefix("aten::").removesuffix("_cell")
    if is_cell(site.op):
        return _cell_edges(site, kind, edge, gradient)
    x, states, params, _, layers, dropout, train, bidirectional, batch_first = site.op.args
    if dropout > 0 and train and layers > 1:
        raise RecurrentError(
            op=str(site.op),
            cause=f"its kernel hides the masks that its dropout of {dropout:g} between layers draws in training",
            remedy="Call model.eval(), or stack single-layer modules with nn.Dropout between them.",
            source=user_source(site.node),
        )
    arriving = [*edge, None][:3]
    values = (x, site.output(0), _listed(states), list(params), *arriving)
    made: list[fx.Node] = site.emit(recurrent_pullback, kind, gradient, *values, layers, bidirectional, batch_first)
    return made


def _cell_edges(site: Site, kind: str, edge: Any, gradient: bool) -> list[fx.Node]:
    op = site.op
    x, states, w_ih, w_hh = op.args[:4]
    params = [p for p in (w_ih, w_hh, op.argument(4, "b_ih"), op.argument(5, "b_hh")) if p is not None]
    output = site.output(0) if isinstance(edge, list) else site.node
    arriving = [*(edge if isinstance(edge, list) else [edge]), None][:2]
    values = (x, output, _listed(states), params, *arriving)
    return site.emit(step_pullback, kind, gradient, *values)  # type: ignore[no-any-return]


def step_pullback(
    kind: str, gradient: bool, x: Any, output: Any, states: list[Any], params: list[Any], c_h: Any, c_state: Any
) -> list[Any]:
    """One step as a sequence of length one: coefficients of input (B, F) and states (B, H), bias share (1, B, H)."""
    lifted = [None if value is None else value.unsqueeze(0) for value in (x, output, c_h, c_state)]
    initial = [state.unsqueeze(0) for state in states]
    made = recurrent_pullback(kind, gradient, *lifted[:2], initial, params, None, *lifted[2:], 1, False, False)
    return [*(c.squeeze(0) for c in made[:-1]), made[-1]]


def _listed(states: Any) -> list[Any]:
    return list(states) if isinstance(states, (list, tuple)) else [states]
