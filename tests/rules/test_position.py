"""PA-LRP: AttnLRP with positional sinks, restated with detach and a recorded coefficient at every rotation."""

from __future__ import annotations

import pytest
import torch
import zoo
from accuracy import relative_error
from catalogue import agreement
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import compile_for_lrp, positional_relevance

FLOAT64 = 1e-10
HEADS, WIDTH, TOKENS = 2, 4, 5


def half(x: Tensor) -> Tensor:
    """The value of x, half its gradient."""
    return x / 2 + (x / 2).detach()


class Rotary(nn.Module):
    """Embeddings with learned positions and one rotary attention layer, in ``style`` "halves" or "pairs"."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style, self.restating = style, False
        self.tokens = nn.Embedding(11, HEADS * WIDTH)
        self.positions = nn.Embedding(7, HEADS * WIDTH)
        self.segments = nn.Embedding(2, HEADS * WIDTH)
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH, bias=False)
        self.out = nn.Linear(HEADS * WIDTH, 3, bias=False)
        angles = torch.arange(TOKENS)[:, None] / 10 ** (torch.arange(WIDTH // 2) / 2)
        repeated = torch.cat([angles, angles], -1) if style == "halves" else angles.repeat_interleave(2, -1)
        self.register_buffer("angles", repeated)
        self.register_buffer("order", torch.arange(TOKENS))
        self.register_buffer("segment", torch.zeros(TOKENS, dtype=torch.long))
        self.seen: list[Tensor] = []

    def rotate(self, x: Tensor) -> Tensor:
        cos, sin = self.get_buffer("angles").cos(), self.get_buffer("angles").sin()
        if self.style == "halves":
            turned = torch.cat([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], -1)
        else:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        rotated = x * cos + turned * sin
        if self.restating:
            rotated.retain_grad()
            self.seen.append(rotated)
            return half(rotated)
        return rotated

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.tokens(ids)
        if self.restating:
            embedded.retain_grad()
            self.seen.append(embedded)
        summed = embedded + self.positions(self.get_buffer("order")) + self.segments(self.get_buffer("segment"))
        if self.restating:
            summed.retain_grad()
            self.seen.append(summed)
        q, k, v = self.qkv(summed).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        q, k = self.rotate(q), self.rotate(k)
        if self.restating:
            weights = torch.softmax(half(q) @ half(k).mT / WIDTH**0.5, -1)
            mixed = half(weights) @ half(v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2)).mean(1)


@pytest.mark.parametrize("style", ["halves", "pairs"])
def test_positions_take_half_of_rotations_and_their_embeddings_share(style: str) -> None:
    model = Rotary(style).double()
    ids = torch.randint(11, (3, TOKENS))
    with torch.no_grad():
        explained = compile_for_lrp(model, "pa_lrp")
        tape = explained.run(ids)[1]
    found = positional_relevance(tape, 1)
    model.restating = True
    model(ids)[:, 1].sum().backward()
    embedded, summed, q, k = ((value * value.grad).detach() for value in model.seen)
    assert summed.shape == embedded.shape
    positions = (model.positions.weight[:TOKENS] * model.seen[1].grad).sum(-1).detach()
    assert agreement(explained, ids, found.tokens, embedded.sum(-1), "detach") <= FLOAT64
    rotated = [value.sum((1, 3)) for value in (q, k)]
    assert len(found.positions) == 3
    for expected in (positions, *rotated):
        assert min(relative_error(ours, expected) for ours in found.positions.values()) <= FLOAT64
    assert relative_error(found.total, embedded.sum(-1) + positions + sum(rotated, torch.zeros(()))) <= FLOAT64


@pytest.mark.parametrize(("name", "rotations"), [("llama", 4), ("gpt2", 0), ("bert", 0)])
def test_positions_of_architectures(name: str, rotations: int) -> None:
    """Every rotation of every layer is found, and positional embeddings, not segments; the ledger closes."""
    case = zoo.build(name, double=True)
    explained = compile_for_lrp(case.model, "pa_lrp")
    with torch.no_grad():
        tape = explained.run(*case.args, **case.kwargs)[1]
    found = positional_relevance(tape, case.target)
    assert len(found.positions) == (rotations or 1)
    rules = {rule for _, rule in explained.report(*case.args, **case.kwargs).rules}
    assert ("rotary_half" in rules, "position_add" in rules) == (rotations > 0, rotations == 0)
    assert found.total.shape == found.tokens.shape
    tape.ledger(case.target).check()
