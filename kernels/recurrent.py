"""Coefficients through nn.LSTM, nn.GRU and nn.RNN: one op per module, the loop over time inside (RULES.md 1.8).

With its gates held constant a time step is a linear map, and so it is in its derivative; the two differ in the factors
of ``Steps`` alone. Everything is time-first here; coefficients may have further dimensions in front, one per vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lrp_compiler.kernels import gates

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""How many blocks of rows the weights of each kind have."""


@dataclass(frozen=True)
class Cell:
    """The weights of one direction of one layer; ``projection`` (P, H) is that of an LSTM with proj_size."""

    kind: str
    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None
    projection: Tensor | None

    def terms(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """(W x + b_ih, U h + b_hh), both (T, B, gates, H), from ``x`` (T, B, F) and the outputs before each step."""
        shape = (*x.shape[:2], GATES[self.kind], self.hidden.shape[0] // GATES[self.kind])
        given = F.linear(x, self.input, self.input_bias)
        recurrent = F.linear(before, self.hidden, self.hidden_bias)
        return given.reshape(shape), recurrent.reshape(shape)


def cells_of(kind: str, params: Sequence[Tensor], count: int) -> list[Cell]:
    """The flat list of weights that torch's recurrent ops take, cell by cell."""
    each = len(params) // count
    projected = each % 2
    found = []
    for start in range(0, len(params), each):
        own = list(params[start : start + each])
        projection = own.pop() if projected else None
        input_bias, hidden_bias = (own[2], own[3]) if len(own) > 2 else (None, None)
        found.append(Cell(kind, own[0], own[1], input_bias, hidden_bias, projection))
    return found


@dataclass(frozen=True)
class Steps:
    """The factors of every time step, from its output back to its pre-activations and to the step before.

    ``rise`` (T, B, H) leads from the output to the state, ``keep`` (T, B, H) on to the state before; ``on_state``
    (T, B, n, H) and ``on_output`` (T, B, m, H) lead to the pre-activations of n + m gates, whose rows of the weights
    are ``rows``; ``reset`` (T, B, n + m, H) further scales what goes to the recurrent side. In a GRU the output is the
    state, in a plain RNN nothing is kept.
    """

    rise: Tensor
    keep: Tensor
    on_state: Tensor
    on_output: Tensor
    reset: Tensor | None
    rows: slice


def _none(like: Tensor) -> Tensor:
    """No gates: (T, B, 0, H)."""
    return like.new_empty((*like.shape[:-1], 0, like.shape[-1]))


def _derivative(gate: Tensor) -> Tensor:
    """The derivative of a sigmoid from its value."""
    return gate * (1 - gate)


def lstm_steps(cell: Cell, x: Tensor, before: Tensor, after: Tensor, first: Tensor, gradient: bool) -> Steps:
    """Gates i, f, o stop and both tanh follow the identity rule (Arras et al. 2017), or the derivative."""
    given, recurrent = cell.terms(x, before)
    on_i, on_f, p, on_o = (given + recurrent).unbind(2)
    i, f, o, g = on_i.sigmoid(), on_f.sigmoid(), on_o.sigmoid(), p.tanh()
    states = [first]
    for keep, new in zip(f, i * g, strict=True):
        states.append(keep * states[-1] + new)
    previous, state = torch.stack(states[:-1]), torch.stack(states[1:])
    if not gradient:
        size = p.shape[-1]
        on_state = (i * gates.tanh(p)).unsqueeze(2)
        return Steps(o * gates.tanh(state), f, on_state, _none(f), None, slice(2 * size, 3 * size))
    squashed = state.tanh()
    on_state = torch.stack([g * _derivative(i), previous * _derivative(f), i * (1 - g * g)], 2)
    on_output = (squashed * _derivative(o)).unsqueeze(2)
    return Steps(o * (1 - squashed * squashed), f, on_state, on_output, None, slice(None))


def gru_steps(cell: Cell, x: Tensor, before: Tensor, after: Tensor, first: Tensor, gradient: bool) -> Steps:
    """Gates r and z stop and tanh follows the identity rule, or the derivative."""
    given, recurrent = cell.terms(x, before)
    r = (given[:, :, 0] + recurrent[:, :, 0]).sigmoid()
    z = (given[:, :, 1] + recurrent[:, :, 1]).sigmoid()
    p = given[:, :, 2] + r * recurrent[:, :, 2]
    ones = torch.ones_like(z)
    if not gradient:
        size = p.shape[-1]
        on_state = ((1 - z) * gates.tanh(p)).unsqueeze(2)
        return Steps(ones, z, on_state, _none(z), r.unsqueeze(2), slice(2 * size, 3 * size))
    n = p.tanh()
    on_n = (1 - z) * (1 - n * n)
    on_state = torch.stack([on_n * recurrent[:, :, 2] * _derivative(r), (before - n) * _derivative(z), on_n], 2)
    return Steps(ones, z, on_state, _none(z), torch.stack([ones, ones, r], 2), slice(None))


def rnn_steps(cell: Cell, x: Tensor, before: Tensor, after: Tensor, first: Tensor, gradient: bool) -> Steps:
    """The identity rule or the derivative of tanh or ReLU; a ReLU's mask is that of the output it gave."""
    if cell.kind == "rnn_relu":
        factor = gates.relu(after)
    elif gradient:
        factor = 1 - after * after
    else:
        factor = gates.tanh(sum(cell.terms(x, before))[:, :, 0])  # type: ignore[index]
    return Steps(torch.ones_like(after), torch.zeros_like(after), factor.unsqueeze(2), _none(after), None, slice(None))


STEPS: dict[str, Callable[..., Steps]] = {
    "lstm": lstm_steps,
    "gru": gru_steps,
    "rnn_tanh": rnn_steps,
    "rnn_relu": rnn_steps,
}


def walk_back(
    cell: Cell, steps: Steps, c: Tensor, c_h: Tensor, c_state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_x, c_h0, c_state0, bias share) of one direction, for ``c`` (..., T, B, P) at its outputs.

    ``c_h`` (..., B, P) and ``c_state`` (..., B, H) arrive at the last output and state; the bias share (..., B, H) is
    summed over time and gates.
    """
    recurrent = cell.hidden[steps.rows]
    parts = []
    for t in reversed(range(c.shape[-3])):
        c_h = c_h + c[..., t, :, :]
        c_output = c_h if cell.projection is None else c_h @ cell.projection
        c_state = c_state + c_output * steps.rise[t]
        part = c_state.unsqueeze(-2) * steps.on_state[t]
        if steps.on_output.shape[2]:
            part = torch.cat([part, c_output.unsqueeze(-2) * steps.on_output[t]], -2)
        parts.append(part)
        reset = part if steps.reset is None else part * steps.reset[t]
        c_h, c_state = reset.flatten(-2) @ recurrent, c_state * steps.keep[t]
    part = torch.stack(parts[::-1], -4)
    reset = part if steps.reset is None else part * steps.reset
    shape = part.shape[-2:]
    bias = torch.zeros_like(c_state)
    for side, b in ((part, cell.input_bias), (reset, cell.hidden_bias)):
        if b is not None:
            bias = bias + (side.sum(-4) * b[steps.rows].view(shape)).sum(-2)
    return part.flatten(-2) @ cell.input[steps.rows], c_h, c_state, bias


@dataclass(frozen=True)
class Stack:
    """The layers of one module call: its cells, layer by layer, with ``states`` [h0] or [h0, c0], (cells, B, ...)."""

    kind: str
    cells: list[Cell]
    states: list[Tensor]
    params: list[Tensor]
    directions: int
    gradient: bool

    def sequences(self, x: Tensor, output: Tensor) -> list[Tensor]:
        """The input of the first layer, then the output of each; all but the last are computed anew."""
        found = [x]
        layers = len(self.cells) // self.directions
        each = len(self.params) // layers
        for layer in range(layers - 1):
            own = slice(layer * self.directions, (layer + 1) * self.directions)
            states: Any = [state[own].contiguous() for state in self.states]
            params = self.params[layer * each : (layer + 1) * each]
            has_biases = self.cells[0].input_bias is not None
            options = (has_biases, 1, 0.0, False, self.directions == 2, False)
            op = getattr(torch.ops.aten, self.kind).input
            found.append(op(found[-1], states if self.kind == "lstm" else states[0], params, *options)[0])
        return [*found, output]

    def pullback(self, x: Tensor, output: Tensor, c: Tensor, c_states: list[Tensor]) -> list[Tensor]:
        """(c_x, c of each state, bias share), for ``c`` at the output and ``c_states`` at the last states."""
        sequences = self.sequences(x, output)
        ends: list[tuple[Tensor, ...]] = []
        for layer in reversed(range(len(self.cells) // self.directions)):
            made = [
                self._direction(layer, direction, sequences[layer], sequences[layer + 1], c, c_states)
                for direction in range(self.directions)
            ]
            c = made[0][0] if self.directions == 1 else made[0][0] + made[1][0]
            ends = [own[1:] for own in made] + ends
        return [c, *(torch.stack(parts, -3) for parts in zip(*ends, strict=True))]

    def _direction(
        self, layer: int, direction: int, x: Tensor, output: Tensor, c: Tensor, c_states: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """(c_x, c of each first state, bias share) of one direction; the second one reads time backwards."""
        index = layer * self.directions + direction
        own = output.chunk(self.directions, -1)[direction]
        c = c.chunk(self.directions, -1)[direction]
        if direction == 1:
            x, own, c = x.flip(0), own.flip(0), c.flip(-3)
        cell, first = self.cells[index], self.states[0][index]
        before = torch.cat([first.unsqueeze(0), own[:-1]])
        steps = STEPS[self.kind](cell, x, before, own, self.states[-1][index], self.gradient)
        arriving = c_states[0][..., index, :, :]
        if self.kind == "lstm":
            c_x, c_h, c_state, bias = walk_back(cell, steps, c, arriving, c_states[1][..., index, :, :])
            ends: tuple[Tensor, ...] = (c_h, c_state)
        else:
            c_x, c_h, c_state, bias = walk_back(cell, steps, c, arriving, torch.zeros_like(arriving))
            ends = (c_h + c_state,)
        return (c_x.flip(-3) if direction == 1 else c_x, *ends, bias)


COEFFICIENTS = (6, 7, 8)
"""Which arguments of the op are coefficients."""


def pull_back(
    kind: str,
    gradient: bool,
    x: Tensor,
    output: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    c_output: Tensor | None,
    c_hidden: Tensor | None,
    c_cell: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    """Coefficients of input and initial states by plain ops, then the biases' share (..., layers * directions, B, H).

    ``kind`` is the name of torch's op and the tensors are as it takes and gives them; with ``gradient`` its derivative
    instead of relevance. The c at its outputs may be absent, and may all have the same further dimensions in front.
    """
    directions = 2 if bidirectional else 1
    cells = cells_of(kind, params, num_layers * directions)
    stack = Stack(kind, cells, list(states), list(params), directions, gradient)
    leading = _leading(c_output, c_hidden, c_cell)
    arriving = [
        value.new_zeros((*leading, *value.shape)) if c is None else c
        for c, value in zip((c_output, c_hidden, c_cell), (output, *states), strict=False)
    ]
    if batch_first:
        x, output, arriving[0] = x.transpose(0, 1), output.transpose(0, 1), arriving[0].transpose(-3, -2)
    c_x, *rest = stack.pullback(x, output, arriving[0], arriving[1:])
    return [(c_x.transpose(-3, -2) if batch_first else c_x).contiguous(), *rest]


recurrent_pullback = torch.library.custom_op("lrp::recurrent_pullback", pull_back, mutates_args=())
"""``pull_back`` as one op of a graph."""


def _leading(*cs: Tensor | None) -> torch.Size:
    """The dimensions in front that the coefficients share."""
    return next(c.shape[:-3] for c in cs if c is not None)


@recurrent_pullback.register_fake
def _fake(
    kind: str,
    gradient: bool,
    x: Tensor,
    output: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    c_output: Tensor | None,
    c_hidden: Tensor | None,
    c_cell: Tensor | None,
    *options: Any,
) -> list[Tensor]:
    leading = _leading(c_output, c_hidden, c_cell)
    bias = (*states[0].shape[:-1], params[1].shape[0] // GATES[kind])
    shapes = (x.shape, *(state.shape for state in states), bias)
    return [x.new_empty((*leading, *shape)) for shape in shapes]


@recurrent_pullback.register_vmap
def _mapped(info: Any, in_dims: Any, *args: Any) -> tuple[list[Tensor], list[int]]:
    """Mapped coefficients get one more dimension in front: gates are computed once for all of them."""
    mapped = list(args)
    for position, (argument, dim) in enumerate(zip(args, in_dims, strict=True)):
        if position in COEFFICIENTS and argument is not None:
            spread = argument.expand(info.batch_size, *argument.shape)
            mapped[position] = spread if dim is None else argument.movedim(dim, 0)
        else:
            assert all(one is None for one in pytree.tree_leaves(dim)), "seeds are mapped, forward values are not"
    results = recurrent_pullback(*mapped)
    return results, [0] * len(results)
