"""DynamicLRP's absolute-ratio rules and the excitation pullback, restated in float64 (RULES.md 1.1 to 1.3, 5.3)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from accuracy import relative_error
from catalogue import agreement
from functions import Op
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import compile_for_lrp, composites

FLOAT64 = 1e-9
"""The engine's 1e-11 in every denominator is left out of the restatements."""


def agree(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], seed: Tensor, expected: list[Tensor]) -> None:
    explained = compile_for_lrp(Op(fn), "dynamiclrp")
    for found, wanted in zip(explained.attribute(inputs, seed), expected, strict=True):
        assert agreement(explained, inputs, found, wanted, "shares by magnitude") <= FLOAT64


def test_the_published_example() -> None:
    """a = 2, b = -1, R = 1: DynamicLRP's engine returns (0.667, 0.333) where the ratio rule has (2, -1)."""
    a, b = torch.tensor([2.0]).double(), torch.tensor([-1.0]).double()
    agree(torch.add, (a, b), torch.ones(1).double(), [torch.tensor([share]).double() / 3 for share in (2.0, 1.0)])


@pytest.mark.parametrize(
    ("fn", "terms"),
    [
        (torch.add, lambda a, b: (a, b)),
        (torch.sub, lambda a, b: (a, b)),
        (torch.mul, lambda a, b: (a, b)),
        (lambda a, b: torch.add(a, b, alpha=-3), lambda a, b: (a, 3 * b)),
    ],
    ids=["add", "sub", "mul", "alpha"],
)
def test_shares_by_magnitude(fn: Callable[..., Tensor], terms: Callable[..., tuple[Tensor, Tensor]]) -> None:
    a, b = torch.randn(3, 4).double(), torch.randn(4).double()
    seed = torch.randn(3, 4).double()
    relevance = fn(a, b) * seed
    left, right = (term.abs() for term in terms(a, b))
    expected = [relevance * left / (left + right), (relevance * right / (left + right)).sum(0)]
    agree(fn, (a, b), seed, expected)


@pytest.mark.parametrize("fn", [lambda x: x.sum(1), lambda x: x.mean(1), lambda x: x.mean((0, 2), keepdim=True)])
def test_sums_and_means_share_by_magnitude(fn: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 5, 3).double()
    out = fn(x)
    seed = torch.randn_like(out)
    leaf = x.abs().requires_grad_()
    size = fn(leaf)
    (spread,) = torch.autograd.grad(size, leaf, out * seed / size.detach())
    agree(fn, (x,), seed, [x.abs() * spread])


def test_biases_are_credited() -> None:
    """R_b = R |b| / (|z0| + |b|); the rest goes to the input by the epsilon rule on z0."""
    layer = nn.Linear(5, 4).double()
    x, seed = torch.randn(3, 5).double(), torch.randn(3, 4).double()
    explained = compile_for_lrp(layer, "dynamiclrp")
    _, tape = explained.run(x)
    z0, bias = x @ layer.weight.detach().T, layer.bias.detach()
    relevance = (z0 + bias) * seed
    kept = relevance * z0.abs() / (z0.abs() + bias.abs())
    expected = x * ((kept / z0) @ layer.weight.detach())
    assert agreement(explained, x, tape.relevance(seed), expected, "shares by magnitude") <= FLOAT64
    assert relative_error(tape.sinks(seed)["linear"]["credited"], relevance - kept) <= FLOAT64


@pytest.mark.parametrize("name", ["vgg", "resnet", "vit", "bert_eager", "llama"])
def test_the_rules_conserve(name: str) -> None:
    """Inputs, credited shares and the named sinks of softmax add up to the seed."""
    case = zoo.build(name, double=True)
    ledger = compile_for_lrp(case.model, "dynamiclrp").run(*case.args, **case.kwargs)[1].ledger(case.target)
    ledger.check(1e-10)
    magnitude = abs(ledger.seed) + sum(abs(value) for row in ledger.rows for value in row.sinks.values())
    assert abs(ledger.gap) <= 1e-10 * magnitude


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("sizes", [(2, 2, 0, 1), (3, 2, 1, 1), (2, 1, 1, 2)])
def test_excitation_pullback_is_the_gradient_of_a_soft_network(
    sizes: tuple[int, int, int, int], temperature: float
) -> None:
    """ReLU gates sigmoid(x / T); windows pull back w_k (1 + (x_k - y) / T), zeros of the padding taking part."""
    kernel, stride, padding, dilation = sizes
    conv = nn.Conv2d(2, 3, 3, padding=1).double()
    pool = nn.MaxPool2d(kernel, stride, padding, dilation)
    model = nn.Sequential(conv, nn.ReLU(), pool)
    x = torch.randn(2, 2, 6, 6).double()
    seed = torch.randn_like(model(x))
    leaf = x.clone().requires_grad_()
    z = conv(leaf)
    hidden = F.relu(z).detach().requires_grad_()
    windows = F.unfold(hidden, kernel, dilation, padding, stride).unflatten(1, (3, -1))
    soft = ((windows / temperature).softmax(2) * windows).sum(2)
    (on_hidden,) = torch.autograd.grad(soft, hidden, seed.flatten(2))
    (expected,) = torch.autograd.grad(z, leaf, on_hidden * torch.sigmoid(z.detach() / temperature))
    explained = compile_for_lrp(model, composites.excitation_pullback(temperature))
    found = explained.attribute(x, seed)
    assert agreement(explained, x, found, expected, "gradient of a soft network") <= FLOAT64


def test_gamma_in_vision_transformers_tends_to_cp_lrp() -> None:
    """gamma -> 0 is the epsilon rule; what is left is CP-LRP."""
    case = zoo.build("vit", double=True)
    small = compile_for_lrp(case.model, composites.attnlrp_gamma(1e-9, 1e-9)).attribute(case.args[0], case.target)
    limit = compile_for_lrp(case.model, "cp_lrp").attribute(case.args[0], case.target)
    assert relative_error(small, limit) <= 1e-4
    default = compile_for_lrp(case.model, "attnlrp_gamma").attribute(case.args[0], case.target)
    assert relative_error(default, limit) > 1e-2


def test_relp_keeps_the_gradient_inside_attention() -> None:
    """On a lone attention the RelP coefficient is the gradient; AttnLRP scales it by (1/4, 1/4, 1/2)."""

    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    inputs = tuple(torch.randn(1, 2, 4, 8).double() for _ in range(3))
    seed = torch.randn(1, 2, 4, 8).double()
    found = compile_for_lrp(Attention(), "relp").run(*inputs)[1].coefficients(seed, at=["q", "k", "v"])
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(Attention()(*leaves), leaves, seed)
    for ours, theirs in zip(found.values(), expected, strict=True):
        assert relative_error(ours, theirs) <= 1e-10
