"""Local rewrites: what they leave of the graph, and that relevance stays what it was, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp
from lrp_compiler.kernels.linear import convolution_transpose
from lrp_compiler.passes.program import Program, facts, first_argument

aten = torch.ops.aten


class Pooled(nn.Module):
    """ReLU and max pooling between two convolutions; with ``skip`` another op reads what the ReLU makes."""

    def __init__(self, window: tuple[int, int, int], skip: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3)
        self.pool, self.skip = nn.MaxPool2d(*window), skip

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        y = self.second(self.pool(h)).sum((2, 3))
        return y + h.mean((1, 2, 3)).unsqueeze(1) if self.skip else y


def masks(program: Program) -> list[tuple[int, ...]]:
    """The shapes of the forward values that ReLU masks are read of."""
    nodes = [node for node in program.graph.nodes if node.target is aten.threshold_backward.default]
    return [tuple(first_argument(node.args[1]).meta["val"].shape) for node in nodes if facts(node).part == "relevance"]


@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
@pytest.mark.parametrize("skip", [False, True])
def test_a_relu_in_front_of_a_pool_is_masked_behind_it(window: tuple[int, int, int], skip: bool) -> None:
    model, x = Pooled(window, skip), torch.randn(2, 2, 9, 9)
    explained = compile_for_lrp(model, "attnlrp")
    stage = next(stage for stage in explained.stages(x) if stage.name == "simplify")
    h = torch.relu(model.first(x))
    pooled, indices = nn.functional.max_pool2d(h, *window, return_indices=True)
    assert masks(stage.program) == [tuple(h.shape if skip else pooled.shape)]
    # By hand: both ops in their own order, as autograd has them.
    edge = torch.zeros(2, 4, *(size - 2 for size in pooled.shape[2:]))
    edge[:, 1] = 1
    options = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    inner = convolution_transpose(edge, model.second.weight, list(pooled.shape), *options)
    back = aten.max_pool2d_with_indices_backward(
        inner, h, [window[0]] * 2, [window[1]] * 2, [window[2]] * 2, [1, 1], False, indices
    )
    # The mean over 3 x 9 x 9 values.
    back = back + 1 / 243 if skip else back
    options = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    expected = convolution_transpose(back * (h > 0), model.first.weight, list(x.shape), *options) * x
    torch.testing.assert_close(explained.attribute(x, 1), expected.detach(), rtol=1e-4, atol=1e-6)


def test_a_coefficient_that_is_asked_for_in_front_of_a_pool_stays() -> None:
    """At a ReLU that is closed the pool's coefficient is not zero, and whoever asks for it gets it."""
    model, x = Pooled((2, 2, 0), False), torch.randn(2, 2, 8, 8)
    _, tape = compile_for_lrp(model, "attnlrp").run(x)
    whole = tape.coefficients(1, at="relu")
    h = torch.relu(model.first(x)).detach().requires_grad_()
    (expected,) = torch.autograd.grad(model.second(model.pool(h)).sum((2, 3))[:, 1].sum(), h)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-6)
