"""Normalisation with its statistics held constant (LN-rule), and softmax (RULES.md 1.6, 1.7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from lrp_compiler.kernels.norm import (
    batch_norm_offset,
    batch_norm_transpose,
    bias_share,
    centred_norm_transpose,
    channel_bias_share,
    group_norm_transpose,
    layer_norm_transpose,
    reciprocal_std,
    rms_norm_transpose,
)
from lrp_compiler.kernels.softmax import log_softmax_residual, softmax_residual
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.program import tensor_of
from lrp_compiler.passes.recognise_norms import NormForm
from lrp_compiler.passes.rules.base import Edges, Rule, Sinks
from lrp_compiler.passes.site import Site


def scale_of(site: Site) -> tuple[fx.Node, NormForm]:
    """What a recognised norm multiplies or divides by, and its form."""
    pattern = site.op.pattern
    assert pattern is not None and isinstance(pattern.form, NormForm)
    return site.op.nodes[pattern.saved[0]], pattern.form


class _OnInput(Rule):
    """A rule that hands everything to the normalised tensor, argument 0."""

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return tuple(operand for operand in op.flowing if operand.argument == 0)

    def parameter_edges(self, site: Site, edge: Any, parameters: tuple[Operand, ...]) -> Edges:
        return site.vjp(edge, parameters)


@dataclass(frozen=True)
class LayerNorm(_OnInput):
    """c_x = rstd (w c - mean(w c)), per group for group norm; only rstd is kept (Ali et al. 2022)."""

    name: ClassVar[str] = "layer_norm"
    by_row: ClassVar[bool] = True

    def propagate(self, site: Site, edge: Any) -> Edges:
        if site.op.pattern is not None:
            scale, form = scale_of(site)
            dtype = tensor_of(site.op.args[0]).dtype
            made = site.emit(centred_norm_transpose, edge, scale, form.divides, dtype, form.dims)
            return dict.fromkeys(self.receivers(site.op), made)
        args = site.op.args
        rstd = site.output(2)
        if op_name(site.node) == "aten::native_group_norm":
            made = site.emit(group_norm_transpose, edge[0], args[1], rstd, args[6])
        else:
            made = site.emit(layer_norm_transpose, edge[0], args[2], rstd, len(args[1]))
        return dict.fromkeys(self.receivers(site.op), made)

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        if site.op.pattern is not None:
            return {}
        grouped = op_name(site.node) == "aten::native_group_norm"
        bias = site.op.args[2 if grouped else 3]
        if bias is None:
            return {}
        if grouped:
            return {"bias": site.emit(channel_bias_share, edge[0], bias, tensor_of(site.op.args[0]).dim() - 2)}
        return {"bias": site.emit(bias_share, edge[0], bias)}


@dataclass(frozen=True)
class RMSNorm(_OnInput):
    """c_x = c / rms(x): the identity rule of RMSNorm, which is also its LN-rule."""

    name: ClassVar[str] = "rms_norm"
    by_row: ClassVar[bool] = True

    def propagate(self, site: Site, edge: Any) -> Edges:
        scale, form = scale_of(site)
        made = site.emit(rms_norm_transpose, edge, scale, form.divides, tensor_of(site.op.args[0]).dtype)
        return dict.fromkeys(self.receivers(site.op), made)


@dataclass(frozen=True)
class BatchNorm(_OnInput):
    """c_x = c w rstd per channel: an affine map, with the batch's statistics held constant in training."""

    name: ClassVar[str] = "batch_norm"

    def propagate(self, site: Site, edge: Any) -> Edges:
        made = site.emit(batch_norm_transpose, edge[0], site.op.args[1], self._statistics(site)[1])
        return dict.fromkeys(self.receivers(site.op), made)

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        weight, bias = site.op.args[1:3]
        return {"bias": site.emit(batch_norm_offset, edge[0], weight, bias, *self._statistics(site))}

    def _statistics(self, site: Site) -> tuple[fx.Node, fx.Node]:
        """(mean, rstd) of shape (C,): the running ones in eval, the batch's in training."""
        _, _, _, mean, variance, training, _, eps = site.op.args
        if training:
            return site.output(1), site.output(2)
        return mean, site.emit(reciprocal_std, variance, eps)


@dataclass(frozen=True)
class SoftmaxGradient(_OnInput):
    """c_x = s (c - sum(s c)): AttnLRP Prop. 3.1 in coefficient space."""

    name: ClassVar[str] = "softmax"
    by_row: ClassVar[bool] = True

    def propagate(self, site: Site, edge: Any) -> Edges:
        return site.vjp(edge, self.receivers(site.op))

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        return softmax_sink(site, edge)


def softmax_sink(site: Site, edge: fx.Node) -> Sinks:
    """The residual of softmax under its own derivative."""
    residual = log_softmax_residual if "log_softmax" in op_name(site.node) else softmax_residual
    return {"softmax": site.emit(residual, edge, site.op.args[0], site.node, site.op.args[1])}
