"""Whole attention ops: AttnLRP is the ordinary backward scaled by (1/4, 1/4, 1/2), CP-LRP its V part (RULES.md 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from lrp_compiler.kernels.attention import attention_map_relevance, attention_mask_coefficient, attention_sinks
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.rules.base import Edges, Rule, Sinks
from lrp_compiler.passes.site import Site

QUERY, KEY, VALUE = 0, 1, 2


@dataclass(frozen=True)
class Attention(Rule):
    """Shares of the ordinary backward of softmax(Q K^T) V: each of the two products is split between its factors.

    A side that relevance cannot flow to (a constant query, say) leaves its share to the other side.
    """

    name: ClassVar[str] = "attention"
    by_row: ClassVar[bool] = True

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return tuple(operand for operand in op.flowing if operand.argument in (QUERY, KEY, VALUE))

    def shares(self, op: Operation) -> dict[Any, float]:
        """The factor on the gradient of each flowing operand, by argument position."""
        present = {operand.argument for operand in self.receivers(op)}
        scored = [side for side in (QUERY, KEY) if side in present]
        half = 0.5 if scored and VALUE in present else 1.0
        return {side: half if side == VALUE else half / len(scored) for side in present}

    def map_share(self, op: Operation) -> float:
        shares = self.shares(op)
        return sum(share for side, share in shares.items() if side != VALUE)

    def parameter_edges(self, site: Site, edge: Any, parameters: tuple[Operand, ...]) -> Edges:
        """A learned additive mask (relative positions) is a term of the scores."""
        arguments = _attention_arguments(site)
        mask = arguments[3]
        if any(operand.node is not mask for operand in parameters):
            return super().parameter_edges(site, edge, parameters)
        c = edge[0] if isinstance(edge, list) else edge
        made = site.emit(attention_mask_coefficient, c, *arguments, self.map_share(site.op))
        return dict.fromkeys(parameters, made)

    def propagate(self, site: Site, edge: Any) -> Edges:
        shares = self.shares(site.op)
        edge = edge if isinstance(edge, list) else [edge]
        # Scaling the incoming edge once saves scaling each outgoing one.
        common = max(shares.values())
        scaled = [site.scale(c, common) if isinstance(c, fx.Node) else c for c in edge]
        single = len(scaled) == 1
        edges = site.vjp(scaled[0] if single else scaled, self.receivers(site.op))
        return {o: site.scale(made, shares[o.argument] / common) for o, made in edges.items()}

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        return sinks_with_shares(site, edge, self.shares(site.op))


@dataclass(frozen=True)
class AttentionValueOnly(Attention):
    """The attention map is constant: everything flows to V (CP-LRP, the AH-rule)."""

    name: ClassVar[str] = "attention_value_only"
    by_row: ClassVar[bool] = True

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return tuple(operand for operand in op.flowing if operand.argument == VALUE)


def sinks_with_shares(site: Site, edge: Any, shares: dict[Any, float]) -> Sinks:
    """The softmax residual and the mask's share, given each side's factor on its gradient."""
    scored = shares.get(QUERY, 0.0) + shares.get(KEY, 0.0)
    c = edge[0] if isinstance(edge, list) else edge
    softmax, masked = site.emit(attention_sinks, c, *_attention_arguments(site), shares.get(VALUE, 0.0), scored)
    return {"softmax": softmax, "mask": masked}


def map_relevance(site: Site, edge: Any, share: float) -> fx.Node:
    """Relevance at the attention map, (..., L, S), for ops that keep no map."""
    c = edge[0] if isinstance(edge, list) else edge
    return site.emit(attention_map_relevance, c, *_attention_arguments(site), share)  # type: ignore[no-any-return]


def _attention_arguments(site: Site) -> tuple[Any, ...]:
    """(query, key, value, mask, is_causal, scale) of an attention op."""
    op = site.op
    is_flash = op_name(site.node) == "aten::_scaled_dot_product_flash_attention_for_cpu"
    mask = op.kwargs.get("attn_mask") if is_flash else op.argument(3, "attn_mask")
    is_causal = op.argument(4 if is_flash else 5, "is_causal", False)
    return (*op.args[:3], mask, is_causal, op.kwargs.get("scale"))
