"""Structures that need no rule of their own are known once, in every spelling, and near misses are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recognised import patterns_in
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp

HEADS, WIDTH, TOKENS = 4, 6, 5
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Function(nn.Module):
    """A function of one tensor and of random parameters, by name."""

    def __init__(self, fn: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn
        self.one, self.two, self.three = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.both = nn.Linear(WIDTH, 2 * WIDTH)
        self.table = nn.Embedding(2 * TOKENS, HEADS)
        angles = torch.arange(TOKENS)[:, None] / 10 ** (torch.arange(WIDTH) / WIDTH)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self, x)


def patterns_of(fn: Callable[[Any, Tensor], Tensor], x: Tensor | None = None) -> dict[str, int]:
    """What is recognised in a function of x (batch, heads, tokens, features), whose outputs and ledger stay right."""
    x = torch.randn(2, HEADS, TOKENS, WIDTH, dtype=torch.float64) if x is None else x
    model = Function(fn).double()
    explained = compile_for_lrp(model, "attnlrp")
    out, tape = explained.run(x)
    assert torch.equal(out, model(x))
    ledger = tape.ledger(torch.randn(out.shape, dtype=out.dtype))
    assert max(row.relative_gap for row in ledger.rows) <= 1e-10
    return patterns_in(explained, x)


# --- rotary -------------------------------------------------------------------------------------------------


def halves(x: Tensor) -> Tensor:
    return torch.cat([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], -1)


def rotated_by_chunks(m: Any, x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return m.sin * torch.cat((-second, first), -1) + m.cos * x


def rotated_pairs(m: Any, x: Tensor) -> Tensor:
    return x * m.cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * m.sin


def rotated_part_by_part(m: Any, x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = m.cos[:, : WIDTH // 2], m.sin[:, : WIDTH // 2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rotated_pair_by_pair(m: Any, x: Tensor) -> Tensor:
    first, second = x[..., ::2], x[..., 1::2]
    cos, sin = m.cos[:, ::2], m.sin[:, ::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


def rotated_as_complex(m: Any, x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    turn = torch.polar(torch.ones_like(m.cos[:, ::2]), m.sin[:, ::2])
    return torch.view_as_real(pairs * turn).flatten(-2)


def rotated_in_part(m: Any, x: Tensor) -> Tensor:
    turned, kept = x[..., :4], x[..., 4:]
    rotated = torch.cat([-turned[..., 2:], turned[..., :2]], -1)
    return torch.cat([turned * m.cos[:, :4] + rotated * m.sin[:, :4], kept], -1)


ROTARY = {
    "halves": lambda m, x: x * m.cos + halves(x) * m.sin,
    "chunks": rotated_by_chunks,
    "pairs": rotated_pairs,
    "part_by_part": rotated_part_by_part,
    "pair_by_pair": rotated_pair_by_pair,
    "complex": rotated_as_complex,
    "in_part": rotated_in_part,
}
NO_ROTARY = {
    "nothing_moved": lambda m, x: x * m.cos + x * m.sin,
    "another_value": lambda m, x: x * m.cos + halves(m.one(x)) * m.sin,
    "reflected": lambda m, x: x * m.cos + torch.cat([x[..., 3:], x[..., :3]], -1) * m.sin,
    "both_negated": lambda m, x: x * m.cos + torch.cat([-x[..., 3:], -x[..., :3]], -1) * m.sin,
    "factors_of_data": lambda m, x: x * m.one(x).cos() + halves(x) * m.one(x).sin(),
    "scaled_not_rotated": lambda m, x: torch.cat([x[..., :3] * m.cos[:, :3] - x[..., 3:] * m.sin[:, :3]] * 2, -1),
}


@pytest.mark.parametrize("name", [name for name in ROTARY if name != "complex"])
def test_rotary_spellings(name: str) -> None:
    assert patterns_of(ROTARY[name]) == {"rotary": 1}


def test_complex_rotations() -> None:
    x = torch.randn(2, HEADS, TOKENS, WIDTH)
    assert patterns_in(compile_for_lrp(Function(rotated_as_complex), "attnlrp"), x) == {"rotary": 1}


@pytest.mark.parametrize("name", NO_ROTARY)
def test_near_misses_of_rotary(name: str) -> None:
    assert patterns_of(NO_ROTARY[name]) == {}


@pytest.mark.parametrize("name", ROTARY)
def test_pa_lrp_halves_every_rotation(name: str) -> None:
    """PA-LRP eq. 10: half of what arrives goes on, half is the positions'; other values are untouched by it."""
    x = torch.randn(2, HEADS, TOKENS, WIDTH, dtype=torch.float64)
    model = Function(ROTARY[name]).double()
    seed = torch.randn(2, HEADS, TOKENS, WIDTH, dtype=torch.float64)
    _, tape = compile_for_lrp(model, "pa_lrp").run(x)
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    (grad,) = torch.autograd.grad(out, leaf, seed)
    kept = slice(None) if name != "in_part" else slice(4)
    expected = x * grad
    expected[..., kept] /= 2
    torch.testing.assert_close(tape.relevance(seed), expected, rtol=1e-10, atol=1e-10)
    (positions,) = (kinds["position"] for kinds in tape.sinks(seed).values() if "position" in kinds)
    share = (out * seed)[..., kept].sum((1, 3)) / 2
    torch.testing.assert_close(positions.detach(), share.detach(), rtol=1e-10, atol=1e-10)


