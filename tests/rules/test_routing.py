"""Mixtures of experts: the router shares evenly with the experts or is a constant; restated by autograd with detach."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from accuracy import relative_error
from catalogue import agreement
from gallery import InDouble
from recognised import patterns_in
from torch import Tensor, nn

from lrp_compiler import Token, compile_for_lrp, composites
from lrp_compiler.errors import ArgumentError

FLOAT64 = 1e-10
WIDTH, EXPERTS, CHOSEN, TOKENS = 5, 4, 2, 3


def half(x: Tensor) -> Tensor:
    """The value of x, half its gradient."""
    return x / 2 + (x / 2).detach()


class Mixture(nn.Module):
    """Top-2 of 4 experts relu(x U_e) V_e in one of several spellings; restated with ``router`` rules by detach."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.router: str | None = None
        self.scores = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 7))
        self.balance = nn.Parameter(torch.randn(EXPERTS))
        self.down = nn.Parameter(torch.randn(EXPERTS, 7, WIDTH))

    def weigh(self, weight: Tensor, expert: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``product``, with the shares of its factors stated if this is the restatement."""
        if self.router == "constant":
            weight = weight.detach()
        elif self.router == "product":
            weight, expert = half(weight), half(expert)
        return product(weight, expert)

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "gathered":
            return self.gathered(x)
        values, indices = torch.topk(torch.softmax(self.scores(x), -1), CHOSEN, -1)
        total = values.sum(-1, keepdim=True)
        weights = values / (total.detach() if self.router else total)
        return {
            "batched_mm": self.batched_mm,
            "one_hot_einsum": self.one_hot_einsum,
            "scattered": self.scattered,
        }[self.spelling](x, weights, indices)

    def batched_mm(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """One small product per token and chosen expert, with that expert's weights picked."""
        chosen, tokens = indices.reshape(-1), x.repeat_interleave(CHOSEN, 0).unsqueeze(1)
        out = torch.bmm(torch.relu(torch.bmm(tokens, self.up[chosen])), self.down[chosen]).squeeze(1)
        weighted = self.weigh(weights.reshape(-1, 1), out, torch.mul)
        return weighted.view(x.shape[0], CHOSEN, WIDTH).sum(1)

    def every(self, x: Tensor) -> Tensor:
        """All experts of all tokens, (tokens, experts, features)."""
        return torch.einsum("teh,ehd->ted", torch.relu(torch.einsum("td,edh->teh", x, self.up)), self.down)

    def one_hot_einsum(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        dense = torch.einsum("tk,tke->te", weights, F.one_hot(indices, EXPERTS).to(weights.dtype))
        return self.weigh(dense, self.every(x), lambda w, e: torch.einsum("te,ted->td", w, e))

    def scattered(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Weights spread over all experts, which run one after the other."""
        dense = torch.zeros(x.shape[0], EXPERTS, dtype=x.dtype).scatter(1, indices, weights)
        parts = [torch.relu(x @ self.up[e]) @ self.down[e] for e in range(EXPERTS)]
        return torch.stack([self.weigh(dense[:, e, None], part, torch.mul) for e, part in enumerate(parts)]).sum(0)

    def gathered(self, x: Tensor) -> Tensor:
        """Sigmoid scores as they are, picked by where they are largest after a bias that balances the experts."""
        scores = torch.sigmoid(self.scores(x))
        indices = torch.topk(scores + self.balance, CHOSEN, -1)[1]
        scores = scores.gather(-1, indices)
        out = self.every(x).gather(1, indices[..., None].expand(-1, -1, WIDTH))
        return self.weigh(scores[..., None], out, torch.mul).sum(1)


SPELLINGS = ("batched_mm", "one_hot_einsum", "scattered", "gathered")


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_constant_router_leaves_everything_to_the_experts(spelling: str, reference: bool) -> None:
    model, x, seed = Mixture(spelling).double(), random(TOKENS, WIDTH), random(TOKENS, WIDTH)
    composite = composites.with_router(composites.attnlrp(), "constant")
    explained = compile_for_lrp(model, composite, reference=reference)
    assert patterns_in(explained, x) == {"routing": EXPERTS if spelling == "scattered" else 1}
    found = explained.attribute(x, seed)
    leaf = x.clone().requires_grad_()
    model.router = "constant"
    (grad,) = torch.autograd.grad(model(leaf), leaf, seed)
    assert agreement(explained, x, found, x * grad, "detach") <= FLOAT64


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("spelling", ["batched_mm", "one_hot_einsum", "scattered"])
def test_a_router_that_is_a_factor_gets_half(spelling: str) -> None:
    """Half through top-k, renormalisation with a constant sum, and softmax by its derivative (AttnLRP Prop. 3.1)."""
    model, x, seed = Mixture(spelling).double(), random(TOKENS, WIDTH), random(TOKENS, WIDTH)
    found = [
        compile_for_lrp(model, composite).attribute(x, seed)
        for composite in ("attnlrp", composites.with_router(composites.attnlrp(), "product"))
    ]
    assert torch.equal(*found)
    leaf = x.clone().requires_grad_()
    model.router = "product"
    (grad,) = torch.autograd.grad(model(leaf), leaf, seed)
    assert relative_error(found[0], x * grad) <= FLOAT64
    model.router = "constant"
    assert relative_error(found[0], x * torch.autograd.grad(model(leaf), leaf, seed)[0]) > 1e-3


@pytest.mark.parametrize("router", ["constant", "product"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_ledgers_close_and_a_constant_router_conserves(spelling: str, router: str) -> None:
    composite = composites.with_router(composites.attnlrp(), router)
    out, tape = compile_for_lrp(Mixture(spelling).double(), composite).run(random(TOKENS, WIDTH))
    ledger = tape.ledger(2)
    assert max(row.relative_gap for row in ledger.rows) <= FLOAT64
    if router == "constant":
        # No biases: what the output holds arrives at the input.
        torch.testing.assert_close(tape.relevance(2).sum(1), out[:, 2].detach(), rtol=FLOAT64, atol=FLOAT64)


class Hybrid(nn.Module):
    """Values weighed by a top-k that is not a router's, in several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.score, self.value, self.key = (nn.Linear(WIDTH, size) for size in (1, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "pooled_nodes":
            values, kept = torch.topk(self.score(x).squeeze(-1), 2, 0)
            return x[kept] * torch.tanh(values)[:, None]
        if self.kind == "sparse_attention":
            values, kept = torch.topk(self.key(x) @ x.mT, 2, -1)
            return (torch.softmax(values, -1)[..., None] * self.value(x)[kept]).sum(1)
        values, _ = torch.topk(x, 2, -1)
        return torch.softmax(values, -1) * self.value(x)[:, :2]


@pytest.mark.parametrize("kind", ["pooled_nodes", "sparse_attention", "largest_inputs"])
def test_other_top_ks_are_no_routers(kind: str) -> None:
    assert patterns_in(compile_for_lrp(Hybrid(kind), "attnlrp"), torch.randn(TOKENS, WIDTH)) == {}


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, use_cache=False,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8,
        norm_topk_prob=True, use_cache=False,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


@pytest.mark.thorough
@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
def test_routers_of_language_models(build: Callable[[], nn.Module]) -> None:
    """Each layer's router is known; held constant it gets nothing, and both ledgers close."""
    model = build().eval().double()
    model.set_experts_implementation("batched_mm")
    ids = torch.randint(50, (2, 5))
    with InDouble(), torch.no_grad():
        explained = compile_for_lrp(model, "attnlrp")
        patterns = patterns_in(explained, input_ids=ids)
        assert patterns["routing"] == 2 and patterns["gated_mlp"] == 2 and patterns["rotary"] == 4
        for composite in (composites.attnlrp(), composites.with_router(composites.attnlrp(), "constant")):
            explained = compile_for_lrp(explained, composite)
            tape = explained.run(input_ids=ids)[1]
            tape.ledger(Token(-1, 7)).check(FLOAT64)
            rules = {rule for _, rule in explained.report(input_ids=ids).rules}
            assert ("constant_router" in rules) == (composite.name != "attnlrp")


def test_what_with_router_refuses() -> None:
    with pytest.raises(ArgumentError, match="'constant' or 'product'"):
        composites.with_router(composites.attnlrp(), "free")
    for name in ("deep_lift", "gradient"):
        with pytest.raises(ArgumentError, match=name):
            composites.with_router(composites.COMPOSITES[name](), "constant")


def test_composites_with_router_rules_are_named_and_pickled() -> None:
    composite = composites.with_router(composites.epsilon_plus(), "constant")
    assert composite.name == "epsilon_plus, constant router"
    assert pickle.loads(pickle.dumps(composite)) == composite
