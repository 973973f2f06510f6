"""Rules for differences from a reference run: exact on every op, restated from their definitions in float64.

Three oracles: completeness, sum of (x - x0) c = seed (f(x) - f(x0)), at every op; term-by-term restatements of the
formulas; and the limit x0 = x, where every multiplier must be the ordinary derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import zoo
from accuracy import relative_error
from catalogue import agreement, note
from functions import Op
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import Composite, LRPModule, Tape, compile_for_lrp, composites, errors
from lrp_compiler.rules import NormalisedRescale, OpClass, on

FLOAT64 = 1e-9
"""Quotients of differences lose eps |y / (x - x0)|."""


@cache
def explained_by(fn: Callable[..., Any], composite: str | Composite = "deep_lift") -> LRPModule:
    """Compiled once for every test that asks about a function."""
    return compile_for_lrp(fn if isinstance(fn, nn.Module) else Op(fn), composite, verify="ledger")


def tape_of(fn: Callable[..., Any], inputs: Any, references: Any, composite: str | Composite = "deep_lift") -> Tape:
    explained = explained_by(fn, composite)
    names = explained.explained_call(tuple(inputs), {}).program.sources
    return explained.run(*inputs, baselines=dict(zip(names, references, strict=True)))[1]


def drawn(*shapes: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and their baselines."""
    return [torch.randn(s).double() for s in shapes], [torch.randn(s).double() for s in shapes]


def coefficients(tape: Tape, seed: Tensor) -> list[Tensor]:
    return list(tape.coefficients(seed, at=list(tape.program.attributed)).values())


def relevances(tape: Tape, seed: Tensor) -> list[Tensor]:
    return list(tape.relevance(seed, at=list(tape.program.attributed)).values())


def rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


def positive(x: Tensor) -> Tensor:
    return x.exp() + 0.1


