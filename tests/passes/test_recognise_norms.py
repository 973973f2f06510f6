"""Norms in every spelling are one op to relevance, as their native op is; what is no norm is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accuracy import relative_error
from functions import Op
from pairs import covering
from recognised import patterns_in
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp

FLOAT64 = 1e-10
WIDTH, EPS = 6, 1e-5
OTHER = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
Spelling = Callable[[Tensor], Tensor]


def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def functional_rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), eps=EPS)


def squeezed(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1) + EPS).unsqueeze(-1)


def both_last_dims(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean((-2, -1), keepdim=True) + EPS)


def times_rsqrt(x: Tensor) -> Tensor:
    return x * torch.rsqrt(mean_square(x) + EPS)


def with_casts(x: Tensor) -> Tensor:
    wide = x.to(torch.float64)
    return (wide * torch.rsqrt(mean_square(wide) + EPS)).to(x.dtype)


def with_one_cast(x: Tensor) -> Tensor:
    return x * torch.rsqrt(mean_square(x.to(torch.float64)) + EPS)


def per_head(x: Tensor) -> Tensor:
    return F.normalize(x.unflatten(-1, (2, WIDTH // 2)), dim=-1).flatten(-2)


# Where the epsilon stands inside the root and the mean is a mean, DeepLIFT has an exact rule for the whole.
EXACT: dict[str, Spelling] = {
    "times_rsqrt": lambda x: x * torch.rsqrt(mean_square(x) + EPS),
    "rsqrt_times": lambda x: torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * x,
    "over_sqrt": lambda x: x / torch.sqrt(mean_square(x) + EPS),
    "power_of_minus_half": lambda x: x * (mean_square(x) + EPS) ** -0.5,
    "over_power_of_half": lambda x: x / (mean_square(x) + EPS) ** 0.5,
    "one_over_sqrt": lambda x: x * (1 / torch.sqrt(mean_square(x) + EPS)),
    "reciprocal": lambda x: x * torch.sqrt(mean_square(x) + EPS).reciprocal(),
    "sum_over_count": lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) / WIDTH + EPS),
    "functional": functional_rms_norm,
    "squeezed": squeezed,
    "both_last_dims": both_last_dims,
    "of_one_scaled_value": lambda x: times_rsqrt(2.0 * x * OTHER),
}
APPROXIMATE: dict[str, Spelling] = {
    "epsilon_outside": lambda x: x / (mean_square(x).sqrt() + EPS),
    "norm_over_root": lambda x: x / (x.norm(dim=-1, keepdim=True) / WIDTH**0.5 + EPS),
    "vector_norm": lambda x: x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * WIDTH**-0.5 + EPS),
    "normalize": lambda x: F.normalize(x, dim=-1) * WIDTH**0.5,
    "clamped": lambda x: x / x.norm(2, -1, keepdim=True).clamp(min=EPS),
    "per_head": per_head,
    "weight_first": lambda x: 3.0 * OTHER * x / torch.sqrt(mean_square(x) + EPS),
}
RMS_NORMS = {**EXACT, **APPROXIMATE}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def report_of(fn: Spelling, x: Tensor) -> dict[str, int]:
    return patterns_in(compile_for_lrp(Op(fn), "attnlrp"), x)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", RMS_NORMS)
def test_rms_norms_pass_relevance_on(name: str, reference: bool) -> None:
    """AttnLRP's rule for RMSNorm is the identity, R_x = R_y, whatever multiplies or divides by the root."""
    x, seed = random(2, 3, WIDTH), random(2, 3, WIDTH)
    model = Op(RMS_NORMS[name])
    explained = compile_for_lrp(model, "attnlrp", reference=reference)
    assert patterns_in(explained, x) == {"rms_norm": 1}
    out, tape = explained.run(x)
    assert torch.equal(out, model(x))
    assert relative_error(tape.relevance(seed), seed * out.detach()) <= FLOAT64


@pytest.mark.parametrize("fn", [with_casts, with_one_cast])
def test_casts_do_not_hide_a_norm(fn: Spelling) -> None:
    x = torch.randn(2, WIDTH)
    explained = compile_for_lrp(Op(fn), "attnlrp")
    assert patterns_in(explained, x) == {"rms_norm": 1}
    out, tape = explained.run(x)
    seed = torch.randn_like(out)
    torch.testing.assert_close(tape.relevance(seed), (seed * out).detach().to(x.dtype))


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def over_var_mean(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(variance + EPS)


def of_sums(x: Tensor) -> Tensor:
    deviation = x - x.sum(-1, keepdim=True) / WIDTH
    return deviation / torch.sqrt(deviation.pow(2).sum(-1, keepdim=True) / WIDTH + EPS)


LAYER_NORMS: dict[str, Spelling] = {
    "over_sqrt_of_var": lambda x: centred(x) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS),
    "times_rsqrt_of_mean": lambda x: centred(x) * torch.rsqrt(mean_square(centred(x)) + EPS),
    "power": lambda x: centred(x) * (x.var(-1, correction=0, keepdim=True) + EPS) ** -0.5,
    "var_mean": over_var_mean,
    "sums": of_sums,
}


