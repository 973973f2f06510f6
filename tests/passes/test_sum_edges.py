"""Loops that read a sequence step by step: their edges lie beside each other, and are what autograd's sum is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp
from lrp_compiler.passes.program import facts

aten = torch.ops.aten


class Steps(nn.Module):
    """A recurrence that no recogniser knows, over the ``steps`` of a sequence of dimension ``dim``, in their order."""

    def __init__(self, steps: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.steps, self.dim = steps, dim
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        values = torch.tanh(x)
        h = x.new_zeros(x.shape[0], 4)
        for step in self.steps:
            h = torch.tanh(self.mix(h)) * values.select(self.dim, step)
        return h


CASES = {
    "every step": ((0, 1, 2, 3, 4), -2, 0),
    "from the end": ((-1, -2, -3, -4, -5), 1, 0),
    "all but one": ((0, 2, 3, 4), 1, 0),
    "one of them twice": ((0, 1, 2, 3, 2), 1, 0),
    "too few": ((1, 3), 1, 2),
}
"""The steps read of five, the dimension, and how many edges of full size are left."""


@pytest.mark.parametrize("name", CASES)
def test_rows_are_put_beside_each_other(name: str) -> None:
    steps, dim, left = CASES[name]
    model, x = Steps(steps, dim).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    explained = compile_for_lrp(model, "input_x_gradient")
    (stage,) = (stage for stage in explained.stages(x) if stage.name == "insert_relevance")
    targets = [node.target for node in stage.program.graph.nodes if facts(node).part == "relevance"]
    assert targets.count(aten.select_backward.default) == left
    assert targets.count(aten.stack.default) == (left == 0)
    _, tape = explained.run(x)
    for target, found in enumerate(tape.relevance_of_each([0, 1, 2, 3])):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf)[:, target].sum(), leaf)
        torch.testing.assert_close(found, gradient * x, rtol=1e-12, atol=1e-15)
        assert torch.allclose(tape.relevance(target), found, rtol=1e-12, atol=1e-15)