X, ROW, WIDE = (3, 4), (4,), (2, 3, 5)
IMAGE, WINDOW = (2, 4, 6, 6), (4, 2, 3, 3)
HEADS, SHARED = (2, 4, 5, 3), (2, 2, 5, 3)
CASES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "add": (lambda a, b: torch.add(a, b, alpha=-3), (X, ROW)),
    "mul": (torch.mul, (X, ROW)),
    "square by mul": (lambda x: x * x, (X,)),
    "three factors": (lambda a, b, c: a * b * c, (X, ROW, X)),
    "div": (lambda a, b: a / positive(b), (X, ROW)),
    "broadcast numerator": (lambda a, b: a / positive(b), (ROW, X)),
    "constant numerator": (lambda x: 3.0 / positive(x), (X,)),
    "constant denominator": (lambda x: x / 3.0, (X,)),
    "matmul": (torch.matmul, ((2, 3, 4), (4, 5))),
    "bmm": (torch.bmm, ((2, 3, 4), (2, 4, 5))),
    "addmm": (lambda b, x, w: torch.addmm(b, x, w, beta=2.0, alpha=0.5), (ROW, (3, 5), (5, 4))),
    "linear of values": (F.linear, ((3, 5), (4, 5), ROW)),
    "convolution by values": (lambda x, w: F.conv2d(x, w, padding=1, stride=2, groups=2), (IMAGE, WINDOW)),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), ((2, 3, 4), (2, 4, 5))),
    "power": (lambda x: positive(x) ** 2.5, (X,)),
    "exponent": (lambda x: torch.pow(2.0, x), (X,)),
    "gelu": (F.gelu, (X,)),
    "gelu by hand": (gelu_tanh, (X,)),
    "rsqrt": (lambda x: torch.rsqrt(positive(x)), (X,)),
    "variance": (lambda x: x.var(-1), (WIDE,)),
    "deviation": (lambda x: x.std((0, 2), unbiased=False), (WIDE,)),
    "norm": (lambda x: torch.linalg.vector_norm(x, dim=1), (WIDE,)),
    "normalize": (lambda x: F.normalize(x, dim=1), (WIDE,)),
    "layer norm": (lambda x: F.layer_norm(x, (3, 5)), (WIDE,)),
    "group norm": (lambda x: F.group_norm(x, 2), (IMAGE,)),
    "batch norm": (lambda x: F.batch_norm(x, None, None, training=True), (IMAGE,)),
    "rms norm": (rms_norm, (WIDE,)),
    "rms norm of torch": (lambda x: F.rms_norm(x, (5,)), (WIDE,)),
    "softmax": (lambda x: x.softmax(1), (WIDE,)),
    "log softmax": (lambda x: x.log_softmax(-1), (WIDE,)),
    "logsumexp": (lambda x: x.logsumexp((0, 2)), (WIDE,)),
    "attention": (F.scaled_dot_product_attention, (HEADS, HEADS, HEADS)),
    "causal attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (HEADS,) * 3),
    "shared heads": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.3),
        (HEADS, SHARED, SHARED),
    ),
    "max pool": (lambda x: F.max_pool2d(x, 3, 2, 1), (IMAGE,)),
    "adaptive max pool": (lambda x: F.adaptive_max_pool2d(x, 4), (IMAGE,)),
    "max pool 1d": (lambda x: F.max_pool1d(x, 2, 1), (WIDE,)),
    "maximum": (torch.maximum, (X, ROW)),
    "minimum": (torch.minimum, (ROW, X)),
    "maximum of a constant": (lambda x: torch.max(x, torch.full_like(x, 0.1)), (X,)),
    "max": (lambda x: x.max(1).values, (WIDE,)),
    "min": (lambda x: x.min(-1, keepdim=True)[0], (WIDE,)),
    "max of all": (lambda x: x.max().view(1), (WIDE,)),
    "amax": (lambda x: x.amax((0, 2)), (WIDE,)),
    "amin": (lambda x: x.amin((2, 1), keepdim=True), (WIDE,)),
    "movement": (lambda a, b: torch.cat([a, b.expand_as(a)], 1).transpose(0, 1).flip(0)[1:], (X, ROW)),
    "masked": (lambda x: x.masked_fill(torch.eye(3, 4, dtype=torch.bool), 5.0), (X,)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_op_is_complete(name: str) -> None:
    """Per sample where the op keeps samples apart, in all where it does not; the ledger is verified op by op."""
    fn, shapes = CASES[name]
    inputs, references = drawn(*shapes)
    change = fn(*inputs) - fn(*references)
    seed = torch.randn_like(change)
    tape = tape_of(fn, inputs, references)
    total = sum(float(relevance.sum()) for relevance in relevances(tape, seed))
    size = float((change * seed).abs().sum())
    error = abs(total - float((change * seed).sum())) / size
    assert error <= FLOAT64
    assert not tape.ledger(seed).sink_totals()
    note(explained_by(fn), tuple(inputs), {}, "completeness", error)


@pytest.mark.parametrize("name", CASES)
def test_without_a_difference_every_multiplier_is_the_derivative(name: str) -> None:
    fn, shapes = CASES[name]
    inputs, _ = drawn(*shapes)
    leaves = [x.clone().requires_grad_() for x in inputs]
    seed = torch.randn_like(fn(*inputs))
    expected = torch.autograd.grad(fn(*leaves), leaves, seed)
    tape = tape_of(fn, inputs, inputs)
    for found, wanted in zip(coefficients(tape, seed), expected, strict=True):
        assert agreement(explained_by(fn), tuple(inputs), found, wanted, "autograd at x = x0") <= FLOAT64
    assert all((relevance == 0).all() for relevance in relevances(tape, seed))


RESCALED = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "exp": torch.exp,
    "abs": torch.abs,
    "gelu_tanh": gelu_tanh,
    "prelu": lambda x: F.prelu(x, torch.full((4,), 0.3).double()),
}


@pytest.mark.parametrize("name", RESCALED)
def test_elementwise_functions_are_rescaled(name: str) -> None:
    """(f(x) - f(x0)) / (x - x0); a hand-written GELU counts as one function."""
    fn = RESCALED[name]
    (x,), (x0,) = drawn(X)
    seed = torch.randn_like(x)
    (found,) = coefficients(tape_of(fn, [x], [x0]), seed)
    assert relative_error(found, seed * (fn(x) - fn(x0)) / (x - x0)) <= FLOAT64


def test_products_and_quotients_by_hand() -> None:
    (a, b), (a0, b0) = drawn(X, X)
    seed = torch.randn_like(a)
    found = coefficients(tape_of(torch.mul, [a, b], [a0, b0]), seed)
    for made, expected in zip(found, (seed * (b + b0) / 2, seed * (a + a0) / 2), strict=True):
        assert relative_error(made, expected) <= FLOAT64
    found = coefficients(tape_of(torch.div, [a, b], [a0, b0]), seed)
    for made, expected in zip(found, (seed * (1 / b + 1 / b0) / 2, -seed * (a + a0) / (2 * b * b0)), strict=True):
        assert relative_error(made, expected) <= FLOAT64