def once_centred(x: Tensor) -> Tensor:
    deviation = centred(x)
    return deviation * torch.rsqrt(deviation.square().mean(-1, keepdim=True) + EPS)


LAYER_NORMS["once_centred"] = once_centred
COMPOSITES = ("attnlrp", "cp_lrp", "epsilon", "relp", "mamba_lrp", "dynamiclrp", "bcos", "epsilon_plus", "deep_lift")


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_layer_norms_follow_the_ln_rule(name: str) -> None:
    """R_x = x times the derivative with the deviation held constant (CP-LRP)."""
    x, seed = random(2, 3, WIDTH), random(2, 3, WIDTH)
    explained = compile_for_lrp(Op(LAYER_NORMS[name]), "attnlrp")
    assert patterns_in(explained, x) == {"layer_norm": 1}
    leaf = x.clone().requires_grad_()
    deviation = torch.sqrt(leaf.var(-1, unbiased=False, keepdim=True) + EPS).detach()
    (grad,) = torch.autograd.grad(centred(leaf) / deviation, leaf, seed)
    assert relative_error(explained.attribute(x, seed), x * grad) <= FLOAT64
    theirs = compile_for_lrp(Op(LAYER_NORMS[name]), "attnlrp", reference=True).attribute(x, seed)
    assert relative_error(theirs, x * grad) <= FLOAT64


@pytest.mark.parametrize(("composite", "name"), covering([*COMPOSITES, "input_x_gradient"], list(LAYER_NORMS)))
def test_layer_norms_are_what_torchs_is_under_every_composite(name: str, composite: str) -> None:
    x, seed = random(2, WIDTH), random(2, WIDTH)
    native = nn.LayerNorm(WIDTH, eps=EPS, elementwise_affine=False)
    found, expected = (
        compile_for_lrp(model, composite).attribute(x, seed) for model in (Op(LAYER_NORMS[name]), native)
    )
    assert relative_error(found, expected) <= FLOAT64


def test_unbiased_deviations_are_held_constant_too() -> None:
    x, seed = random(2, WIDTH), random(2, WIDTH)
    explained = compile_for_lrp(Op(lambda x: centred(x) / (x.std(-1, keepdim=True) + EPS)), "attnlrp")
    assert patterns_in(explained, x) == {"layer_norm": 1}
    weighted = seed / (x.std(-1, keepdim=True) + EPS)
    expected = x * (weighted - weighted.mean(-1, keepdim=True))
    assert relative_error(explained.attribute(x, seed), expected) <= FLOAT64


@pytest.mark.parametrize("name", [*RMS_NORMS, *LAYER_NORMS])
def test_ledgers_close_and_differences_are_complete(name: str) -> None:
    fn = {**RMS_NORMS, **LAYER_NORMS}[name]
    x, x0, seed = random(2, 3, WIDTH), random(2, 3, WIDTH), random(2, 3, WIDTH)
    _, tape = compile_for_lrp(Op(fn), "attnlrp").run(x)
    assert max(row.relative_gap for row in tape.ledger((1, 2)).rows) <= FLOAT64
    explained = compile_for_lrp(Op(fn), "deep_lift")
    shares = explained.attribute(x, seed, baselines=x0)
    difference = float((seed * (fn(x) - fn(x0))).sum())
    assert abs(float(shares.sum()) - difference) <= FLOAT64 * float(shares.abs().sum())


def shared_centring(x: Tensor) -> Tensor:
    deviation = centred(x)
    return torch.cat([deviation / torch.sqrt(mean_square(deviation) + EPS), deviation], -1)


