"""nn.LSTMCell, GRUCell and RNNCell in a python loop, against autograd with detached gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import relative_error
from catalogue import agreement
from recurrence import frozen_step
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp

EXACT = 1e-10
CELLS: dict[str, Callable[..., nn.RNNCellBase]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn_tanh": nn.RNNCell,
    "rnn_relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}


class Loop(nn.Module):
    """A cell over (batch, time, features), from given or zero states; ``frozen`` detaches its gates."""

    def __init__(self, kind: str, bias: bool) -> None:
        super().__init__()
        self.kind, self.cell, self.head = kind, CELLS[kind](3, 4, bias=bias), nn.Linear(4, 2)
        self.frozen = False

    def step(self, x: Tensor, state: Any) -> Any:
        if not self.frozen:
            return self.cell(x, state)
        none = torch.zeros(self.cell.weight_ih.shape[0], dtype=x.dtype)
        biases = [none if b is None else b for b in (self.cell.bias_ih, self.cell.bias_hh)]
        h, c = state if self.kind == "lstm" else (state, torch.zeros_like(state))
        h, c = frozen_step(self.kind, (self.cell.weight_ih, self.cell.weight_hh, *biases, None), x, h, c)
        return (h, c) if self.kind == "lstm" else h

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        h = x.new_zeros(x.shape[0], 4) if h is None else h
        state = (h, torch.zeros_like(h)) if self.kind == "lstm" else h
        for step in x.unbind(1):
            state = self.step(step, state)
        return self.head(state[0] if self.kind == "lstm" else state)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("kind", CELLS)
def test_steps_follow_arras(kind: str, bias: bool) -> None:
    """Input and first state, at every step; outputs stay bitwise; the ledger closes; targets can be mapped."""
    model = Loop(kind, bias).double()
    x, h = torch.randn(2, 3, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    explained = compile_for_lrp(model)
    out, tape = explained.run(x, h)
    assert torch.equal(out, model(x, h))
    found = tape.relevance(1)
    tape.ledger(1).check(EXACT)
    each = tape.relevance_of_each([0, 1])
    model.frozen = True
    leaves = [value.clone().requires_grad_() for value in (x, h)]
    gradients = torch.autograd.grad(model(*leaves)[:, 1].sum(), leaves)
    for name, value, gradient in zip(("x", "h"), (x, h), gradients, strict=True):
        assert agreement(explained, (x, h), found[name], value * gradient, "autograd with detached gates") <= EXACT
        assert relative_error(each[name][1], found[name]) <= EXACT


@pytest.mark.parametrize("kind", CELLS)
def test_the_interpreter_and_the_gradient_know_steps(kind: str) -> None:
    model, x = Loop(kind, True).double(), torch.randn(2, 3, 3, dtype=torch.float64)
    found = compile_for_lrp(model).attribute(x, 0)
    assert relative_error(compile_for_lrp(model, reference=True).attribute(x, 0), found) <= 1e-9
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
    explained = compile_for_lrp(model, "input_x_gradient")
    assert relative_error(explained.attribute(x, 0), x * gradient) <= EXACT
    explained.run(x)[1].ledger(0).check(EXACT)
