"""Gamma, alpha-beta and z+ on linear maps, in coefficient space with minimal products (RULES.md section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrp_compiler.kernels import signsplit
from lrp_compiler.kernels.linear import stabilise
from lrp_compiler.passes.errors import RuleParameterError
from lrp_compiler.passes.linear_map import LinearMap, in_full_precision, linear_map
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.program import facts
from lrp_compiler.passes.rules.base import Edges, Rule, Sinks
from lrp_compiler.passes.rules.elementwise import GuidedBackprop, Identity
from lrp_compiler.passes.rules.gradient import Gradient
from lrp_compiler.passes.site import Site

aten = torch.ops.aten
Shares = Callable[..., tuple[Tensor, Tensor]]


def exact_output(lin: LinearMap, operands: Any, fold: list[Any], z: Tensor) -> tuple[Tensor, Tensor]:
    """(z, z0): the output as the model made it, or made anew in float32 where the model rounds it to 16 bits.

    A part (u + z0) / 2 that is small against u is lost in a z0 of eight bits (RULES.md section 3).
    """
    x, weight, bias = lin.parts(operands, fold)
    if z.dtype == x.dtype:
        return z, z - bias
    z0 = lin(operands, x, weight)
    return z0 + bias, z0


def split(
    method: Shares, parameters: tuple[float, ...], lin: LinearMap, operands: Any, fold: list[Any], c: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(v1, v2, z0, u) of a sign-split rule."""
    operands, fold, c = in_full_precision((operands, fold, c))
    x, weight, bias = lin.parts(operands, fold)
    z, z0 = exact_output(lin, operands, fold, z)
    u = lin(operands, x.abs(), weight.abs())
    leading = (z,) if method is signsplit.gamma else ()
    v1, v2 = method(z * c, *leading, z0, u, bias, *parameters)
    return v1, v2, z0, u


def split_transpose(
    method: Shares, parameters: tuple[float, ...], lin: LinearMap, operands: Any, fold: list[Any], c: Tensor, z: Tensor
) -> Tensor:
    """c_x = W^T v1 + sign(x) |W|^T v2."""
    v1, v2, _, _ = split(method, parameters, lin, operands, fold, c, z)
    dtype = lin.given(operands, lin.x).dtype
    operands, fold = in_full_precision((operands, fold))
    x, weight, _ = lin.parts(operands, fold)
    plain = lin.transpose(operands, x, weight, v1)
    return (plain + torch.sign(x) * lin.transpose(operands, x, weight.abs(), v2)).to(dtype)


def split_on_weight(
    method: Shares, parameters: tuple[float, ...], lin: LinearMap, operands: Any, c: Tensor, z: Tensor
) -> Tensor:
    """c_W = x^T v1 + sign(W) * |x|^T v2: the transposes of the other factor, summed over the batch."""
    v1, v2, _, _ = split(method, parameters, lin, operands, [], c, z)
    dtype = lin.given(operands, lin.weight).dtype
    operands = in_full_precision(operands)
    x, weight, _ = lin.parts(operands, [])
    plain = lin.weight_transpose(operands, x, weight, v1)
    return (plain + torch.sign(weight) * lin.weight_transpose(operands, x.abs(), weight, v2)).to(dtype)


def split_remainder(
    method: Shares, parameters: tuple[float, ...], lin: LinearMap, operands: Any, fold: list[Any], c: Tensor, z: Tensor
) -> Tensor:
    """R - v1 z0 - v2 u: what bias and stabiliser take of each output's relevance."""
    v1, v2, z0, u = split(method, parameters, lin, operands, fold, c, z)
    operands, fold = in_full_precision((operands, fold))
    full, _ = exact_output(lin, operands, fold, z)
    return full * c - v1 * z0 - v2 * u


def on_bias(left: Tensor, bias: Tensor, channel_dim: int) -> Tensor:
    """c_b from the relevance left to the bias at every output: its sum per channel over b, nothing where b is zero."""
    kept = channel_dim % left.dim()
    others = [dim for dim in range(left.dim()) if dim != kept]
    total = left.sum(others) if others else left
    return torch.where(bias == 0, 0, total / torch.where(bias == 0, 1, bias))


