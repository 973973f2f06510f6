"""DeepLIFT: relevance is a share of the difference from a reference run, conserved op by op (RULES.md 1.5, 5.3).

Every rule gives multipliers c with y - y0 = sum of (x - x0) * c over all operands that differ. Operands that differ
although relevance cannot flow to them leave their share in the sink ``held``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lrp_compiler.kernels import difference as kernels
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.optable import OpClass, aten_names, op_name
from lrp_compiler.passes.program import tensor_of
from lrp_compiler.passes.rules.attention import KEY, QUERY, VALUE
from lrp_compiler.passes.rules.base import Edges, Rule, Sinks
from lrp_compiler.passes.rules.norm import BatchNorm, scale_of
from lrp_compiler.passes.site import Site

aten = torch.ops.aten
ELEMENTWISE = frozenset({OpClass.ACTIVATION, OpClass.NONLINEAR, OpClass.POWER})
ELEMENTWISE_STATISTICS = aten_names("rsqrt sqrt reciprocal")
MAX_POOLS = {
    "aten::max_pool2d_with_indices": 2,
    "aten::max_pool3d_with_indices": 3,
    "aten::adaptive_max_pool2d": 2,
    "aten::adaptive_max_pool3d": 3,
}
"""Pooling that returns indices, by its number of spatial dimensions."""

EXTREMES = {
    **dict.fromkeys(("aten::max", "aten::amax", "aten::maximum"), 1),
    **dict.fromkeys(("aten::min", "aten::amin", "aten::minimum"), -1),
}
"""Maxima by 1 and minima by -1."""


def varies_in_values(op: Operation) -> bool:
    """Whether the two runs call the op with the same indices and conditions."""
    return op.selects_alike


def varies_in_input(op: Operation) -> bool:
    """Whether the first argument is all that can differ between the two runs."""
    return op.selects_alike and [operand.argument for operand in op.varying] == [0]


def is_elementwise(op: Operation) -> bool:
    """Whether an op applies a function of one variable to each entry of the one operand that can differ."""
    known = op.op_class in ELEMENTWISE or op_name(op.node) in ELEMENTWISE_STATISTICS
    if not known or not op.selects_alike or len(op.varying) != 1:
        return False
    return tensor_of(op.varying[0].node).shape == tensor_of(op.node).shape


def is_quotient(op: Operation) -> bool:
    """Whether an op is a true division."""
    return op_name(op.node) == "aten::div" and op.selects_alike and op.kwargs.get("rounding_mode") is None


def is_variance(op: Operation) -> bool:
    """Whether an op is a variance, which is quadratic."""
    return op_name(op.node) == "aten::var" and varies_in_input(op)


def is_root_of_squares(op: Operation) -> bool:
    """Whether an op is the square root of something quadratic: a deviation or a Euclidean norm."""
    name = op_name(op.node)
    euclidean = name in ("aten::norm", "aten::linalg_vector_norm") and op.argument(1, "ord", 2) in (None, 2)
    return varies_in_input(op) and (name == "aten::std" or euclidean)


def is_max_pool(op: Operation) -> bool:
    """Whether an op is max pooling that says where its winners are."""
    return op_name(op.node) in MAX_POOLS and varies_in_input(op)


def is_extreme(op: Operation) -> bool:
    """Whether an op is a maximum or minimum, of a tensor or of two."""
    return op_name(op.node) in EXTREMES and op.selects_alike and tensor_of(op.args[0]).dim() > 0


def is_log_sum_exp(op: Operation) -> bool:
    return op_name(op.node) == "aten::logsumexp" and varies_in_input(op)


def attends_alike(op: Operation) -> bool:
    """Whether both runs of an attention op have the same mask."""
    return all(operand.argument in (QUERY, KEY, VALUE) for operand in op.varying) and op.selects_alike


class DifferenceRule(Rule):
    """A rule whose coefficients multiply differences; subclasses write ``shares`` for any operands that differ."""

    real_only: ClassVar[bool] = True

    def shares(self, site: Site, edge: Any, operands: tuple[Operand, ...]) -> Edges:
        """The coefficients of ``operands``, whether or not relevance can flow to them."""
        raise NotImplementedError

    def propagate(self, site: Site, edge: Any) -> Edges:
        return self.shares(site, edge, self.receivers(site.op))

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        held = tuple(operand for operand in site.op.varying if operand not in edges)
        if not held:
            return {}
        shares = self.shares(site, edge, held)
        values = [operand.node for operand in shares]
        references = [site.reference(value) for value in values]
        return {"held": site.emit(kernels.held_share, list(shares.values()), values, references)}


def pair(site: Site, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """A forward value and what it is in the reference run."""
    return node, site.reference(node)


@dataclass(frozen=True)
class Transpose(DifferenceRule):
    """c_x = VJP(c) for ops that are affine in all that differs: constants cancel in the difference."""

    name: ClassVar[str] = "transpose"
    real_only: ClassVar[bool] = False

    def shares(self, site: Site, edge: Any, operands: tuple[Operand, ...]) -> Edges:
        return site.vjp(edge, operands)


@dataclass(frozen=True)
class Midpoint(DifferenceRule):
    """c_a = VJP(c) with every other factor at the mean of both runs: exact for products, a b - a0 b0."""

    name: ClassVar[str] = "midpoint"
    real_only: ClassVar[bool] = False

    def shares(self, site: Site, edge: Any, operands: tuple[Operand, ...]) -> Edges:
        assert site.op.entry is not None
        factors = [operand for operand in site.op.varying if operand.argument in site.op.entry.factors]
        edges: Edges = {}
        for operand in operands:
            others = [factor for factor in factors if factor is not operand] if operand in factors else []
            means = {other: site.emit(kernels.midpoint, *pair(site, other.node)) for other in others}
            edges.update((site.at(means) if means else site).vjp(edge, (operand,)))
        return edges


@dataclass(frozen=True)
class Rescale(DifferenceRule):
    """c_x = c (f(x) - f(x0)) / (x - x0) at elementwise f, c f'(x) where x is x0 (Shrikumar et al. 2017)."""

    name: ClassVar[str] = "rescale"

    def shares(self, site: Site, edge: Any, operands: tuple[Operand, ...]) -> Edges:
        return {o: self._rescaled(site, edge, o) for o in operands}

    def _rescaled(self, site: Site, edge: Any, operand: Operand) -> fx.Node:
        arguments = (*pair(site, operand.node), *pair(site, site.node))
        return site.emit(kernels.rescaled, edge, derivative(site, edge, operand), *arguments)  # type: ignore[no-any-return]


