"""Training the drop-in module leaves, bit for bit, what training the original leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from training import adam_steps, differing

from lrp_compiler import compile_for_lrp


class StochasticDepth(nn.Module):
    """Residual branches that are dropped per sample in training, each with its own probability."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(4))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for depth, branch in enumerate(self.branches):
            kept = 1 - 0.2 * depth
            inner = branch(x)
            if self.training and kept < 1:
                inner = inner * x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(kept).div_(kept)
            x = x + inner
        return self.head(x)


def built(name: str) -> zoo.Case:
    if name != "stochastic depth":
        return zoo.build(name)
    torch.manual_seed(0)
    return zoo.Case(StochasticDepth(), (torch.randn(6, 8),), target=2)


def step_of(case: zoo.Case, how: str) -> Any:
    """The forward pass of one training step: eager's, ours, or ours with relevance read before backward."""
    explained = compile_for_lrp(case.model)

    def forward() -> Any:
        if how == "eager":
            return case()
        if how == "forward":
            return explained(*case.args, **case.kwargs)
        output, tape = explained.run(*case.args, **case.kwargs)
        tape.relevance(case.target)
        return output

    return forward


@pytest.mark.parametrize(
    "name", ["resnet", "bert", "llama", pytest.param("t5", marks=pytest.mark.slow), "stochastic depth"]
)
def test_adam_leaves_the_state_eager_leaves(name: str) -> None:
    """Weights, statistics, moments and random numbers; with relevance of every step, too."""
    states = []
    for how in ("eager", "forward", "with relevance"):
        case = built(name)
        case.model.train()
        states.append(adam_steps(case.model, step_of(case, how)))
    assert not differing(states[0], states[1]) and not differing(states[0], states[2])


def test_switching_modes_and_freezing_in_the_loop() -> None:
    """Evaluation between steps, a frozen stem from the second step on, and statistics of one module held still."""
    states = []
    for how in ("eager", "forward", "with relevance"):
        case = zoo.build("resnet")
        forward = step_of(case, how)

        def before(step: int, case: zoo.Case = case, forward: Any = forward) -> None:
            case.model.eval()
            with torch.no_grad():
                forward()
            case.model.train()
            case.model.get_parameter("0.weight").requires_grad_(step == 0)
            case.model.get_submodule("1").train(step == 0)

        states.append(adam_steps(case.model, forward, before=before))
    assert not differing(states[0], states[1]) and not differing(states[0], states[2])
