"""Flat, w^2 and z-box: rules for first layers, in relevance space since they give relevance where x is zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrp_compiler.kernels.linear import stabilise
from lrp_compiler.kernels.strided import BLOCK
from lrp_compiler.passes.errors import RuleParameterError
from lrp_compiler.passes.linear_map import LinearMap, in_full_precision, linear_map
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.optable import schema_name
from lrp_compiler.passes.program import tensor_of
from lrp_compiler.passes.rules.base import EdgeKind, Edges, Rule, Sinks
from lrp_compiler.passes.site import Site

CONVOLUTIONS = {"aten::conv1d": 3, "aten::conv2d": 4, "aten::conv3d": 5}
"""Convolution -> the dimensions of its input with a batch."""
Terms = tuple[tuple[Tensor, Tensor, float], ...]
"""What a rule adds up: (input, weight, sign) of each product."""


def flat_terms(x: Tensor, weight: Tensor, bounds: Any) -> Terms:
    """1 * 1."""
    return ((torch.ones_like(x), torch.ones_like(weight), 1.0),)


def w_square_terms(x: Tensor, weight: Tensor, bounds: Any) -> Terms:
    """1 * W^2."""
    return ((torch.ones_like(x), weight.square(), 1.0),)


Bound = float | tuple[float, ...] | Tensor
"""One bound for every input, one per channel, or a tensor that broadcasts to the input."""


def spread(bound: Bound, x: Tensor) -> Tensor:
    """``bound`` in the shape of ``x`` (N, C, ...)."""
    if isinstance(bound, Tensor):
        return bound.expand_as(x)
    if isinstance(bound, tuple):
        channels = torch.stack([x.new_full((), value) for value in bound])
        return channels.view([-1] + [1] * (x.dim() - 2)).expand_as(x)
    return torch.full_like(x, bound)


def z_box_terms(x: Tensor, weight: Tensor, bounds: tuple[Bound, Bound]) -> Terms:
    """x W - low W+ - high W-."""
    low, high = (spread(bound, x) for bound in bounds)
    return ((x, weight, 1.0), (low, weight.clamp(min=0), -1.0), (high, weight.clamp(max=0), -1.0))


def offset_of(name: str, bias: Tensor) -> Tensor:
    """The bias in a rule's denominator: b^2 for w^2, none for the others (z-box's cancels)."""
    return bias.square() if name == "w_square" else torch.zeros_like(bias)


def shares(
    name: str, terms_of: Callable[..., Terms], bounds: Any, lin: LinearMap, operands: Any, fold: list[Any], r: Tensor
) -> tuple[Tensor, Tensor]:
    """(R_x, what is left of R): R_x = sum of input * W^T (R / stab(z)) over the rule's terms, z their sum."""
    dtype = lin.given(operands, lin.x).dtype
    operands, fold, bounds, r = in_full_precision((operands, fold, bounds, r))
    x, weight, bias = lin.parts(operands, fold)
    terms = terms_of(x, weight, bounds)
    if len(terms) > 1 and _stacks(lin, operands, x):
        terms = (_stacked(terms),)
    z = sum((sign * lin(operands, value, w) for value, w, sign in terms), torch.zeros((), dtype=x.dtype))
    ratio = r / stabilise(z + offset_of(name, bias), TERMINAL_EPSILON)
    given = sum((sign * value * lin.transpose(operands, value, w, ratio) for value, w, sign in terms), x.new_zeros(()))
    given = given.reshape(x.shape[0], -1, *x.shape[1:]).sum(1) if given.shape != x.shape else given
    return given.to(dtype), r - ratio * z


def _stacks(lin: LinearMap, operands: Any, x: Tensor) -> bool:
    """Whether the terms of a first layer can be channels of one convolution, which takes as long as one of them."""
    args, kwargs = operands
    groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
    is_convolution = schema_name(lin.target) in CONVOLUTIONS and x.dim() == CONVOLUTIONS[schema_name(lin.target)]
    return is_convolution and groups == 1 and 3 * x.shape[1] <= BLOCK


