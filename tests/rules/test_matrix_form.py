"""Every rule against an independent restatement in relevance space, as the papers write it.

The compiler works on coefficients c (R = a * c). Here each rule is stated once more, slowly, on relevances:
with explicit weight matrices, divisions by activations and no kernel of ours. Papers, by the names used here:

* Bach: Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by LRP", PLoS ONE 2015.
* AttnLRP: Achtibat et al., "Attention-Aware Layer-Wise Relevance Propagation for Transformers", ICML 2024.
* CP-LRP: Ali et al., "XAI for Transformers: Better Explanations through Conservative Propagation", ICML 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401 (it registers the product by groups)
from catalogue import note
from functions import ACTIVATIONS, WITH_OFFSET, Op, gelu_new
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from lrp_compiler import Composite, compile_for_lrp, composites, errors
from lrp_compiler.kernels.gates import GATES
from lrp_compiler.kernels.offset_gates import OFFSET_GATES

Tensors = tuple[Tensor, ...]
Restatement = Callable[[Tensors, Tensor], Tensors]
"""(inputs, relevance of the output) -> relevance of the inputs."""

TOLERANCE = 1e-10
"""Of the largest expected relevance. The restatements divide by activations, which the compiler never does:
each quotient loses about eps * |a / z| in float64, and 1e-10 allows |a / z| up to 1e5."""

STEP = 1e-8
"""Step of one-sided difference quotients at zero; truncation error and eps / STEP are both of this size."""

REAL_EPSILON = 0.1
"""A stabiliser that changes relevances visibly, unlike the 1e-6 of most libraries."""


pytestmark = pytest.mark.usefixtures("float64")


# --- how relevances are obtained and compared ---------------------------------------------------------------


def assert_same(got: Tensors, expected: Tensors) -> float:
    """Equal to TOLERANCE times the largest expected relevance of any input; the largest error in that unit."""
    scale = max(float(e.detach().abs().max()) for e in expected)
    worst = 0.0
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        assert torch.isfinite(g).all()
        error = float((g - e).detach().abs().max())
        assert error <= TOLERANCE * scale
        worst = max(worst, error / scale if scale else 0.0)
    return worst


def check(
    model: nn.Module,
    inputs: Tensors,
    restatement: Restatement,
    composite: str | Composite = "attnlrp",
    reference: bool = False,
) -> None:
    """The compiled relevances of ``inputs``, for a random seed at the output, are the restatement's."""
    output = model(*inputs).detach()
    seed = torch.randn_like(output)
    explained = compile_for_lrp(model, composite, reference=reference)
    found, expected = explained.attribute(inputs, seed), restatement(inputs, output * seed)
    error = assert_same(found, expected)
    if not reference:
        note(explained, inputs, {}, "matrix form", error)


def check_conservation(model: nn.Module, inputs: Tensors, composite: str | Composite = "attnlrp") -> None:
    """What the seed puts in arrives at the inputs or in a named sink."""
    output, tape = compile_for_lrp(model, composite).run(*inputs)
    seed = torch.randn_like(output)
    found = tape.relevance(seed, at=list(tape.program.attributed)).values()
    sunk = [sink for kinds in tape.sinks(seed).values() for sink in kinds.values()]
    given_in = output * seed
    total = sum(float(value.detach().sum()) for value in [*found, *sunk])
    magnitude = sum(float(value.detach().abs().sum()) for value in [given_in, *found, *sunk])
    assert abs(total - float(given_in.detach().sum())) <= TOLERANCE * magnitude


# --- the building blocks of the restatements ----------------------------------------------------------------


def ratio(relevance: Tensor, z: Tensor) -> Tensor:
    """R / z; an activation of exactly zero carries no relevance."""
    return torch.where(z == 0, 0, relevance / torch.where(z == 0, 1, z))


