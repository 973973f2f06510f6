"""Gamma, alpha-beta and z+ on linear maps, in coefficient space with minimal products (RULES.md section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrp_compiler.kernels import signsplit
from lrp_compiler.kernels.linear import stabilise
from lrp_compiler.passes.linear_map import LinearMap, linear_map
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.program import facts
from lrp_compiler.passes.rules.base import Edges, Rule, Sinks
from lrp_compiler.passes.site import Site

Shares = Callable[..., tuple[Tensor, Tensor]]


def split(
    method: Shares, parameters: tuple[float, ...], lin: LinearMap, operands: Any, fold: list[Any], c: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(v1, v2, z0, u) of a sign-split rule."""
    x, weight, bias = lin.parts(operands, fold)
    z0, u = z - bias, lin(operands, x.abs(), weight.abs())
    leading = (z,) if method is signsplit.gamma else ()
    v1, v2 = method(z * c, *leading, z0, u, bias, *parameters)
    return v1, v2, z0, u


def split_transpose(
    method: Shares, parameters: tuple[float, ...], lin: LinearMap, operands: Any, fold: list[Any], c: Tensor, z: Tensor
) -> Tensor:
    """c_x = W^T v1 + sign(x) |W|^T v2."""
    x, weight, _ = lin.parts(operands, fold)
    v1, v2, _, _ = split(method, parameters, lin, operands, fold, c, z)
    plain = lin.transpose(operands, x, weight, v1)
    return plain + torch.sign(x) * lin.transpose(operands, x, weight.abs(), v2)


def split_on_weight(
    method: Shares, parameters: tuple[float, ...], lin: LinearMap, operands: Any, c: Tensor, z: Tensor
) -> Tensor:
    """c_W = x^T v1 + sign(W) * |x|^T v2: the transposes of the other factor, summed over the batch."""
    x, weight, _ = lin.parts(operands, [])
    v1, v2, _, _ = split(method, parameters, lin, operands, [], c, z)
    plain = lin.weight_transpose(operands, x, weight, v1)
    return plain + torch.sign(weight) * lin.weight_transpose(operands, x.abs(), weight, v2)


def split_remainder(
    method: Shares, parameters: tuple[float, ...], lin: LinearMap, operands: Any, fold: list[Any], c: Tensor, z: Tensor
) -> Tensor:
    """R - v1 z0 - v2 u: what bias and stabiliser take of each output's relevance."""
    v1, v2, z0, u = split(method, parameters, lin, operands, fold, c, z)
    return z * c - v1 * z0 - v2 * u


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
    x, weight, bias = lin.parts(operands, fold)
    relevance = z * c
    given, left = torch.zeros_like(x), relevance
    for share, w, b in zip(
        weights, (weight.clamp(min=0), weight.clamp(max=0)), (bias.clamp(min=0), bias.clamp(max=0)), strict=True
    ):
        if share != 0:
            part = lin(operands, x, w)
            ratio = share * relevance / stabilise(part + b, epsilon)
            given, left = given + lin.transpose(operands, x, w, ratio), left - ratio * part
    return given, left


@dataclass(frozen=True)
class SignSplit(Rule):
    """What the three rules share; ``epsilon`` stabilises their denominators with sign(0) = +1."""

    folds_batch_norm: ClassVar[bool] = True
    method: ClassVar[Shares]
    epsilon: float = 1e-6

    @property
    def parameters(self) -> tuple[float, ...]:
        """What ``method`` takes after the values."""
        return (self.epsilon,)

    @property
    def sides(self) -> tuple[float, float] | None:
        """The factors on the raising and the lowering parts where the two separate for x >= 0, else None."""
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
        """``what`` for signed inputs, or result ``which`` of the one-sided form for inputs that cannot be negative."""
        op = site.op
        (x,) = op.flowing_factors
        arguments = (linear_map(op), [list(op.args), dict(op.kwargs)], op.fold(), edge, site.node)
        if self.sides is not None and facts(x.node).non_negative:
            return site.emit(one_sided, self.sides, *arguments, self.epsilon, autograd=True)[which]
        return site.emit(what, type(self).method, self.parameters, *arguments, autograd=True)


@dataclass(frozen=True)
class ZPlus(SignSplit):
    """Only what raises the output gets relevance: x+ W+ + x- W- (zennit's ZPlus)."""

    name: ClassVar[str] = "z_plus"
    method: ClassVar[Shares] = staticmethod(signsplit.z_plus)

    @property
    def sides(self) -> tuple[float, float]:
        return (1.0, 0.0)


@dataclass(frozen=True)
class AlphaBeta(SignSplit):
    """alpha times the raising parts minus beta times the lowering ones, alpha - beta = 1."""

    alpha: float = 2.0
    beta: float = 1.0
    name: ClassVar[str] = "alpha_beta"
    method: ClassVar[Shares] = staticmethod(signsplit.alpha_beta)

    def __post_init__(self) -> None:
        if min(self.alpha, self.beta) < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise ValueError(f"alpha - beta must be 1, both at least 0; got alpha={self.alpha}, beta={self.beta}")

    @property
    def parameters(self) -> tuple[float, ...]:
        return (self.alpha, self.beta, self.epsilon)

    @property
    def sides(self) -> tuple[float, float]:
        return (self.alpha, -self.beta)

    def __str__(self) -> str:
        return f"alpha_beta({self.alpha:g}, {self.beta:g})"


@dataclass(frozen=True)
class Gamma(SignSplit):
    """Parts of the output's sign are favoured by gamma (generalised gamma rule)."""

    gamma: float = 0.25
    name: ClassVar[str] = "gamma"
    method: ClassVar[Shares] = staticmethod(signsplit.gamma)

    def __post_init__(self) -> None:
        if self.gamma < 0:
            raise ValueError(f"gamma must be at least 0, not {self.gamma}")

    @property
    def parameters(self) -> tuple[float, ...]:
        return (self.gamma, self.epsilon)

    def __str__(self) -> str:
        return f"gamma({self.gamma:g})"