# --- softcap, gates, pooling --------------------------------------------------------------------------------

SOFTCAPS = {
    "divided": lambda m, x: torch.tanh(x / 30.0) * 30.0,
    "multiplied": lambda m, x: 5.0 * torch.tanh(0.2 * x),
    "of_scores": lambda m, x: torch.softmax(50 * torch.tanh(x @ x.mT / 50), -1) @ x,
}
NO_SOFTCAPS = {
    "other_scales": lambda m, x: 1.7159 * torch.tanh(2 / 3 * x),
    "sigmoid": lambda m, x: 5.0 * torch.sigmoid(x / 5.0),
    "not_scaled_back": lambda m, x: torch.tanh(x / 5.0),
}


@pytest.mark.parametrize("name", SOFTCAPS)
def test_softcaps_are_one_op(name: str) -> None:
    assert patterns_of(SOFTCAPS[name]) == {"softcap": 1}


@pytest.mark.parametrize("name", NO_SOFTCAPS)
def test_near_misses_of_softcap(name: str) -> None:
    assert patterns_of(NO_SOFTCAPS[name]) == {}


def test_differences_of_softcaps_are_complete_and_their_limit_is_the_gradient() -> None:
    model, x = Function(SOFTCAPS["multiplied"]), torch.randn(2, WIDTH, dtype=torch.float64)
    explained, seed = compile_for_lrp(model, "deep_lift"), torch.ones_like(x)
    x0 = torch.randn_like(x)
    found = explained.attribute(x, seed, baselines=x0)
    torch.testing.assert_close(found, (model(x) - model(x0)).detach(), rtol=1e-10, atol=1e-10)
    _, tape = explained.run(x, baselines=x)
    torch.testing.assert_close(tape.coefficients(seed), 1 - torch.tanh(0.2 * x).square(), rtol=1e-10, atol=1e-10)


def of_one_map(m: Any, x: Tensor) -> Tensor:
    gate, up = m.both(x).chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def spelled_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


GATES = {
    "two_maps": lambda m, x: F.silu(m.one(x)) * m.two(x),
    "one_map": of_one_map,
    "relu": lambda m, x: m.two(x) * torch.relu(m.one(x)),
    "glu": lambda m, x: m.both(x)[..., :WIDTH] * torch.sigmoid(m.both(x)[..., WIDTH:]),
}
NO_GATES = {
    "silu_itself": lambda m, x: m.one(x) * torch.sigmoid(m.one(x).sigmoid()),
    "other_inputs": lambda m, x: F.silu(m.one(x)) * m.two(m.three(x)),
    "squeeze_and_excite": lambda m, x: x * torch.sigmoid(m.one(x.mean(-2, keepdim=True))),
    "both_activated": lambda m, x: torch.tanh(m.one(x)) * torch.sigmoid(m.two(x)),
    "not_activated": lambda m, x: m.one(x) * m.two(x),
}


@pytest.mark.parametrize("name", GATES)
def test_gated_mlps(name: str) -> None:
    assert patterns_of(GATES[name]) == {"gated_mlp": 1}


def test_a_gate_of_a_spelled_gelu() -> None:
    assert patterns_of(lambda m, x: spelled_gelu(m.one(x)) * m.two(x)) == {"gelu_tanh": 1, "gated_mlp": 1}


@pytest.mark.parametrize("name", NO_GATES)
def test_near_misses_of_gated_mlps(name: str) -> None:
    assert patterns_of(NO_GATES[name]) == {}