def matrix(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The weights (outputs, inputs) of an affine map, one row per output element."""
    weights = jacobian(fn, x)
    return weights.reshape(-1, x.numel())


def decomposed(fn: Callable[..., Tensor], inputs: Tensors, relevance: Tensor, epsilon: float = 0.0) -> Tensors:
    """Bach eqs. 56 and 58: R_i = sum_j x_i w_ji / (z_j + epsilon sign(z_j)) R_j, the bias being part of z_j.

    ``fn`` is affine in each of its inputs; of several inputs each is decomposed with the others in the bias.
    """
    z = fn(*inputs).detach()
    z = z + epsilon * torch.where(z < 0, -1.0, 1.0)
    share = ratio(relevance, z).flatten()
    found = []
    for place, x in enumerate(inputs):
        weights = matrix(lambda value, at=place: fn(*inputs[:at], value, *inputs[at + 1 :]), x)
        found.append(x * (weights.T @ share).view_as(x))
    return tuple(found)


def proportional(fn: Callable[..., Tensor], epsilon: float = 0.0) -> Restatement:
    """``decomposed`` as a restatement."""
    return lambda inputs, relevance: decomposed(fn, inputs, relevance, epsilon)


def unchanged(inputs: Tensors, relevance: Tensor) -> Tensors:
    """The identity rule (AttnLRP eq. 9): R_x = R_y."""
    return (relevance,)


# --- linear maps: LRP-0 and epsilon -------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A module and the shapes of its inputs."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]

    def inputs(self) -> Tensors:
        return tuple(torch.randn(shape) for shape in self.shapes)


def op(fn: Callable[..., Tensor], *shapes: tuple[int, ...], constant: tuple[int, ...] | None = None) -> Case:
    """A case of one function, whose last argument may be a constant of a given shape."""
    return Case(lambda: Op(fn, *([] if constant is None else [torch.randn(constant)])), shapes)


by_groups = torch.ops.transformers.grouped_mm_fallback
"""Rows of x times the matrix of their group, which ends at the offset given for it."""

LINEAR_MAPS = {
    "linear": Case(lambda: nn.Linear(5, 3), ((2, 5),)),
    "linear_without_bias": Case(lambda: nn.Linear(5, 3, bias=False), ((2, 5),)),
    "linear_of_sequence": Case(lambda: nn.Linear(5, 3), ((2, 3, 5),)),
    "linear_of_vector": Case(lambda: nn.Linear(5, 3), ((5,),)),
    "conv1d_strided_padded": Case(lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), ((2, 2, 7),)),
    "conv1d_same": Case(lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=2), ((2, 2, 8),)),
    "conv2d": Case(lambda: nn.Conv2d(2, 3, 3), ((2, 2, 5, 4),)),
    "conv2d_unbatched": Case(lambda: nn.Conv2d(2, 3, 3), ((2, 5, 4),)),
    "conv2d_all_options": Case(
        lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2), ((2, 4, 6, 5),)
    ),
    "conv2d_depthwise_without_bias": Case(lambda: nn.Conv2d(3, 3, 2, groups=3, bias=False), ((1, 3, 4, 4),)),
    "conv2d_circular": Case(lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), ((1, 2, 4, 4),)),
    "conv3d_all_options": Case(
        lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=1, dilation=(1, 1, 2), groups=2),
        ((1, 2, 3, 4, 4),),
    ),
    "conv_transpose1d": Case(lambda: nn.ConvTranspose1d(2, 3, 3, 2, padding=1, output_padding=1), ((2, 2, 4),)),
    "conv_transpose2d_all_options": Case(
        lambda: nn.ConvTranspose2d(4, 4, 3, stride=(2, 1), padding=1, groups=2, dilation=(1, 2)),
        ((1, 4, 3, 4),),
    ),
    "conv_transpose3d": Case(lambda: nn.ConvTranspose3d(2, 2, 2, stride=2), ((1, 2, 2, 2, 3),)),
    "matmul": op(lambda x, w: x @ w, (2, 4), constant=(4, 3)),
    "matmul_from_the_left": op(lambda x, w: w @ x, (2, 4), constant=(3, 2)),
    "matmul_broadcast": op(lambda x, w: x @ w, (2, 3, 4), constant=(4, 3)),
    "matmul_with_vector": op(lambda x, w: x @ w, (2, 4), constant=(4,)),
    "mm": op(lambda x, w: torch.mm(x, w), (2, 4), constant=(4, 3)),
    "bmm": op(lambda x, w: torch.bmm(x, w), (2, 3, 4), constant=(2, 4, 3)),
    "addmm": op(lambda x, w: torch.addmm(w[0], x, w), (2, 4), constant=(4, 3)),
    "baddbmm": op(lambda x, w: torch.baddbmm(w[:, :1], x, w), (2, 3, 4), constant=(2, 4, 3)),
    "grouped": op(lambda x, w: by_groups(x, w, torch.tensor([2, 2, 5])), (5, 4), constant=(3, 4, 2)),
    "einsum": op(lambda x, w: torch.einsum("bij,jk->bki", x, w), (2, 3, 4), constant=(4, 3)),
}


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", LINEAR_MAPS)
def test_linear_maps_follow_lrp_0(name: str, reference: bool) -> None:
    """LRP-0 (Bach eq. 56): the ratio of contributions, the bias in the denominator."""
    model = LINEAR_MAPS[name].make()
    check(model, LINEAR_MAPS[name].inputs(), proportional(model), "epsilon", reference)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", LINEAR_MAPS)
def test_linear_maps_follow_a_real_epsilon(name: str, reference: bool) -> None:
    """The epsilon rule (Bach eq. 58) with sign(0) = +1 (zennit's convention)."""
    model = LINEAR_MAPS[name].make()
    restatement = proportional(model, REAL_EPSILON)
    check(model, LINEAR_MAPS[name].inputs(), restatement, composites.epsilon(REAL_EPSILON), reference)


# --- sums, averages and data movement: the same ratio -------------------------------------------------------

INTO = torch.tensor([[0], [1], [0], [0]]).expand(4, 3)
"""Where scattered rows go."""

SUMS = {
    "add": op(torch.add, (2, 3), (2, 3)),
    "add_broadcast": op(torch.add, (2, 1, 3), (4, 1)),
    "add_scaled": op(lambda a, b: torch.add(a, b, alpha=-0.5), (2, 3), (2, 3)),
    "add_to_itself": op(lambda a: a + a.flip(-1), (2, 3)),
    "add_constant": op(torch.add, (2, 3), constant=(3,)),
    "add_number": op(lambda a: a + 1.5, (2, 3)),
    "sub": op(torch.sub, (2, 3), (2, 3)),
    "sub_broadcast": op(torch.sub, (2, 3), (3,)),
    "sub_from_constant": op(lambda a, k: k - a, (2, 3), constant=(3,)),
    "rsub_number": op(lambda a: 1.0 - a, (2, 3)),
    "neg": op(torch.neg, (2, 3)),
    "mul_by_constant": op(torch.mul, (2, 3), constant=(3,)),
    "div_by_constant": op(torch.div, (2, 3), constant=(3,)),
    "mean": op(lambda x: x.mean((1, 2)), (2, 3, 4)),
    "mean_of_all": op(lambda x: x.mean().view(1), (2, 3)),
    "sum": op(lambda x: x.sum(1, keepdim=True), (2, 3, 4)),
    "cumsum": op(lambda x: x.cumsum(1), (2, 4)),
    "scatter_sum": op(lambda x: torch.ones(2, 3).scatter_reduce(0, INTO, x, "sum"), (4, 3)),
    "scatter_mean": op(lambda x: torch.ones(2, 3).scatter_reduce(0, INTO, x, "mean"), (4, 3)),
    "scatter_mean_alone": op(
        lambda x: torch.zeros(2, 3).scatter_reduce(0, INTO, x, "mean", include_self=False), (4, 3)
    ),
    "avg_pool1d": op(lambda x: F.avg_pool1d(x, 3, 2, padding=1), (2, 2, 6)),
    "avg_pool2d": op(lambda x: F.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False), (1, 2, 5, 5)),
    "avg_pool2d_overlapping": op(lambda x: F.avg_pool2d(x, 3, 1, ceil_mode=True), (1, 2, 4, 5)),
    "avg_pool3d": op(lambda x: F.avg_pool3d(x, 2, 1), (1, 2, 3, 3, 3)),
    "adaptive_avg_pool1d": op(lambda x: F.adaptive_avg_pool1d(x, 3), (2, 2, 7)),
    "adaptive_avg_pool2d": op(lambda x: F.adaptive_avg_pool2d(x, (2, 3)), (1, 2, 5, 4)),
    "global_avg_pool2d": op(lambda x: F.adaptive_avg_pool2d(x, 1), (1, 2, 5, 4)),
    "adaptive_avg_pool3d": op(lambda x: F.adaptive_avg_pool3d(x, 2), (1, 2, 3, 3, 3)),
    "interpolate_nearest": op(lambda x: F.interpolate(x, scale_factor=2.0), (1, 2, 3, 3)),
    "interpolate_bilinear": op(lambda x: F.interpolate(x, (5, 7), mode="bilinear"), (1, 2, 3, 4)),
    "interpolate_linear_1d": op(lambda x: F.interpolate(x, 5, mode="linear"), (1, 2, 3)),
    "interpolate_nearest_3d": op(lambda x: F.interpolate(x, scale_factor=2.0), (1, 1, 2, 2, 2)),
    "interpolate_trilinear": op(lambda x: F.interpolate(x, (3, 2, 5), mode="trilinear"), (1, 1, 2, 3, 3)),
    "interpolate_nearest_exact": op(lambda x: F.interpolate(x, (2, 5), mode="nearest-exact"), (1, 2, 3, 3)),
    "interpolate_area": op(lambda x: F.interpolate(x, (2, 3), mode="area"), (1, 2, 3, 4)),
    "interpolate_bilinear_antialiased": op(
        lambda x: F.interpolate(x, (2, 3), mode="bilinear", antialias=True), (1, 2, 5, 4)
    ),
    "interpolate_bicubic_antialiased": op(
        lambda x: F.interpolate(x, (6, 2), mode="bicubic", antialias=True), (1, 1, 4, 5)
    ),
    "interpolate_bicubic": op(lambda x: F.interpolate(x, (5, 4), mode="bicubic", align_corners=True), (1, 1, 4, 3)),
}

MOVES = {
    "view": op(lambda x: x.view(3, 4), (2, 6)),
    "reshape_of_transposed": op(lambda x: x.transpose(0, 1).reshape(2, 6), (3, 4)),
    "flatten": op(lambda x: x.flatten(1), (2, 3, 2)),
    "transpose": op(lambda x: x.transpose(1, 2), (2, 3, 4)),
    "permute": op(lambda x: x.permute(2, 0, 1), (2, 3, 4)),
    "squeeze": op(lambda x: x.squeeze(1).unsqueeze(-1), (2, 1, 3)),
    "cat": op(lambda a, b: torch.cat([a, b, a], 1), (2, 3), (2, 2)),
    "cat_with_constant": op(lambda a, k: torch.cat([k, a], 1), (2, 3), constant=(2, 2)),
    "stack": op(lambda a, b: torch.stack([a, b], 1), (2, 3), (2, 3)),
    "split": op(lambda x: torch.cat(x.split([1, 3, 1], 1)[::2]), (2, 5)),
    "chunk_dropping_one": op(lambda x: x.chunk(3, 1)[1], (2, 6)),
    "unbind": op(lambda x: x.unbind(1)[2], (2, 3)),
    "slice": op(lambda x: x[:, 1:6:2], (2, 7)),
    "select": op(lambda x: x[:, -1], (2, 3)),
    "index": op(lambda x: x[:, torch.tensor([0, 2, 0])], (2, 3)),
    "index_select": op(lambda x: x.index_select(1, torch.tensor([1, 1, 0])), (2, 3)),
    "gather": op(lambda x: x.gather(1, torch.tensor([[0, 0], [2, 1]])), (2, 3)),
    "pad_zero": op(lambda x: F.pad(x, (1, 2)), (2, 3)),
    "pad_constant": op(lambda x: F.pad(x, (1, 0, 0, 1), value=5.0), (2, 3)),
    "pad_reflect": op(lambda x: F.pad(x, (2, 1), mode="reflect"), (1, 2, 4)),
    "pad_replicate": op(lambda x: F.pad(x, (2, 1), mode="replicate"), (1, 2, 4)),
    "flip": op(lambda x: x.flip(0, 1), (2, 3)),
    "roll": op(lambda x: x.roll((1, 2), (0, 1)), (2, 3)),
    "repeat": op(lambda x: x.repeat(2, 3), (2, 3)),
    "repeat_interleave": op(lambda x: x.repeat_interleave(2, 1), (2, 3)),
    "expand": op(lambda x: x.expand(4, 2, 3), (2, 1)),
    "masked_fill": op(lambda x: x.masked_fill(torch.eye(3).bool(), -2.0), (3, 3)),
    "where_two": op(lambda a, b: torch.where(torch.eye(3).bool(), a, b), (3, 3), (3, 3)),
    "where_constant": op(lambda a, k: torch.where(torch.eye(3).bool(), a, k), (3, 3), constant=(3, 3)),
    "tril": op(torch.tril, (3, 3)),
    "unfold": op(lambda x: x.unfold(1, 3, 1), (2, 5)),
    "nan_to_num": op(lambda x: torch.nan_to_num(x, 2.0), (2, 3)),
    "pixel_shuffle": op(lambda x: F.pixel_shuffle(x, 2), (1, 4, 2, 3)),
    "channel_shuffle": op(lambda x: nn.ChannelShuffle(3)(x), (1, 6, 2, 2)),
    "max_unpool2d": op(lambda x: F.max_unpool2d(x, torch.tensor([[[[0, 6], [8, 15]]]]), 2), (1, 1, 2, 2)),
    "max_unpool3d": op(lambda x: F.max_unpool3d(x, torch.tensor([[[[[5]]], [[[2]]]]]), 2), (1, 2, 1, 1, 1)),
}


LOG_SUM_EXP = op(lambda x: x.logsumexp((0, 2)), (2, 3, 4))


@pytest.mark.parametrize("reference", [False, True])
def test_log_sum_exp_weights_by_softmax_and_keeps_the_entropy(reference: bool) -> None:
    """logsumexp(x) = sum of p x + the entropy of p = softmax(x): the first term's share is x's, the second a sink."""

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        p = torch.softmax(inputs[0].transpose(0, 1).flatten(1), -1).unflatten(1, (2, 4)).transpose(0, 1)
        share = ratio(relevance, LOG_SUM_EXP.make()(*inputs))
        return (inputs[0] * p * share[None, :, None],)

    check(LOG_SUM_EXP.make(), LOG_SUM_EXP.inputs(), restatement, "attnlrp", reference)
    check_conservation(LOG_SUM_EXP.make(), LOG_SUM_EXP.inputs())


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", SUMS)
def test_sums_and_averages_follow_the_ratio_rule(name: str, reference: bool) -> None:
    """AttnLRP eq. 8 and Bach eq. 56: linear ops without parameters are decomposed like any linear map."""
    model = SUMS[name].make()
    check(model, SUMS[name].inputs(), proportional(model), "epsilon", reference)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", MOVES)
def test_data_movement_carries_relevance_along(name: str, reference: bool) -> None:
    """A move is a linear map of zeros and ones; copies add up and constants keep their share."""
    model = MOVES[name].make()
    check(model, MOVES[name].inputs(), proportional(model), "attnlrp", reference)


# --- winners ------------------------------------------------------------------------------------------------

WINNERS = {
    "scatter_amax": op(lambda x: torch.zeros(2, 3).scatter_reduce(0, INTO, x, "amax", include_self=False), (4, 3)),
    "scatter_amin": op(lambda x: torch.full((2, 3), 9.0).scatter_reduce(0, INTO, x, "amin"), (4, 3)),
    "max_pool1d": op(lambda x: F.max_pool1d(x, 3, 2), (2, 2, 7)),
    "max_pool2d": op(lambda x: F.max_pool2d(x, 2), (2, 2, 4, 4)),
    "max_pool2d_overlapping": op(lambda x: F.max_pool2d(x, 3, 1, padding=1), (2, 2, 4, 5)),
    "max_pool2d_dilated": op(lambda x: F.max_pool2d(x, 2, 1, dilation=2, ceil_mode=True), (1, 2, 5, 5)),
    "max_pool3d_overlapping": op(lambda x: F.max_pool3d(x, 2, 1), (1, 2, 3, 3, 3)),
    "adaptive_max_pool1d": op(lambda x: F.adaptive_max_pool1d(x, 3), (1, 2, 7)),
    "adaptive_max_pool2d": op(lambda x: F.adaptive_max_pool2d(x, (2, 3)), (1, 2, 5, 4)),
    "amax": op(lambda x: x.amax(1), (2, 5)),
    "amin": op(lambda x: x.amin((1, 2)), (2, 3, 2)),
    "max_of_dim": op(lambda x: x.max(1).values, (2, 5)),
    "min_of_dim": op(lambda x: x.min(1).values, (2, 5)),
    "topk": op(lambda x: x.topk(2, 1).values, (2, 5)),
    "sort": op(lambda x: x.sort(1).values, (2, 5)),
}


def winner_takes_all(output: Tensor) -> Restatement:
    """Each window's winner gets its relevance; random values are distinct, so equality finds the winner."""

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        (x,) = inputs
        won = (x.reshape(-1, 1) == output.reshape(1, -1)).to(x.dtype)
        return ((won @ relevance.flatten()).view_as(x),)

    return restatement


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", WINNERS)
def test_the_winner_takes_all(name: str, reference: bool) -> None:
    """Max pooling and its relatives; what a value wins in overlapping windows adds up."""
    model, inputs = WINNERS[name].make(), WINNERS[name].inputs()
    check(model, inputs, winner_takes_all(model(*inputs)), "epsilon", reference)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(("fn", "sign"), [(torch.maximum, 1), (torch.minimum, -1)])
def test_the_larger_of_two_takes_all(fn: Callable[..., Tensor], sign: int, reference: bool) -> None:
    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        first_wins = sign * (inputs[0] - inputs[1]) > 0
        return torch.where(first_wins, relevance, 0), torch.where(first_wins, 0, relevance)

    check(Op(fn), (torch.randn(2, 3), torch.randn(2, 3)), restatement, "epsilon", reference)


# --- products of live operands: the uniform rule ------------------------------------------------------------


def halves(inputs: Tensors, relevance: Tensor) -> Tensors:
    """AttnLRP Prop. 3.2: each of two factors gets half, summed over what was broadcast."""
    return tuple((relevance / 2).sum_to_size(x.shape) for x in inputs)


def halved_matmul(inputs: Tensors, relevance: Tensor) -> Tensors:
    """AttnLRP Prop. 3.3: R_A = A * (R / 2O) B^T and R_B = B * A^T (R / 2O), for O = A B.

    A third term added to the product takes its ratio of the sum (eq. 8) before the product is split.
    """
    a, b, *added = inputs
    share = relevance / (a @ b + sum(added))
    on_a = (a * (share / 2 @ b.mT)).sum_to_size(a.shape)
    on_b = (b * (a.mT @ share / 2)).sum_to_size(b.shape)
    return on_a, on_b, *((term * share).sum_to_size(term.shape) for term in added)


def halved_broadcast_matmul(inputs: Tensors, relevance: Tensor) -> Tensors:
    """``halved_matmul`` of a batch with one matrix: the matrix collects from the whole batch."""
    a, b = inputs
    on_a, on_b = halved_matmul((a, b.expand(*a.shape[:-2], *b.shape[-2:])), relevance)
    return on_a, on_b.sum_to_size(b.shape)


PRODUCTS: dict[str, tuple[Case, Restatement]] = {
    "mul": (op(torch.mul, (2, 3), (2, 3)), halves),
    "mul_broadcast": (op(torch.mul, (2, 1, 3), (4, 1)), halves),
    "mul_by_itself": (op(lambda x: x * x, (2, 3)), unchanged),
    "mm": (op(torch.mm, (2, 3), (3, 4)), halved_matmul),
    "bmm": (op(torch.bmm, (2, 3, 4), (2, 4, 3)), halved_matmul),
    "matmul_four_dims": (op(torch.matmul, (2, 2, 3, 4), (2, 2, 4, 3)), halved_matmul),
    "matmul_broadcast": (op(torch.matmul, (2, 3, 4), (4, 3)), halved_broadcast_matmul),
    "einsum": (op(lambda a, b: torch.einsum("bij,bjk->bik", a, b), (2, 3, 4), (2, 4, 3)), halved_matmul),
    "addmm": (op(lambda a, b, c: torch.addmm(c, a, b), (2, 3), (3, 4), (2, 4)), halved_matmul),
    "baddbmm": (op(lambda a, b, c: torch.baddbmm(c, a, b), (2, 2, 3), (2, 3, 4), (2, 2, 4)), halved_matmul),
    "linear_with_made_weight": (
        op(lambda a, b: F.linear(a, b.mT), (2, 3), (3, 4)),
        halved_matmul,
    ),
}


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_share_evenly(name: str, reference: bool) -> None:
    case, restatement = PRODUCTS[name]
    check(case.make(), case.inputs(), restatement, "attnlrp", reference)


@pytest.mark.parametrize("reference", [False, True])
def test_division_gives_everything_to_the_numerator(reference: bool) -> None:
    """The LN-rule (CP-LRP, proposition on layer normalisation): the denominator is a constant."""

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        return relevance, torch.zeros_like(inputs[1])

    check(Op(torch.div), (torch.randn(2, 3), torch.rand(2, 3) + 1), restatement, "attnlrp", reference)


# --- activations: the identity rule -------------------------------------------------------------------------


def gelu_fast(x: Tensor) -> Tensor:
    """GELU as Hugging Face's FastGELUActivation spells it."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


SPELLINGS = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu_fast": gelu_fast}

PLACES = torch.tensor([-6.0, -2.5, -1.0, -0.3, -1e-10, 1e-10, 0.1, 0.7, 1.0, 2.5, 7.0], dtype=torch.float64)
"""Both sides of every kink, and next to zero."""


def test_every_gate_is_tested() -> None:
    assert ACTIVATIONS.keys() == GATES.keys() and WITH_OFFSET.keys() == OFFSET_GATES.keys()


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", [*ACTIVATIONS, *SPELLINGS])
def test_activations_pass_relevance_on(name: str, reference: bool) -> None:
    """AttnLRP eq. 9: R_x = R_y wherever x is not zero."""
    model = Op({**ACTIVATIONS, **SPELLINGS}[name])
    check(model, (PLACES.clone(),), unchanged, "attnlrp", reference)


@pytest.mark.parametrize("name", [*ACTIVATIONS, *SPELLINGS])
def test_coefficients_of_activations_at_zero(name: str) -> None:
    """At x = 0 the coefficient is f'(0), or lies between the slopes of the two sides where f has a kink."""
    fn = {**ACTIVATIONS, **SPELLINGS}[name]
    _, tape = compile_for_lrp(Op(fn), "attnlrp").run(torch.zeros(3))
    found = tape.coefficients(torch.ones(3))
    slopes = fn(torch.tensor([-STEP, STEP])) / torch.tensor([-STEP, STEP])
    assert (found >= slopes.min() - STEP).all()
    assert (found <= slopes.max() + STEP).all()
    assert (tape.relevance(torch.ones(3)) == 0).all()


@pytest.mark.parametrize("fn", [gelu_new, gelu_fast])
def test_spelled_gelu_is_recognised(fn: Callable[[Tensor], Tensor]) -> None:
    assert compile_for_lrp(Op(fn), "attnlrp").report(torch.randn(4)).patterns == {"gelu_tanh": 1}


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", WITH_OFFSET)
def test_functions_that_do_not_vanish_pass_relevance_on(name: str, reference: bool) -> None:
    """AttnLRP eq. 9 where f(0) != 0: R_x = R_y even at x = 0, where no coefficient exists."""
    x = torch.cat([torch.zeros(1), PLACES])
    check(Op(WITH_OFFSET[name]), (x,), unchanged, "attnlrp", reference)


# --- normalisation ------------------------------------------------------------------------------------------


def normalised_rows(weight: Tensor, bias: Tensor, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The LN-rule of CP-LRP on rows of x: y = diag(w / std) (I - 11^T / n) x + b with std a constant."""

    def restatement(x: Tensor, relevance: Tensor) -> Tensor:
        size = x.shape[-1]
        centring = torch.eye(size) - torch.ones(size, size) / size
        found = torch.empty_like(x)
        for row in range(x.shape[0]):
            std = torch.sqrt(x[row].var(unbiased=False) + eps)
            weights = torch.diag(weight / std) @ centring
            share = ratio(relevance[row], weights @ x[row] + bias)
            found[row] = x[row] * (weights.T @ share)
        return found

    return restatement


def random_affine(norm: nn.Module) -> nn.Module:
    """The norm with random weight and bias instead of ones and zeros."""
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def layer_norm_restatement(norm: nn.LayerNorm) -> Restatement:
    """``normalised_rows`` over the last dimensions."""
    size = math.prod(norm.normalized_shape)
    weight = torch.ones(size) if norm.weight is None else norm.weight.detach().flatten()
    bias = torch.zeros(size) if norm.bias is None else norm.bias.detach().flatten()
    rows = normalised_rows(weight, bias, norm.eps)

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        (x,) = inputs
        return (rows(x.reshape(-1, size), relevance.reshape(-1, size)).view(x.shape),)

    return restatement


LAYER_NORMS = {
    "affine": Case(lambda: nn.LayerNorm(5), ((2, 3, 5),)),
    "plain": Case(lambda: nn.LayerNorm(5, elementwise_affine=False), ((2, 5),)),
    "without_bias": Case(lambda: nn.LayerNorm(5, bias=False), ((2, 5),)),
    "two_dims": Case(lambda: nn.LayerNorm((3, 4)), ((2, 3, 4),)),
    "large_eps": Case(lambda: nn.LayerNorm(5, eps=0.5), ((2, 5),)),
}


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", LAYER_NORMS)
def test_layer_norm_follows_the_ln_rule(name: str, reference: bool) -> None:
    norm = random_affine(LAYER_NORMS[name].make())
    assert isinstance(norm, nn.LayerNorm)
    check(norm, LAYER_NORMS[name].inputs(), layer_norm_restatement(norm), "attnlrp", reference)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(("groups", "shape"), [(2, (2, 4, 3)), (1, (2, 4, 3, 2)), (4, (1, 4, 3, 2))])
def test_group_norm_follows_the_ln_rule_per_group(groups: int, shape: tuple[int, ...], reference: bool) -> None:
    norm = random_affine(nn.GroupNorm(groups, shape[1]))

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        (x,) = inputs
        spread = math.prod(shape[2:])
        found = torch.empty_like(x)
        members = shape[1] // groups
        for group in range(groups):
            channels = slice(group * members, (group + 1) * members)
            weight = norm.weight.detach()[channels].repeat_interleave(spread)
            bias = norm.bias.detach()[channels].repeat_interleave(spread)
            rows = normalised_rows(weight, bias, norm.eps)
            part = rows(x[:, channels].flatten(1), relevance[:, channels].flatten(1))
            found[:, channels] = part.view_as(x[:, channels])
        return (found,)

    check(norm, (torch.randn(shape),), restatement, "attnlrp", reference)


def rms_norm_pow(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rms_norm_square(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def rms_norm_product(x: Tensor, weight: Tensor) -> Tensor:
    return (1.0 + weight) * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6))


def rms_norm_division(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rms_norm_functional(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


RECOGNISED = [rms_norm_pow, rms_norm_square, rms_norm_product, rms_norm_functional, rms_norm_division]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("spelling", RECOGNISED)
def test_rms_norm_passes_relevance_on(spelling: Callable[..., Tensor], reference: bool) -> None:
    """AttnLRP Prop. 3.4 and eq. 9: R_x = R_y, in whatever way RMSNorm is spelled."""
    check(Op(spelling, torch.randn(5)), (torch.randn(2, 3, 5),), unchanged, "attnlrp", reference)


@pytest.mark.parametrize("spelling", RECOGNISED)
def test_rms_norm_is_recognised(spelling: Callable[..., Tensor]) -> None:
    model = Op(spelling, torch.randn(5))
    assert compile_for_lrp(model, "attnlrp").report(torch.randn(2, 5)).patterns == {"rms_norm": 1}


BATCH_NORMS = {
    "batch_norm1d": Case(lambda: nn.BatchNorm1d(3), ((5, 3),)),
    "batch_norm1d_of_sequence": Case(lambda: nn.BatchNorm1d(3), ((2, 3, 4),)),
    "batch_norm2d": Case(lambda: nn.BatchNorm2d(3), ((2, 3, 2, 4),)),
    "batch_norm2d_plain": Case(lambda: nn.BatchNorm2d(3, affine=False), ((2, 3, 2, 4),)),
    "batch_norm3d": Case(lambda: nn.BatchNorm3d(2), ((2, 2, 2, 2, 3),)),
}


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_norm_is_an_affine_map(name: str, training: bool, reference: bool) -> None:
    """y = w (x - mean) / std + b per channel decomposed by Bach eq. 56, the statistics constants.

    In evaluation they are the running ones, in training the batch's; the mean belongs to the bias.
    """
    norm = random_affine(BATCH_NORMS[name].make())
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.train(training)
    (x,) = BATCH_NORMS[name].inputs()
    per_channel = x.transpose(0, 1).flatten(1)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    if training:
        mean, variance = per_channel.mean(1), per_channel.var(1, unbiased=False)
    std = torch.sqrt(variance + norm.eps)
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.detach()
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach()

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        channels = x.movedim(1, -1)
        z = weight * (channels - mean) / std + bias
        found = channels * (weight / std) * ratio(relevance.movedim(1, -1), z)
        return (found.movedim(-1, 1),)

    check(norm, (x,), restatement, "epsilon", reference)


# --- softmax and attention ----------------------------------------------------------------------------------


def softmax_relevance(x: Tensor, relevance: Tensor, dim: int = -1) -> Tensor:
    """AttnLRP Prop. 3.1: R_x = x (R - s sum(R)); a score of -inf carries nothing."""
    finite = torch.where(torch.isneginf(x), 0, x)
    return finite * (relevance - torch.softmax(x, dim) * relevance.sum(dim, keepdim=True))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_softmax_follows_proposition_3_1(dim: int, reference: bool) -> None:
    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        return (softmax_relevance(inputs[0], relevance, dim),)

    check(Op(lambda x: torch.softmax(x, dim)), (torch.randn(2, 3, 4),), restatement, "attnlrp", reference)


@pytest.mark.parametrize("reference", [False, True])
def test_log_softmax_is_linearised_at_x(reference: bool) -> None:
    """Deep Taylor decomposition with bias, as Prop. 3.1, of x - log sum exp(x): Jacobian I - 1 s^T."""

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        (x,) = inputs
        share = relevance / torch.log_softmax(x, -1)
        return (x * (share - torch.softmax(x, -1) * share.sum(-1, keepdim=True)),)

    check(Op(lambda x: F.log_softmax(x, -1)), (torch.randn(3, 4),), restatement, "attnlrp", reference)


@dataclass(frozen=True)
class AttentionCase:
    """A call of scaled_dot_product_attention: heads of Q and of K and V, lengths, mask, scale."""

    heads: int = 2
    shared_heads: int = 2
    queries: int = 4
    keys: int = 4
    dim: int = 3
    mask: str = "none"
    scale: float | None = None

    def inputs(self, batch: int = 2) -> Tensors:
        shared = (batch, self.shared_heads, self.keys, self.dim)
        return (
            torch.randn(batch, self.heads, self.queries, self.dim),
            torch.randn(shared),
            torch.randn(shared),
        )

    def mask_tensor(self) -> Tensor | None:
        """A bool or a float mask with every row attending to something."""
        if self.mask == "bool":
            keep = torch.rand(self.queries, self.keys) > 0.4
            keep[:, 0] = True
            return keep
        return torch.randn(self.queries, self.keys) if self.mask == "float" else None

    def added(self, mask: Tensor | None) -> Tensor:
        """The mask as numbers added to the scores."""
        if self.mask == "causal":
            return torch.full((self.queries, self.keys), -torch.inf).triu(1)
        if mask is None:
            return torch.zeros(self.queries, self.keys)
        if mask.dtype == torch.bool:
            return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        return mask

    def factor(self) -> float:
        return 1 / math.sqrt(self.dim) if self.scale is None else self.scale


class FusedAttention(nn.Module):
    """One call of F.scaled_dot_product_attention."""

    def __init__(self, case: AttentionCase, mask: Tensor | None) -> None:
        super().__init__()
        self.case = case
        self.register_buffer("mask", mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        case = self.case
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            self.mask,
            is_causal=case.mask == "causal",
            scale=case.scale,
            enable_gqa=case.heads != case.shared_heads,
        )


class OpenAttention(nn.Module):
    """The same attention spelled out as two products and a softmax."""

    def __init__(self, case: AttentionCase, mask: Tensor | None) -> None:
        super().__init__()
        self.case = case
        self.register_buffer("added", case.added(mask))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = self.case.heads // self.case.shared_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = (q @ k.transpose(-2, -1)) * self.case.factor() + self.added
        return torch.softmax(scores, -1) @ v


def attention_restatement(case: AttentionCase, mask: Tensor | None, value_only: bool = False) -> Restatement:
    """Attention as the chain bmm, scale, mask, softmax, bmm in relevance space.

    AttnLRP: Prop. 3.3 at both products, Prop. 3.1 at the softmax, eq. 8 where a float mask is added. With
    ``value_only`` the attention map is a constant (CP-LRP, AH-rule).
    """
    added = case.added(mask)
    groups = case.heads // case.shared_heads

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        q, k, v = inputs[0], *(x.repeat_interleave(groups, 1) for x in inputs[1:])
        scores = case.factor() * q @ k.mT
        masked = scores + added
        weights = torch.softmax(masked, -1)
        if value_only:
            on_v = v * (weights.mT @ (relevance / (weights @ v)))
            return torch.zeros_like(q), torch.zeros_like(inputs[1]), collected(on_v)
        on_weights, on_v = halved_matmul((weights, v), relevance)
        on_masked = softmax_relevance(masked, on_weights)
        on_scores = torch.where(torch.isneginf(masked), 0, scores * on_masked / masked)
        on_q, on_k = halved_matmul((q, k.mT), on_scores)
        return on_q, collected(on_k.mT), collected(on_v)

    def collected(per_head: Tensor) -> Tensor:
        return per_head.unflatten(1, (case.shared_heads, groups)).sum(2)

    return restatement


ATTENTIONS = {
    "mha": AttentionCase(),
    "one_token": AttentionCase(queries=1, keys=1),
    "cross": AttentionCase(queries=3, keys=5),
    "scaled": AttentionCase(scale=0.7),
    "gqa": AttentionCase(heads=4, shared_heads=2),
    "mqa_causal": AttentionCase(heads=3, shared_heads=1, mask="causal"),
    "causal": AttentionCase(mask="causal"),
    "bool_mask": AttentionCase(mask="bool"),
    "float_mask": AttentionCase(mask="float"),
    "gqa_bool_mask": AttentionCase(heads=4, shared_heads=2, mask="bool"),
}


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("spelling", [FusedAttention, OpenAttention])
@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_its_chain_of_rules(
    name: str, composite: str, spelling: type[FusedAttention] | type[OpenAttention], reference: bool
) -> None:
    case = ATTENTIONS[name]
    mask = case.mask_tensor()
    restatement = attention_restatement(case, mask, value_only=composite == "cp_lrp")
    check(spelling(case, mask), case.inputs(), restatement, composite, reference)


def test_self_attention_adds_up_its_three_roles() -> None:
    """Fan-out: relevance of a value with several users is the sum over them."""
    case = AttentionCase()
    fused = FusedAttention(case, None)

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        return (sum(attention_restatement(case, None)(inputs * 3, relevance)),)

    check(Op(lambda x: fused(x, x, x)), (torch.randn(2, 2, 4, 3),), restatement)


# --- gates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("gate", [F.silu, F.gelu, torch.sigmoid])
def test_cp_lrp_stops_at_gates(gate: Callable[[Tensor], Tensor], reference: bool) -> None:
    """CP-LRP: in gate(g) * u the gate is a constant, everything goes to u."""

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        return torch.zeros_like(inputs[0]), relevance

    check(Op(lambda g, u: gate(g) * u), (torch.randn(2, 3), torch.randn(2, 3)), restatement, "cp_lrp", reference)


@pytest.mark.parametrize("reference", [False, True])
def test_attnlrp_shares_between_gate_and_signal(reference: bool) -> None:
    """AttnLRP: Prop. 3.2 at the product, eq. 9 at the SiLU."""
    model = Op(lambda g, u: F.silu(g) * u)
    check(model, (torch.randn(2, 3), torch.randn(2, 3)), halves, "attnlrp", reference)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.down = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(("composite", "to_gate"), [("attnlrp", 0.5), ("cp_lrp", 0.0)])
def test_gated_mlp_is_its_chain_of_rules(composite: str, to_gate: float, reference: bool) -> None:
    model = GatedMLP()

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        hidden = F.silu(model.gate(*inputs)) * model.up(*inputs)
        (on_hidden,) = decomposed(model.down, (hidden.detach(),), relevance)
        (on_gate,) = decomposed(model.gate, inputs, on_hidden * to_gate)
        (on_up,) = decomposed(model.up, inputs, on_hidden * (1 - to_gate))
        return (on_gate + on_up,)

    check(model, (torch.randn(2, 4),), restatement, composite, reference)


# --- the gradient composites --------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm transformer block with a gated MLP and a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.RMSNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        hidden = self.norm2(x)
        x = x + self.down(F.silu(self.gate(hidden)) * self.up(hidden))
        return self.head(x.mean(1))


def cnn() -> nn.Module:
    """Convolutions, batch norm, both poolings, a classifier."""
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(4, 4, 3), nn.ELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).eval()


def mlp() -> nn.Module:
    """Layer norm, GELU and softmax, with functions that do not vanish at zero."""
    layers = [nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(approximate="tanh"), nn.Linear(6, 4), nn.Softplus()]
    return nn.Sequential(*layers, nn.Linear(4, 3), nn.Softmax(-1))


NETWORKS: dict[str, Case] = {
    "cnn": Case(cnn, ((2, 2, 8, 8),)),
    "block": Case(Block, ((2, 5, 8),)),
    "mlp": Case(mlp, ((3, 5),)),
}


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("composite", ["gradient", "input_x_gradient"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_composites_are_autograd(name: str, composite: str, reference: bool) -> None:
    model = NETWORKS[name].make()
    (x,) = NETWORKS[name].inputs()
    x.requires_grad_()
    output = model(x)
    seed = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, x, seed)
    explained = compile_for_lrp(model, composite, reference=reference)
    found = explained.attribute(x.detach(), seed)
    assert_same((found,), (gradient if composite == "gradient" else x.detach() * gradient,))


# --- properties: odd sizes, batches of one, strides, dimensions of one --------------------------------------

LAYOUTS = ("contiguous", "transposed", "sliced")
SIZES = st.integers(1, 4)
SEED = 0
"""Set in every example, so that Hypothesis can repeat and shrink it."""

PROPERTY = settings(max_examples=15, deadline=None, derandomize=True)


def laid_out(shape: tuple[int, ...], layout: str) -> Tensor:
    """A random tensor of this shape with the named strides."""
    if layout == "transposed":
        return torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    if layout == "sliced":
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    return torch.randn(shape)


@PROPERTY
@given(st.lists(SIZES, min_size=0, max_size=2), SIZES, SIZES, st.booleans(), st.sampled_from(LAYOUTS))
def test_linear_of_any_shape(leading: list[int], size: int, out: int, bias: bool, layout: str) -> None:
    torch.manual_seed(SEED)
    model = nn.Linear(size, out, bias=bias)
    inputs = (laid_out((*leading, size), layout),)
    check(model, inputs, proportional(model), "epsilon")
    check(model, inputs, proportional(model, REAL_EPSILON), composites.epsilon(REAL_EPSILON))
    check_conservation(model, inputs, composites.epsilon(REAL_EPSILON))


@PROPERTY
@given(
    st.tuples(SIZES, st.integers(3, 6), st.integers(3, 6)),
    st.sampled_from([1, 2]),
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(0, 2)),
    st.sampled_from(LAYOUTS),
)
def test_conv2d_of_any_shape(
    sizes: tuple[int, int, int], groups: int, kernel: tuple[int, int, int], layout: str
) -> None:
    torch.manual_seed(SEED)
    batch, height, width = sizes
    model = nn.Conv2d(2, 2 * groups, *kernel, groups=groups)
    inputs = (laid_out((batch, 2, height, width), layout),)
    check(model, inputs, proportional(model), "epsilon")
    check_conservation(model, inputs)


@PROPERTY
@given(
    st.sampled_from([torch.add, torch.sub, torch.mul]),
    st.lists(st.tuples(SIZES, st.booleans(), st.booleans()), min_size=1, max_size=3),
    st.integers(0, 2),
    st.sampled_from(LAYOUTS),
)
def test_broadcasting_sums_and_products(
    fn: Callable[..., Tensor], dims: list[tuple[int, bool, bool]], dropped: int, layout: str
) -> None:
    """Two operands whose dimensions are each kept or one, the second lacking some leading dimensions."""
    torch.manual_seed(SEED)
    first = tuple(size if kept else 1 for size, kept, _ in dims)
    second = tuple(size if kept else 1 for size, _, kept in dims)[min(dropped, len(dims) - 1) :]
    model = Op(fn)
    inputs = laid_out(first, layout), laid_out(second, layout)
    check(model, inputs, halves if fn is torch.mul else proportional(model))
    check_conservation(model, inputs)


@PROPERTY
@given(st.lists(SIZES, max_size=2), st.integers(2, 7), st.booleans(), st.sampled_from(LAYOUTS))
def test_layer_norm_of_any_shape(leading: list[int], size: int, affine: bool, layout: str) -> None:
    torch.manual_seed(SEED)
    norm = random_affine(nn.LayerNorm(size, elementwise_affine=affine))
    assert isinstance(norm, nn.LayerNorm)
    inputs = (laid_out((*leading, size), layout),)
    check(norm, inputs, layer_norm_restatement(norm))
    check_conservation(norm, inputs)


@PROPERTY
@given(
    st.builds(
        AttentionCase,
        heads=st.sampled_from([2, 4]),
        shared_heads=st.sampled_from([1, 2]),
        queries=SIZES,
        keys=SIZES,
        dim=st.integers(1, 5),
        mask=st.sampled_from(["none", "causal", "bool", "float"]),
    ),
    st.integers(1, 2),
    st.sampled_from(["attnlrp", "cp_lrp"]),
    st.sampled_from(LAYOUTS),
)
def test_attention_of_any_shape(case: AttentionCase, batch: int, composite: str, layout: str) -> None:
    torch.manual_seed(SEED)
    mask = case.mask_tensor()
    model = FusedAttention(case, mask)
    inputs = tuple(laid_out(tuple(x.shape), layout) for x in case.inputs(batch))
    check(model, inputs, attention_restatement(case, mask, value_only=composite == "cp_lrp"), composite)
    check_conservation(model, inputs, composite)


# --- what the op table refuses, and scores that count as nothing ---------------------------------------------


def test_scattered_products_have_no_rule() -> None:
    """Products share evenly between their factors, which torch's derivative of this op does not."""
    model = Op(lambda x: torch.ones(2, 3).scatter_reduce(0, INTO, x, "prod"))
    with pytest.raises(errors.UncoveredOpsError, match="scatter_reduce"):
        compile_for_lrp(model, "attnlrp").run(torch.randn(4, 3))


@pytest.mark.parametrize("fn", [torch.addmm, torch.baddbmm])
def test_an_infinite_mask_added_to_a_product_takes_nothing(fn: Callable[..., Tensor]) -> None:
    """As nn.MultiheadAttention adds its mask: a masked score has relevance zero, not zero times -inf."""
    leading = (2,) if fn is torch.baddbmm else ()
    mask = torch.zeros(*leading, 3, 4)
    mask[..., 1:] = -torch.inf
    model = Op(lambda q, k, m: fn(m, q, k).softmax(-1), mask)
    output, tape = compile_for_lrp(model, "attnlrp").run(torch.randn(*leading, 3, 5), torch.randn(*leading, 5, 4))
    ledger = tape.ledger(torch.randn_like(output))
    assert all(row.relative_gap <= TOLERANCE for row in ledger.rows)