def _stacked(terms: Terms) -> tuple[Tensor, Tensor, float]:
    """All terms as one, side by side along the channels; signs go to the weights and, for what is given, inputs."""
    values, weights, signs = zip(*terms, strict=True)
    return torch.cat(values, 1), torch.cat([w * sign for w, sign in zip(weights, signs, strict=True)], 1), 1.0


TERMINAL_EPSILON = 1e-6
"""zennit's default stabiliser."""


@dataclass(frozen=True)
class Terminal(Rule):
    """A rule that ends the chain: takes and gives relevance."""

    kind: ClassVar[EdgeKind] = "relevance"
    folds_batch_norm: ClassVar[bool] = True
    real_only: ClassVar[bool] = True
    terms: ClassVar[Callable[..., Terms]]

    def bounds(self, site: Site) -> Any:
        """What ``terms`` needs beside input and weight."""
        return None

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return op.flowing_factors

    def propagate(self, site: Site, edge: Any) -> Edges:
        return {receiver: self._emit(site, edge)[0] for receiver in self.receivers(site.op)}

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        return {"bias": self._emit(site, edge)[1]}

    def _emit(self, site: Site, edge: Any) -> Any:
        op = site.op
        operands = [list(op.args), dict(op.kwargs)]
        arguments = (linear_map(op), operands, op.fold(), edge)
        return site.emit(shares, self.name, type(self).terms, self.bounds(site), *arguments, autograd=True)


@dataclass(frozen=True)
class Flat(Terminal):
    """Every input of an output gets the same share."""

    name: ClassVar[str] = "flat"
    terms: ClassVar[Callable[..., Terms]] = staticmethod(flat_terms)


@dataclass(frozen=True)
class WSquare(Terminal):
    """Shares by squared weight (Montavon et al. 2017)."""

    name: ClassVar[str] = "w_square"
    terms: ClassVar[Callable[..., Terms]] = staticmethod(w_square_terms)


@dataclass(frozen=True, eq=False)
class ZBox(Terminal):
    """For inputs between ``low`` and ``high`` (Montavon et al. 2017).

    Either is a number, a tuple of one number per channel, or a tensor that broadcasts to the input (N, C, ...).
    """

    low: Bound = 0.0
    high: Bound = 1.0
    name: ClassVar[str] = "z_box"
    terms: ClassVar[Callable[..., Terms]] = staticmethod(z_box_terms)

    def tensors(self, op: Operation) -> dict[str, Tensor]:
        (x,) = op.flowing_factors
        shape = tensor_of(x.node).shape
        found = {key: bound for key, bound in self._named() if isinstance(bound, Tensor)}
        for key, bound in found.items():
            if not _broadcasts(bound.shape, shape):
                cause = f"{tuple(bound.shape)} does not broadcast to the input of {op}, of shape {tuple(shape)}"
                raise RuleParameterError(rule=f"ZBox.{key}", cause=cause)
        for key, numbers in self._named():
            if isinstance(numbers, tuple) and len(numbers) != shape[1]:
                cause = f"{len(numbers)} numbers for the {shape[1]} channels of the input of {op}"
                raise RuleParameterError(rule=f"ZBox.{key}", cause=cause)
        return found

    def bounds(self, site: Site) -> Any:
        return tuple(site.tensor(key) if isinstance(bound, Tensor) else bound for key, bound in self._named())

    def _named(self) -> list[tuple[str, Bound]]:
        return [("low", self.low), ("high", self.high)]

    def __str__(self) -> str:
        low, high = (f"tensor{tuple(b.shape)}" if isinstance(b, Tensor) else b for b in (self.low, self.high))
        return f"z_box({low}, {high})"


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    trailing = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(one in (1, size) for one, size in zip(shape, trailing, strict=True))