def derivative(site: Site, edge: fx.Node, operand: Operand) -> fx.Node:
    """c f'(x), of recognised activations too, whose last op alone would not tell it."""
    if site.op.pattern is not None:
        gradient, numbers = GRADIENTS[site.op.pattern.kind], site.op.kwargs.values()
        return site.emit(gradient, edge, operand.node, *numbers)  # type: ignore[no-any-return]
    return site.vjp(edge, (operand,))[operand]


def gelu_tanh_gradient(c: Tensor, x: Tensor) -> Tensor:
    """c times the derivative of GELU's tanh approximation."""
    made: Tensor = aten.gelu_backward.default(c, x, approximate="tanh")
    return made


def softcap_gradient(c: Tensor, x: Tensor, cap: float) -> Tensor:
    """c times the derivative of cap tanh(x / cap)."""
    return c * (1 - torch.tanh(x / cap).square())


GRADIENTS: dict[str, Callable[..., Tensor]] = {"gelu_tanh": gelu_tanh_gradient, "softcap": softcap_gradient}
"""The derivatives of recognised activations."""


@dataclass(frozen=True)
class Quotient(DifferenceRule):
    """c_a = c (1/b + 1/b0) / 2 and c_b = -c (a + a0) / (2 b b0): exact for a / b - a0 / b0."""

    name: ClassVar[str] = "quotient"

    def shares(self, site: Site, edge: Any, operands: tuple[Operand, ...]) -> Edges:
        top, bottom = site.op.args
        if not isinstance(bottom, fx.Node):
            return site.vjp(edge, operands)
        edges: Edges = {}
        for operand in operands:
            if operand.argument == 0:
                edges[operand] = site.emit(kernels.numerator_share, edge, top, *pair(site, bottom))
            else:
                edges[operand] = site.emit(kernels.denominator_share, edge, *pair(site, top), *pair(site, bottom))
        return edges