def test_extremes_give_their_change_to_the_winner_of_the_more_extreme_run() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 0.5]]).double()
    x0 = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 1.0]]).double()
    expected = torch.tensor([[1.0, 0.0, 0.0], [-3.0, 0.0, 0.0]]).double()
    for fn, sign in ((lambda x: x.max(1)[0], 1), (lambda x: x.amax(1), 1), (lambda x: x.amin(1), -1)):
        found = tape_of(fn, [sign * x], [sign * x0]).relevance(torch.ones(2).double())
        torch.testing.assert_close(found, sign * expected)
    a, b = x.unbind(1)[:2]
    a0, b0 = x0.unbind(1)[:2]
    found = relevances(tape_of(torch.maximum, [a, b], [a0, b0]), torch.ones(2).double())
    torch.testing.assert_close(torch.stack(found), torch.tensor([[1.0, -3.0], [0.0, 0.0]]).double())


def softmax_multipliers(x: Tensor, x0: Tensor) -> Tensor:
    """The matrix m_ji of one row: y_j - y0_j = sum_i m_ji (x_i - x0_i), from logarithmic means of the probabilities."""
    p, p0 = x.softmax(0), x0.softmax(0)
    mean = torch.where(p == p0, p, (p - p0) / (p.log() - p0.log()))
    return torch.diag(mean) - torch.outer(mean, mean) / mean.sum()


def test_softmax_by_its_matrix() -> None:
    (x,), (x0,) = drawn((3, 5))
    seed = torch.randn_like(x)
    (found,) = coefficients(tape_of(lambda x: x.softmax(1), [x], [x0]), seed)
    matrices = [softmax_multipliers(row, row0) for row, row0 in zip(x, x0, strict=True)]
    for row, row0, matrix in zip(x, x0, matrices, strict=True):
        torch.testing.assert_close(matrix @ (row - row0), row.softmax(0) - row0.softmax(0))
    expected = torch.stack([s @ matrix for s, matrix in zip(seed, matrices, strict=True)])
    assert relative_error(found, expected) <= FLOAT64


def test_softmax_does_not_see_a_shift() -> None:
    """Logits a thousand apart overflow no exponential, and a shift of all is no difference."""
    x = torch.randn(2, 4).double()
    tape = tape_of(lambda x: x.softmax(1), [x], [x + 1000])
    seed = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(leaf.softmax(1), leaf, seed)
    assert relative_error(coefficients(tape, seed)[0], expected) <= FLOAT64
    far = tape_of(lambda x: x.softmax(1), [x * 1000], [x])
    assert all(torch.isfinite(c).all() for c in coefficients(far, seed))
    far.ledger(seed).check()


def test_attention_is_product_softmax_product() -> None:
    """One head by hand: midpoints of the products, the softmax matrix per query, the mask's entries left out."""
    (q, k, v), (q0, k0, v0) = drawn((1, 4, 3), (1, 4, 3), (1, 4, 3))
    seed = torch.randn(1, 4, 3).double()
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    tape = tape_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask), [q, k, v], [q0, k0, v0])
    found = coefficients(tape, seed)
    scores, scores0 = (a[0] @ b[0].T / 3**0.5 for a, b in ((q, k), (q0, k0)))
    on_scores, weights = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    for row in range(4):
        seen = slice(0, row + 1)
        on_weights = seed[0, row] @ ((v + v0)[0, seen] / 2).T
        on_scores[row, seen] = on_weights @ softmax_multipliers(scores[row, seen], scores0[row, seen])
        weights[row, seen] = (scores[row, seen].softmax(0) + scores0[row, seen].softmax(0)) / 2
    on_query = on_scores @ (k + k0)[0] / 2 / 3**0.5
    on_key = on_scores.T @ (q + q0)[0] / 2 / 3**0.5
    for made, expected in zip(found, (on_query, on_key, weights.T @ seed[0]), strict=True):
        assert relative_error(made[0], expected) <= FLOAT64


