"""Rows of attention that may attend to nothing: padding in front of a causal model, in every spelling of a mask.

The oracle is the same sample without its padding, which no mask touches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from pairs import covering
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import LRPModule, compile_for_lrp

FLOAT64 = 1e-11
"""Relative gap between two computations of a few thousand float64 operations each."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(query, key, value, which pairs attend) -> output; heads are separate already."""


def scores(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.mT / math.sqrt(query.shape[-1])


def additive(allowed: Tensor, masked: float) -> Tensor:
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, masked)


LOWEST = torch.finfo(torch.float64).min
SPELLINGS: dict[str, Attend] = {
    "fused_bool": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
    "fused_lowest": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, additive(m, LOWEST)),
    "fused_infinite": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, additive(m, -math.inf)),
    "filled_lowest": lambda q, k, v, m: scores(q, k).masked_fill(~m, LOWEST).softmax(-1) @ v,
    "added_lowest": lambda q, k, v, m: (scores(q, k) + additive(m, LOWEST)).softmax(-1) @ v,
    "filled_then_cleared": lambda q, k, v, m: (
        scores(q, k).masked_fill(~m, -math.inf).softmax(-1).masked_fill(~m, 0) @ v
    ),
    "added_then_cleared": lambda q, k, v, m: (scores(q, k) + additive(m, -math.inf)).softmax(-1).nan_to_num() @ v,
    "chosen": lambda q, k, v, m: torch.where(m, torch.where(m, scores(q, k), -math.inf).softmax(-1), 0) @ v,
    "safe_softmax": lambda q, k, v, m: torch._safe_softmax(scores(q, k).masked_fill(~m, -math.inf), -1) @ v,
}


class Causal(nn.Module):
    """Two layers of causal attention, and the mean of what real tokens have become."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.maps = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        allowed = (causal & real[:, None, :] & real[:, :, None])[:, None]
        for to_qkv, out in zip(self.maps, self.out, strict=True):
            query, key, value = to_qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            x = x + out(self.attend(query, key, value, allowed).transpose(1, 2).flatten(2))
        return (x * real[..., None]).sum(1)


@cache
def causal(spelling: str) -> LRPModule:
    """Whose tracing the composites share."""
    torch.manual_seed(0)
    return compile_for_lrp(Causal(SPELLINGS[spelling]).double(), "gradient")


COMPOSITES = ("attnlrp", "cp_lrp", "relp", "input_x_gradient", "deep_lift")


@pytest.mark.parametrize(("spelling", "composite"), covering(SPELLINGS, COMPOSITES))
def test_padding_in_front_changes_nothing(spelling: str, composite: str) -> None:
    model = causal(spelling).original
    x, real = torch.randn(2, 5, 8, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool)
    real[1, :2] = False
    explained = compile_for_lrp(causal(spelling), composite)
    output, tape = explained.run(x, real)
    assert torch.equal(output, model(x, real))
    found = tape.relevance(3)
    alone = explained.run(x[1:, 2:], real[1:, 2:])[1].relevance(3)
    assert not found[1, :2].any()
    assert (found[1, 2:] - alone[0]).abs().max() <= FLOAT64 * alone.abs().max()
    for row in tape.ledger(3).rows:
        assert row.relative_gap <= FLOAT64, row


def test_what_stands_in_for_a_missing_value_is_a_constant() -> None:
    class Imputed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nan_to_num(x, 2.0, posinf=3.0, neginf=-4.0).sum(1)

    x = torch.tensor([[1.5, math.nan, -2.0, math.inf, -math.inf]], dtype=torch.float64)
    _, tape = compile_for_lrp(Imputed(), "epsilon").run(x)
    seed = torch.tensor([0.5], dtype=torch.float64)
    assert tape.coefficients(seed).tolist() == [[0.5, 0, 0.5, 0, 0]]
    (sinks,) = tape.sinks(seed).values()
    assert sinks["constant"].tolist() == [[0, 1.0, 0, 1.5, -2.0]]
