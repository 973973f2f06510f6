"""Rules restated in relevance space, as the papers write them, and compared with what the compiler finds.

The compiler works on coefficients c (R = a * c). Here and in the tests that start from here each rule is stated once
more, slowly, on relevances: with explicit weight matrices, divisions by activations and no kernel of ours. Papers, by
the names used there:

* Bach: Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by LRP", PLoS ONE 2015.
* AttnLRP: Achtibat et al., "Attention-Aware Layer-Wise Relevance Propagation for Transformers", ICML 2024.
* CP-LRP: Ali et al., "XAI for Transformers: Better Explanations through Conservative Propagation", ICML 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from catalogue import note
from functions import Op
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from lrp_compiler import Composite, compile_for_lrp

Tensors = tuple[Tensor, ...]
Restatement = Callable[[Tensors, Tensor], Tensors]
"""(inputs, relevance of the output) -> relevance of the inputs."""

TOLERANCE = 1e-10
"""Of the largest expected relevance. The restatements divide by activations, which the compiler never does:
each quotient loses about eps * |a / z| in float64, and 1e-10 allows |a / z| up to 1e5."""

REAL_EPSILON = 0.1
"""A stabiliser that changes relevances visibly, unlike the 1e-6 of most libraries."""


# --- what is compared ---------------------------------------------------------------------------------------


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


# --- how relevances are obtained and compared ---------------------------------------------------------------


def assert_same(got: Tensors, expected: Tensors) -> float:
    """Equal to TOLERANCE times the largest expected relevance of any input; the largest error in that unit."""
    scale = max(float(e.detach().abs().max()) for e in expected)
    worst = 0.0
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape, (g.shape, e.shape)
        assert torch.isfinite(g).all(), g
        error = float((g - e).detach().abs().max())
        assert error <= TOLERANCE * scale, (error, scale)
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
    gap = abs(total - float(given_in.detach().sum()))
    assert gap <= TOLERANCE * magnitude, (gap, magnitude)


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


def softmax_relevance(x: Tensor, relevance: Tensor, dim: int = -1) -> Tensor:
    """AttnLRP Prop. 3.1: R_x = x (R - s sum(R)); a score of -inf carries nothing."""
    finite = torch.where(torch.isneginf(x), 0, x)
    return finite * (relevance - torch.softmax(x, dim) * relevance.sum(dim, keepdim=True))
