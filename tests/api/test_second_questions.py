"""Questions that the forward pass did not prepare for: asked of one tape, they get the answers of a fresh one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from whole import FREE_CALLS, KEEP_NOTHING, priced

from lrp_compiler import LRPModule, Tape

PRICES = {"free calls": FREE_CALLS, "keep nothing": KEEP_NOTHING}


class Trained(nn.Module):
    """Convolutions with batch norm, max pooling and dropout of more values than a generator's state has bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2))
        self.gate, self.mix = nn.Linear(24, 40), nn.Linear(24, 40)
        self.norm, self.head = nn.LayerNorm(40), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.stem(x), 0.4, self.training).flatten(2).transpose(1, 2).contiguous()
        h = F.dropout(F.silu(self.gate(h)) * self.mix(h), 0.2, self.training)
        return self.head(self.norm(F.leaky_relu(h, 0.1)).mean(1))


QUESTIONS: dict[str, Callable[[Tape], Any]] = {
    "inputs": lambda tape: tape.relevance(1),
    "a site": lambda tape: tape.relevance(1, at="stem.0"),
    "other sites": lambda tape: tape.relevance(1, at=["stem", "gate", "norm"]),
    "another class": lambda tape: tape.relevance(3),
    "a mask": lambda tape: tape.relevance(1, through={"stem": torch.ones(24, 1, 1).cumsum(0) % 2}),
    "sinks": lambda tape: tape.sinks(1),
    "ledger": lambda tape: [(row.op, row.given, row.taken, row.sinks) for row in tape.ledger(1).rows],
    "parameters": lambda tape: tape.parameters(1),
    "coefficients": lambda tape: tape.coefficients(1, at="gate"),
    "activations": lambda tape: tape.activations(["stem", "gate"]),
    "several": lambda tape: tape.relevance_of_each([0, 4]),
}


@pytest.fixture(scope="module", params=PRICES)
def trained(request: pytest.FixtureRequest) -> LRPModule:
    torch.manual_seed(0)
    return priced(Trained().train(), "attnlrp", PRICES[request.param])


def fresh(explained: LRPModule, x: Tensor, **how: Any) -> Tape:
    """A tape of a forward pass that starts from the same random numbers and running statistics as every other."""
    state = {name: value.clone() for name, value in explained.state_dict().items()}
    torch.manual_seed(7)
    with torch.no_grad():
        tape = explained.run(x, **how)[1]
        # The tape has its own copy of what the model updates; the statistics go back for the next one.
        for name, value in explained.original.named_buffers():
            value.copy_(state[name])
    return tape


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal bit by bit."""
    ours, theirs = pytree.tree_flatten(one), pytree.tree_flatten(other)
    equal = (torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(ours[0], theirs[0], strict=True))
    return ours[1] == theirs[1] and all(equal)


def test_one_tape_answers_as_fresh_ones_do(trained: LRPModule) -> None:
    """In training mode, with dropout: masks are those of the forward pass, whatever is computed a second time."""
    x = torch.randn(3, 3, 12, 10)
    expected = {name: ask(fresh(trained, x)) for name, ask in QUESTIONS.items()}
    tape = fresh(trained, x, at="gate")
    state = torch.get_rng_state()
    for name in reversed(QUESTIONS):
        assert same(QUESTIONS[name](tape), expected[name]), name
    assert torch.equal(torch.get_rng_state(), state)