def one_sided(
    weights: tuple[float, float], lin: LinearMap, operands: Any, fold: list[Any], c: Tensor, z: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """(c_x, remainder) of alpha-beta for x >= 0: one product each way per sign with a share, nothing cancels.

    c_x = alpha W+^T (R / stab(W+ x + b+)) - beta W-^T (R / stab(W- x + b-)); ``weights`` is (alpha, -beta).
    """
    dtype = lin.given(operands, lin.x).dtype
    operands, fold, c, z = in_full_precision((operands, fold, c, z))
    x, weight, bias = lin.parts(operands, fold)
    relevance = z * c
    alpha, minus_beta = weights
    given, left = torch.zeros_like(x), relevance
    if alpha != 0:
        w = weight.clamp(min=0)
        part = lin(operands, x, w)
        # Nothing here is negative.
        ratio = _times(alpha, relevance) / (part + (bias.clamp(min=0) + epsilon))
        given, left = lin.transpose(operands, x, w, ratio), left - ratio * part
    if minus_beta != 0:
        w = weight.clamp(max=0)
        part = lin(operands, x, w)
        ratio = _times(minus_beta, relevance) / stabilise(part + bias.clamp(max=0), epsilon)
        given, left = given + lin.transpose(operands, x, w, ratio), left - ratio * part
    return given.to(dtype), left


def _times(factor: float, value: Tensor) -> Tensor:
    return value if factor == 1 else factor * value


def rectified_gamma(
    gamma: float, lin: LinearMap, operands: Any, fold: list[Any], c: Tensor, z: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """(c_x, remainder) of gamma for x >= 0 in front of a ReLU, which sends nothing back where z <= 0.

    c_x = (W + gamma W+)^T (R / stab(z + gamma (W+ x + b+))): one product forward, one back.
    """
    dtype = lin.given(operands, lin.x).dtype
    operands, fold, c = in_full_precision((operands, fold, c))
    x, weight, bias = lin.parts(operands, fold)
    z, z0 = exact_output(lin, operands, fold, z)
    favoured = weight.clamp(min=0)
    raised = lin(operands, x, favoured)
    relevance = z * c
    # Where z > 0 so is what it is divided by; the others are divided by anything but zero, for the derivative's sake.
    ratio = relevance / ((z + gamma * (raised + bias.clamp(min=0))).clamp(min=0) + epsilon)
    share = aten.threshold_backward.default(ratio, z, 0)
    given = lin.transpose(operands, x, torch.add(weight, favoured, alpha=gamma), share)
    return given.to(dtype), relevance - share * (z0 + gamma * raised)


def feeds_masking_relu(op: Operation) -> bool:
    """Whether an output is read by ReLUs alone whose rule sends nothing back where they are closed."""
    readers = [user for user in op.node.users if user.op == "output" or facts(user).part == "forward"]
    return bool(readers) and all(
        user.op != "output"
        and op_name(user) == "aten::relu"
        and isinstance(facts(user).rule, (Identity, Gradient, GuidedBackprop))
        for user in readers
    )


@dataclass(frozen=True)
class SignSplit(Rule):
    """What the three rules share; ``epsilon`` stabilises their denominators with sign(0) = +1."""

    folds_batch_norm: ClassVar[bool] = True
    real_only: ClassVar[bool] = True
    method: ClassVar[Shares]
    epsilon: float = 1e-6

    @property
    def parameters(self) -> tuple[float, ...]:
        """What ``method`` takes after the values."""
        return (self.epsilon,)

    def non_negative_form(self, site: Site) -> tuple[Callable[..., tuple[Tensor, Tensor]], Any] | None:
        """What needs fewer products when x >= 0, with its parameter; None where nothing does."""
        return None

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return op.flowing_factors

    def propagate(self, site: Site, edge: Any) -> Edges:
        return {receiver: self._emit(site, edge, split_transpose, 0) for receiver in self.receivers(site.op)}

    def parameter_edges(self, site: Site, edge: Any, parameters: tuple[Operand, ...]) -> Edges:
        op = site.op
        if op.is_folded:
            return super().parameter_edges(site, edge, parameters)
        values = (type(self).method, self.parameters, linear_map(op), [list(op.args), dict(op.kwargs)])
        made: Edges = {}
        for operand in parameters:
            if op.entry is not None and operand.argument in op.entry.terms:
                left = self._emit(site, edge, split_remainder, 1)
                made[operand] = site.emit(on_bias, left, operand.node, 1 if "conv" in op.linear_name else -1)
            else:
                made[operand] = site.emit(split_on_weight, *values, edge, site.node, autograd=True)
        return made

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        return {"bias": self._emit(site, edge, split_remainder, 1)}

    def _emit(self, site: Site, edge: Any, what: Callable[..., Tensor], which: int) -> Any:
        """``what`` for signed inputs, or result ``which`` of the cheaper form for inputs that cannot be negative."""
        op = site.op
        (x,) = op.flowing_factors
        arguments = (linear_map(op), [list(op.args), dict(op.kwargs)], op.fold(), edge, site.node)
        cheaper = self.non_negative_form(site) if facts(x.node).non_negative else None
        if cheaper is not None:
            form, parameter = cheaper
            return site.emit(form, parameter, *arguments, self.epsilon, autograd=True)[which]
        return site.emit(what, type(self).method, self.parameters, *arguments, autograd=True)


@dataclass(frozen=True)
class ZPlus(SignSplit):
    """Only what raises the output gets relevance: x+ W+ + x- W- (zennit's ZPlus)."""

    name: ClassVar[str] = "z_plus"
    by_row: ClassVar[bool] = True
    method: ClassVar[Shares] = staticmethod(signsplit.z_plus)

    def non_negative_form(self, site: Site) -> tuple[Callable[..., tuple[Tensor, Tensor]], Any]:
        return one_sided, (1.0, 0.0)


@dataclass(frozen=True)
class AlphaBeta(SignSplit):
    """alpha times the raising parts minus beta times the lowering ones, alpha - beta = 1."""

    alpha: float = 2.0
    beta: float = 1.0
    name: ClassVar[str] = "alpha_beta"
    by_row: ClassVar[bool] = True
    method: ClassVar[Shares] = staticmethod(signsplit.alpha_beta)

    def __post_init__(self) -> None:
        if min(self.alpha, self.beta) < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            cause = f"alpha - beta must be 1, both at least 0; got alpha={self.alpha}, beta={self.beta}"
            raise RuleParameterError(rule="AlphaBeta", cause=cause)

    @property
    def parameters(self) -> tuple[float, ...]:
        return (self.alpha, self.beta, self.epsilon)

    def non_negative_form(self, site: Site) -> tuple[Callable[..., tuple[Tensor, Tensor]], Any]:
        return one_sided, (self.alpha, -self.beta)

    def __str__(self) -> str:
        return f"alpha_beta({self.alpha:g}, {self.beta:g})"


@dataclass(frozen=True)
class Gamma(SignSplit):
    """Parts of the output's sign are favoured by gamma (generalised gamma rule)."""

    gamma: float = 0.25
    name: ClassVar[str] = "gamma"
    by_row: ClassVar[bool] = True
    method: ClassVar[Shares] = staticmethod(signsplit.gamma)

    def __post_init__(self) -> None:
        if self.gamma < 0:
            raise RuleParameterError(rule="Gamma", cause=f"gamma must be at least 0, not {self.gamma}")

    @property
    def parameters(self) -> tuple[float, ...]:
        return (self.gamma, self.epsilon)

    def non_negative_form(self, site: Site) -> tuple[Callable[..., tuple[Tensor, Tensor]], Any] | None:
        # A seed that starts at this output is no ReLU's to mask.
        masked = feeds_masking_relu(site.op) and not site.is_seeded
        return (rectified_gamma, self.gamma) if masked else None

    def __str__(self) -> str:
        return f"gamma({self.gamma:g})"
