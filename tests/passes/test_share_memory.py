"""Forward values that are overwritten: those that nothing else reads, keeps or differentiates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp

aten = torch.ops.aten
Read = Callable[[Tensor], Tensor]
READ: dict[str, tuple[Read, bool]] = {
    "a linear map": (lambda h: torch.relu(h), True),
    "a sum": (lambda h: torch.relu(h + 1), True),
    "a linear map that is read again": (lambda h: torch.relu(h) + h, False),
    "a view of a linear map that is read again": (lambda h: torch.relu(h) + h.transpose(0, 1).sum(1), False),
    "what its own derivative reads": (lambda h: torch.relu(h.tanh()), False),
}
"""What a ReLU reads, and whether it may overwrite it."""


class Reading(nn.Module):
    """An op between two linear maps."""

    def __init__(self, op: Read) -> None:
        super().__init__()
        self.first, self.op, self.second = nn.Linear(5, 6), op, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.op(self.first(x)))


@pytest.mark.parametrize("name", READ)
def test_a_relu_overwrites_what_ends_with_it(name: str) -> None:
    op, overwrites = READ[name]
    model, x = Reading(op), torch.randn(4, 5, requires_grad=True)
    explained = compile_for_lrp(model, "gradient")
    stage = next(stage for stage in explained.stages(x) if stage.name == "share_memory")
    targets = [node.target for node in stage.program.graph.nodes]
    assert (aten.relu_.default in targets) == overwrites
    output, tape = explained.run(x)
    expected = model(x)
    assert torch.equal(output, expected)
    (gradient,) = torch.autograd.grad(expected[:, 1].sum(), x, create_graph=True)
    found = tape.coefficients(1, create_graph=True)
    torch.testing.assert_close(found, gradient)
    weight = model.first.weight
    twice = [torch.autograd.grad(value.square().sum(), weight, retain_graph=True)[0] for value in (found, gradient)]
    torch.testing.assert_close(*twice)
    ours, theirs = (torch.autograd.grad(value.square().sum(), weight)[0] for value in (output, expected))
    torch.testing.assert_close(ours, theirs)