class Pooled(nn.Module):
    """Embeddings pooled over tokens with an attention mask."""

    def __init__(self, fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fn, self.embedding = fn, nn.Embedding(9, WIDTH)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.fn(self.embedding(ids), mask)


def sentence(x: Tensor, mask: Tensor) -> Tensor:
    expanded = mask.unsqueeze(-1).expand(x.size()).to(x.dtype)
    return torch.sum(x * expanded, 1) / torch.clamp(expanded.sum(1), min=1e-9)


POOLS = {
    "sentence": sentence,
    "kept_dim": lambda x, mask: (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True),
    "filled": lambda x, mask: x.masked_fill(~mask[..., None].bool(), 0.0).sum(1) / mask.sum(1)[..., None],
}
NO_POOLS = {
    "mean": lambda x, mask: (x * mask.unsqueeze(-1)).mean(1),
    "another_mask": lambda x, mask: (x * mask.unsqueeze(-1)).sum(1) / (x > 0).sum(1),
    "softmax": lambda x, mask: (x * x.exp()).sum(1) / x.exp().sum(1),
}


@pytest.mark.parametrize("name", [*POOLS, *NO_POOLS])
def test_masked_means(name: str) -> None:
    """The mean is linear: of a token's coefficient each keeps c / count, masked ones exactly nothing."""
    model = Pooled({**POOLS, **NO_POOLS}[name]).double()
    ids, mask = torch.randint(9, (2, TOKENS)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    explained = compile_for_lrp(model, "attnlrp")
    assert patterns_in(explained, ids, mask) == ({"masked_mean": 1} if name in POOLS else {})
    if name in POOLS:
        seed = torch.randn(2, WIDTH, dtype=torch.float64)
        share = model.embedding(ids).detach() * (mask.double() / mask.sum(1, keepdim=True))[..., None]
        expected = (share * seed[:, None]).sum(-1)
        _, tape = explained.run(ids, mask)
        torch.testing.assert_close(tape.relevance(seed), expected, rtol=1e-10, atol=1e-10)


# --- attention ----------------------------------------------------------------------------------------------


def distances() -> Tensor:
    return torch.arange(TOKENS)[None, :] - torch.arange(TOKENS)[:, None]


def attend(bias: Callable[[Any], Tensor] | None) -> Callable[[Any, Tensor], Tensor]:
    def spelled(m: Any, x: Tensor) -> Tensor:
        scores = m.one(x) @ m.two(x).mT / WIDTH**0.5
        return torch.softmax(scores if bias is None else scores + bias(m), -1) @ x

    return spelled


def relative(m: Any) -> Tensor:
    return m.table(distances() + TOKENS).permute(2, 0, 1)[None]


def causal(m: Any) -> Tensor:
    return torch.zeros(TOKENS, TOKENS, dtype=torch.float64).masked_fill(distances() > 0, -1e30)


BIASES = {
    "relative": relative,
    "relative_and_causal": lambda m: relative(m) + causal(m),
    "alibi": lambda m: m.slopes * distances(),
    "alibi_masked": lambda m: (-m.slopes * distances().abs()).masked_fill(distances() > 0, -1e9),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", BIASES)
def test_position_biases(name: str, fused: bool) -> None:
    def whole(m: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(m.one(x), m.two(x), x, attn_mask=BIASES[name](m).expand(2, -1, -1, -1))

    assert patterns_of(whole if fused else attend(BIASES[name])) == {"position_bias": 1}


@pytest.mark.parametrize("bias", [None, causal, lambda m: (1.0 - (distances() > 0).double()[None, None]) * -1e9])
def test_masks_are_no_biases(bias: Any) -> None:
    assert patterns_of(attend(bias)) == {}


def test_a_parameter_added_outside_attention_is_no_bias() -> None:
    assert patterns_of(lambda m, x: torch.softmax(x + relative(m).mean((1, 2, 3)), -1)) == {}


def grouped(repeat: Callable[[Tensor], Tensor], fused: bool = False) -> Callable[[Any, Tensor], Tensor]:
    def spelled(m: Any, x: Tensor) -> Tensor:
        key, value = repeat(m.one(x)[:, : HEADS // 2]), repeat(x[:, : HEADS // 2])
        if fused:
            return F.scaled_dot_product_attention(x, key, value, enable_gqa=key.shape[1] < HEADS)
        return torch.softmax(x @ key.mT, -1) @ value

    return spelled


def expanded(x: Tensor) -> Tensor:
    return x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, HEADS, TOKENS, WIDTH)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("repeat", [expanded, lambda x: x.repeat_interleave(2, 1), lambda x: x[:, :1]])
def test_shared_heads(repeat: Callable[[Tensor], Tensor], fused: bool) -> None:
    assert patterns_of(grouped(repeat, fused)) == {"grouped_heads": 1}


def test_torchs_own_grouped_attention() -> None:
    assert patterns_of(grouped(lambda x: x, fused=True)) == {"grouped_heads": 1}


def test_a_batch_of_one_that_is_expanded_shares_no_heads() -> None:
    def spelled(m: Any, x: Tensor) -> Tensor:
        key = m.one(x[:1]).expand(2, -1, -1, -1)
        return torch.softmax(x @ key.mT, -1) @ x

    assert patterns_of(spelled) == {}