@dataclass(frozen=True)
class Quadratic(DifferenceRule):
    """c_x = VJP(c) at the mean of both runs: exact for variances."""

    name: ClassVar[str] = "quadratic"

    def shares(self, site: Site, edge: Any, operands: tuple[Operand, ...]) -> Edges:
        means = {operand: site.emit(kernels.midpoint, *pair(site, operand.node)) for operand in operands}
        return site.at(means).vjp(edge, operands)


def root_share(target: Any, args: Any, kwargs: Any, c: Tensor, y: Tensor, y0: Tensor) -> Tensor:
    """VJP of y^2 at ``args``, of c / (y + y0): y - y0 = (y^2 - y0^2) / (y + y0)."""
    total = y + y0
    squared = torch.func.vjp(lambda x: target(x, *args[1:], **kwargs).square(), args[0])
    (made,) = squared[1](c / torch.where(total == 0, 1, total))
    share: Tensor = made
    return share


@dataclass(frozen=True)
class RootOfSquares(DifferenceRule):
    """Deviations and Euclidean norms, whose squares are quadratic: exact at the mean of both runs."""

    name: ClassVar[str] = "root_of_squares"

    def shares(self, site: Site, edge: Any, operands: tuple[Operand, ...]) -> Edges:
        (operand,) = operands
        moved = site.at({operand: site.emit(kernels.midpoint, *pair(site, operand.node))}).op
        arguments = (site.node.target, moved.args, moved.kwargs, edge, *pair(site, site.node))
        return {operand: site.emit(root_share, *arguments, autograd=True)}


@dataclass(frozen=True)
class NormDifference(DifferenceRule):
    """Layer, group, RMS and training batch norm: midpoints of centred input times rstd, and rstd by its exact multiple.

    In training the samples of a batch norm's batch share their statistics, so that each gets shares of the others.
    """

    name: ClassVar[str] = "norm_difference"

    def shares(self, site: Site, edge: Any, operands: tuple[Operand, ...]) -> Edges:
        (operand,) = operands
        x, args = pair(site, operand.node), site.op.args
        name = op_name(site.node)
        if site.op.pattern is not None:
            scale, form = scale_of(site)
            options = (list(form.dims), form.centred, form.divides)
            return {operand: site.emit(kernels.self_normalised, edge, *x, *pair(site, scale), *options)}
        if name == "aten::native_batch_norm" and not args[5]:
            return BatchNorm().propagate(site, edge)
        scales = pair(site, site.output(2))
        if name == "aten::native_layer_norm":
            return {operand: site.emit(kernels.layer_normalised, edge[0], args[2], *x, *scales, len(args[1]))}
        if name == "aten::native_group_norm":
            return {operand: site.emit(kernels.group_normalised, edge[0], args[1], *x, *scales, args[6])}
        return {operand: site.emit(kernels.batch_normalised, edge[0], args[1], *x, *scales)}


@dataclass(frozen=True)
class SoftmaxDifference(DifferenceRule):
    """Softmax, log-softmax and log-sum-exp with logarithmic means of both runs' probabilities: exact, no residual."""

    name: ClassVar[str] = "softmax_difference"

    def shares(self, site: Site, edge: Any, operands: tuple[Operand, ...]) -> Edges:
        (operand,) = operands
        x, dims = pair(site, operand.node), site.op.args[1]
        name = op_name(site.node)
        if name == "aten::logsumexp":
            arguments = (list(dims), bool(site.op.argument(2, "keepdim", False)))
            return {operand: site.emit(kernels.logsumexp_difference, edge, *x, *arguments)}
        made = kernels.log_softmax_difference if "log_softmax" in name else kernels.softmax_difference
        return {operand: site.emit(made, edge, *x, dims)}


