"""Norms against the LN-rule and affine maps in matrix form, softmax and its relatives against Prop. 3.1.

The papers are named in matrix_form.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from functions import Op
from matrix_form import Case, Tensors, check, check_conservation, op, ratio, softmax_relevance, unchanged
from matrix_form_norms import layer_norm_restatement, normalised_rows, random_affine
from recognised import patterns_in
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp

pytestmark = pytest.mark.usefixtures("float64")


# --- normalisation ------------------------------------------------------------------------------------------


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
    assert patterns_in(compile_for_lrp(model, "attnlrp"), torch.randn(2, 5)) == {"rms_norm": 1}


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


# --- softmax and its relatives ------------------------------------------------------------------------------


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