def test_what_others_read_of_a_norm_keeps_its_own_rule() -> None:
    """The centred value is an output too: it stays an op, and the norm is one of the centred value."""
    x, seed = random(2, WIDTH), random(2, 2 * WIDTH)
    explained = compile_for_lrp(Op(shared_centring), "attnlrp")
    assert patterns_in(explained, x) == {"rms_norm": 1}
    leaf = x.clone().requires_grad_()
    deviation = centred(leaf)
    scale = torch.sqrt(mean_square(deviation) + EPS).detach()
    (grad,) = torch.autograd.grad(torch.cat([deviation / scale, deviation], -1), leaf, seed)
    assert relative_error(explained.attribute(x, seed), x * grad) <= FLOAT64


NO_NORMS: dict[str, Spelling] = {
    "of_another_value": lambda x: x * torch.rsqrt(mean_square(x + OTHER) + EPS),
    "of_its_cube": lambda x: x * torch.rsqrt((x.pow(2) * x).mean(-1, keepdim=True) ** 2 + EPS),
    "softsign": lambda x: x / (1 + x.norm(dim=-1, keepdim=True)),
    "squared_norm": lambda x: x / (mean_square(x) + EPS),
    "fourth_root": lambda x: x * (mean_square(x) + EPS) ** -0.25,
    "times_norm": lambda x: x * torch.sqrt(mean_square(x) + EPS),
    "all_elements": lambda x: x / torch.sqrt(x.pow(2).mean() + EPS),
    "over_samples": lambda x: x / torch.sqrt(x.pow(2).mean(0, keepdim=True) + EPS),
    "standardised": lambda x: (x - x.mean(0)) / (x.std(0) + EPS),
    "transposed": lambda x: x.unflatten(-1, (3, 2)).pow(2).mean(-1).mean(-1, keepdim=True).rsqrt() * x,
    "uncentred_over_std": lambda x: x / (x.std(-1, keepdim=True) + EPS),
    "centred_over_rms": lambda x: centred(x) / torch.sqrt(mean_square(x) + EPS),
    "absolute_mean": lambda x: x / x.abs().mean(-1, keepdim=True),
    "largest": lambda x: x / x.abs().amax(-1, keepdim=True),
    "sum_to_one": lambda x: x / x.sum(-1, keepdim=True),
    "times_another": lambda x: x * x.roll(1, -1) / torch.sqrt(mean_square(x) + EPS),
    "own_square_times": lambda x: x * x.square().mean(-1, keepdim=True),
}


@pytest.mark.parametrize("name", NO_NORMS)
def test_near_misses_are_no_norms(name: str) -> None:
    assert report_of(NO_NORMS[name], random(WIDTH, WIDTH)) == {}


def test_a_statistic_of_the_wrong_group_is_no_norm() -> None:
    """A square tensor whose rows meet the statistics of its columns."""
    assert report_of(lambda x: x * torch.rsqrt(x.pow(2).mean(-1) + EPS), random(WIDTH, WIDTH)) == {}
    assert report_of(lambda x: x * torch.rsqrt(x.pow(2).mean(-2) + EPS).unsqueeze(-1), random(2, WIDTH, WIDTH)) == {}


class Weighted(nn.Module):
    """A linear map whose weight is g v / ||v||, in four spellings and torch's own."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.v, self.g = nn.Parameter(random(4, WIDTH)), nn.Parameter(random(4, 1))
        if spelling == "torch":
            self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 4).double())

    def forward(self, x: Tensor) -> Tensor:
        norm = self.v.norm(dim=1, keepdim=True)
        if self.spelling == "torch":
            return self.linear(x)
        spelled = {
            "gain_first": lambda: self.g * self.v / norm,
            "gain_last": lambda: self.g * (self.v / norm),
            "ratio": lambda: self.v * (self.g / norm),
            "normalize": lambda: F.normalize(self.v, dim=1) * self.g,
        }
        return F.linear(x, spelled[self.spelling]())


@pytest.mark.parametrize("spelling", ["gain_first", "gain_last", "ratio", "normalize", "torch"])
def test_weight_norms_are_known(spelling: str) -> None:
    """The weight is a constant to the input's relevance: x times W^T c."""
    model, x, seed = Weighted(spelling).double(), random(3, WIDTH), random(3, 4)
    explained = compile_for_lrp(model, "attnlrp")
    assert patterns_in(explained, x) == {"weight_norm": 1}
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(leaf), leaf, seed)
    assert relative_error(explained.attribute(x, seed), x * grad) <= FLOAT64


def test_a_weight_over_another_norm_is_no_weight_norm() -> None:
    model = Weighted("torch").double()
    model.fn = lambda x: F.linear(x, model.v / model.g.norm(dim=1, keepdim=True))
    model.forward = model.fn
    assert patterns_in(compile_for_lrp(model, "attnlrp"), random(3, WIDTH)) == {}