@dataclass(frozen=True)
class NormalisedRescale(DifferenceRule):
    """Captum's softmax: rescaled, minus the mean; not exact, the rest is in the sink ``residual``."""

    name: ClassVar[str] = "normalised_rescale"

    def shares(self, site: Site, edge: Any, operands: tuple[Operand, ...]) -> Edges:
        (operand,) = operands
        arguments = (*pair(site, operand.node), *pair(site, site.node), site.op.args[1])
        gradient = site.vjp(edge, operands)[operand]
        return {operand: site.emit(kernels.normalised_rescale, edge, gradient, *arguments)}

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        ((operand, made),) = edges.items()
        arguments = (*pair(site, operand.node), *pair(site, site.node))
        return {"residual": site.emit(kernels.normalised_rescale_residual, edge, made, *arguments)}


@dataclass(frozen=True)
class MaxPoolDifference(DifferenceRule):
    """Max pooling by Captum's cross maxima: a window's change goes to the winner of the run with the larger maximum."""

    name: ClassVar[str] = "max_pool_difference"

    def shares(self, site: Site, edge: Any, operands: tuple[Operand, ...]) -> Edges:
        (operand,) = operands
        y, indices = (pair(site, site.output(index)) for index in (0, 1))
        arguments = (*pair(site, operand.node), *y, *indices, MAX_POOLS[op_name(site.node)])
        return {operand: site.emit(kernels.pooled_difference, edge[0], *arguments)}


@dataclass(frozen=True)
class ExtremeDifference(DifferenceRule):
    """Maxima and minima as max pooling: the change goes to the winner of the run with the more extreme one."""

    name: ClassVar[str] = "extreme_difference"

    def shares(self, site: Site, edge: Any, operands: tuple[Operand, ...]) -> Edges:
        args, sign = site.op.args, EXTREMES[op_name(site.node)]
        if len(args) > 1 and isinstance(args[1], fx.Node):
            runs = (*pair(site, args[0]), *pair(site, args[1]), *pair(site, site.node))
            made = site.emit(kernels.larger_shares, edge, *runs, sign)
            return {operand: made[operand.argument] for operand in operands}
        (operand,) = operands
        y, c = (site.output(0), edge[0]) if isinstance(edge, list) else (site.node, edge)
        dims = args[1] if len(args) > 1 else []
        options = (dims if isinstance(dims, list) else [dims], bool(site.op.argument(2, "keepdim", False)), sign)
        return {operand: site.emit(kernels.extreme_difference, c, *pair(site, operand.node), *pair(site, y), *options)}


@dataclass(frozen=True)
class AttentionDifference(DifferenceRule):
    """Whole attention ops opened into product, softmax and product, each with its exact rule."""

    name: ClassVar[str] = "attention_difference"

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return tuple(operand for operand in op.flowing if operand.argument in (QUERY, KEY, VALUE))

    def shares(self, site: Site, edge: Any, operands: tuple[Operand, ...]) -> Edges:
        op = site.op
        is_flash = op_name(site.node) == "aten::_scaled_dot_product_flash_attention_for_cpu"
        mask = op.kwargs.get("attn_mask") if is_flash else op.argument(3, "attn_mask")
        options = (mask, op.argument(4 if is_flash else 5, "is_causal", False), op.kwargs.get("scale"))
        runs = tuple(pair(site, node) for node in op.args[:3])
        c = edge[0] if isinstance(edge, list) else edge
        made = site.emit(kernels.attention_difference, c, runs, *options)
        return {operand: made[operand.argument] for operand in operands}
