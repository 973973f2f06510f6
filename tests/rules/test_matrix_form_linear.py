"""Linear maps, sums, averages, data movement and winners against the ratio of contributions, in matrix form.

The papers are named in matrix_form.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401 (it registers the product by groups)
from functions import Op
from matrix_form import REAL_EPSILON, Case, Restatement, Tensors, check, op, proportional
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp, composites, errors

pytestmark = pytest.mark.usefixtures("float64")


# --- linear maps: LRP-0 and epsilon -------------------------------------------------------------------------

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


# --- what the op table refuses ------------------------------------------------------------------------------


def test_scattered_products_have_no_rule() -> None:
    """Products share evenly between their factors, which torch's derivative of this op does not."""
    model = Op(lambda x: torch.ones(2, 3).scatter_reduce(0, INTO, x, "prod"))
    with pytest.raises(errors.UncoveredOpsError, match="scatter_reduce"):
        compile_for_lrp(model, "attnlrp").run(torch.randn(4, 3))