@pytest.mark.parametrize("centred", [True, False], ids=["layer norm", "rms norm"])
def test_norms_are_their_ops_one_by_one(centred: bool) -> None:
    """y = u r: product at midpoints; r of the mean square: rescaled; the square u u: product at midpoints."""
    (x,), (x0,) = drawn((3, 5))
    seed = torch.randn_like(x)
    fn = (lambda x: F.layer_norm(x, (5,), eps=1e-3)) if centred else rms_norm
    (found,) = coefficients(tape_of(fn, [x], [x0]), seed)
    u, u0 = (value - value.mean(1, keepdim=True) if centred else value for value in (x, x0))
    square, square0 = (value.square().mean(1, keepdim=True) for value in (u, u0))
    r, r0 = (1 / (value + 1e-3).sqrt() for value in (square, square0))
    on_r = (seed * (u + u0) / 2).sum(1, keepdim=True)
    on_square = on_r * (r - r0) / (square - square0)
    on_u = seed * (r + r0) / 2 + on_square * (u + u0) / 5
    expected = on_u - on_u.mean(1, keepdim=True) if centred else on_u
    assert relative_error(found, expected) <= FLOAT64


@given(batch=st.integers(0, 3), inputs=st.integers(1, 6), outputs=st.integers(1, 5), same=st.booleans())
def test_networks_of_any_size_are_complete(batch: int, inputs: int, outputs: int, same: bool) -> None:
    """Per sample, with samples that are their own reference among them."""
    model = nn.Sequential(nn.Linear(inputs, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, outputs), nn.Softmax(1))
    model = model.double()
    x, x0 = torch.randn(batch, inputs).double(), torch.randn(batch, inputs).double()
    x0 = torch.where(torch.arange(batch)[:, None] == 0, x, x0) if same else x0
    seed = torch.randn(batch, outputs).double()
    explained = compile_for_lrp(model, "deep_lift")
    found, delta = explained.attribute(x, seed, baselines=x0, return_convergence_delta=True)
    change = ((model(x) - model(x0)) * seed).sum(1)
    torch.testing.assert_close(found.sum(1), change.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(delta.detach(), torch.zeros(batch).double(), rtol=0, atol=1e-11)


BASELINES: dict[str, dict[str, Any]] = {
    "vgg": {"input": 0.2},
    "resnet": {"input": None},
    "vit": {"x": torch.randn(1, 3, 12, 12).double()},
    "bert": {"input_ids": 3},
    "roberta": {"input_ids": 3},
    "gpt2": {"input_ids": torch.arange(7).expand(2, 7)},
    "llama": {"input_ids": 3},
    "t5": {"input_ids": 3, "decoder_input_ids": 4},
}
LIKE_OTHERS = ("roberta", "gpt2", "t5")
"""Built of what BERT and Llama are built of."""
WHOLE = [pytest.param(n, marks=pytest.mark.slow if n in LIKE_OTHERS else ()) for n in BASELINES]


@pytest.mark.parametrize("name", WHOLE)
def test_networks_are_complete(name: str) -> None:
    case = zoo.build(name, double=True)
    _, tape = compile_for_lrp(case.model, "deep_lift").run(*case.args, baselines=BASELINES[name], **case.kwargs)
    ledger = tape.ledger(case.target)
    ledger.check()
    assert abs(ledger.gap) <= FLOAT64 * abs(ledger.seed) and ledger.sinks == 0
    found = tape.relevance(case.target)
    parts = found.values() if isinstance(found, dict) else [found]
    per_sample = sum(part.flatten(1).sum(1) for part in parts)
    torch.testing.assert_close(per_sample, tape.seeded_output(case.target).detach(), rtol=FLOAT64, atol=1e-12)


@pytest.mark.parametrize("name", ["vgg", "resnet", "vit", pytest.param("bert", marks=pytest.mark.slow), "llama"])
def test_networks_without_a_difference_give_the_gradient(name: str) -> None:
    case = zoo.build(name, double=True)
    gradient = compile_for_lrp(case.model, "gradient").run(*case.args, **case.kwargs)[1]
    names = gradient.program.attributed
    given = case.args[0] if case.args else case.kwargs[names[0]]
    tape = compile_for_lrp(case.model, "deep_lift").run(*case.args, baselines=given, **case.kwargs)[1]
    pairs = [t.coefficients(case.target) for t in (tape, gradient)]
    assert relative_error(*pairs) <= FLOAT64
    assert (tape.relevance(case.target) == 0).all()


def test_every_layer_holds_the_whole_difference() -> None:
    case = zoo.build("vgg", double=True)
    x0 = torch.randn_like(case.args[0])
    _, tape = compile_for_lrp(case.model, "deep_lift").run(*case.args, baselines=x0)
    expected = tape.seeded_output(case.target).detach()
    hidden = case.model[:4](case.args[0]) - case.model[:4](x0)  # type: ignore[index]
    found = tape.relevance(case.target, at=["0", "3", "7"])
    for relevance in found.values():
        torch.testing.assert_close(relevance.flatten(1).sum(1), expected)
    torch.testing.assert_close(found["3"], hidden.detach() * tape.coefficients(case.target, at="3"))


def test_several_targets_share_one_pass() -> None:
    for name in ("vgg", "vit"):
        case = zoo.build(name, double=True)
        x0 = torch.randn_like(case.args[0])
        _, tape = compile_for_lrp(case.model, "deep_lift", verify="ledger").run(*case.args, baselines=x0)
        together = tape.relevance_of_each([0, 3, 4])
        for index, target in enumerate([0, 3, 4]):
            torch.testing.assert_close(together[index], tape.relevance(target))


def test_what_differs_but_is_not_attributed_is_held() -> None:
    """a b + b.detach() with b given another value: b's shares are a sink, and the rest is a's."""

    def fn(a: Tensor, b: Tensor) -> Tensor:
        return (a * b + b).sum(1)

    (a, b), (a0, b0) = drawn(X, X)
    explained = compile_for_lrp(Op(fn), "deep_lift", verify="ledger")
    names = list(explained.report(a, b).inputs)
    tape = explained.run(a, b, wrt=names[0], baselines=dict(zip(names, (a0, b0), strict=True)))[1]
    torch.testing.assert_close(tape.relevance(), (a - a0) * (b + b0) / 2)
    held = sum(sink["held"].sum() for sink in tape.sinks().values())
    torch.testing.assert_close(held, ((b - b0) * ((a + a0) / 2 + 1)).sum())
    kept = explained.run(a, b, wrt=names[0], baselines=a0)[1]
    torch.testing.assert_close(kept.relevance(), (a - a0) * b)
    assert not kept.sinks()


def test_constants_of_the_input_are_held() -> None:
    (x,), (x0,) = drawn(X)
    tape = tape_of(lambda x: (x.detach() * x).sum(1), [x], [x0])
    torch.testing.assert_close(tape.relevance(), (x - x0) * (x + x0) / 2)
    torch.testing.assert_close(tape.sinks()["mul"]["held"].sum(), ((x - x0) * (x + x0) / 2).sum())


def softmax(x: Tensor) -> Tensor:
    return x.softmax(1)


def test_captums_softmax_leaves_its_residual_in_a_sink() -> None:
    (x,), (x0,) = drawn((3, 5))
    seed = torch.randn_like(x)
    composite = composites.deep_lift().override((on(OpClass.SOFTMAX), NormalisedRescale()))
    tape = tape_of(softmax, [x], [x0], composite)
    change, rescaled = x.softmax(1) - x0.softmax(1), seed * (x.softmax(1) - x0.softmax(1)) / (x - x0)
    expected = (x - x0) * (rescaled - rescaled.mean(1, keepdim=True))
    explained = compile_for_lrp(Op(softmax), composite)
    assert agreement(explained, x, tape.relevance(seed), expected, "Captum's formula") <= FLOAT64
    assert relative_error(tape.sinks(seed)["softmax"]["residual"], seed * change - expected) <= FLOAT64


REFUSED: dict[str, tuple[Callable[..., Tensor], int]] = {
    "aten::where": (lambda x: torch.where(x > 0, x, 0.1 * x), 1),
    "aten::gather": (lambda x: x.gather(1, x.argsort(1)), 1),
    "aten::topk": (lambda x: x.topk(2, 1).values, 1),
    "aten::pow": (lambda a, b: torch.pow(a.abs() + 1, b), 2),
    "aten::layer_norm": (lambda x, w: F.layer_norm(x, (4,), w), 2),
    "aten::div": (lambda x: torch.div(x, x.exp(), rounding_mode="floor"), 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_ops_without_an_exact_rule_are_refused(name: str) -> None:
    """Selections that may differ between the runs above all: their derivative is not the difference's."""
    fn, count = REFUSED[name]
    shapes = [X, X if name != "aten::layer_norm" else ROW][:count]
    inputs, references = drawn(*shapes)
    with pytest.raises(errors.UncoveredOpsError, match="no exact rule for differences"):
        tape_of(fn, inputs, references)
