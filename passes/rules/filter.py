"""Relevance filters: only the largest relevance of every sample goes on (the topk of DynamicLRP's engine)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrp_compiler.kernels.linear import masked_product
from lrp_compiler.passes.errors import RuleParameterError
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.rules.base import EdgeKind, Edges, Rule, Sinks
from lrp_compiler.passes.site import Site


def keep_top(edge: Tensor, relevance: Tensor, fraction: float) -> Tensor:
    """``edge`` where ``relevance`` (batch, ...) is among the largest of its sample, signed; zero elsewhere."""
    rows = relevance.reshape(relevance.shape[0], -1) if relevance.dim() else relevance.reshape(1, 1)
    if rows.numel() == 0:
        return edge
    kept = max(1, round(fraction * rows.shape[1]))
    mask = torch.zeros_like(rows).scatter(1, rows.topk(kept, 1).indices, 1.0)
    return edge * mask.reshape(edge.shape)


def dropped(raw: Tensor, kept: Tensor, value: Tensor) -> Tensor:
    """The relevance that a filter lets go of."""
    return masked_product(raw - kept, value)


@dataclass(frozen=True)
class TopRelevance(Rule):
    """Another rule whose result keeps the ``fraction`` of largest signed relevance per sample; not linear in the seed.

    What is filtered out is the sink ``filtered``.
    """

    rule: Rule
    fraction: float
    name: ClassVar[str] = "top_relevance"
    linear_in_seed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise RuleParameterError(rule="TopRelevance", cause=f"fraction must lie in (0, 1], not {self.fraction}")

    @property
    def kind(self) -> EdgeKind:  # type: ignore[override]
        return self.rule.kind

    @property
    def folds_batch_norm(self) -> bool:  # type: ignore[override]
        return self.rule.folds_batch_norm

    @property
    def real_only(self) -> bool:  # type: ignore[override]
        return self.rule.real_only

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return self.rule.receivers(op)

    def tensors(self, op: Operation) -> dict[str, Tensor]:
        return self.rule.tensors(op)

    def propagate(self, site: Site, edge: Any) -> Edges:
        edges = self.rule.propagate(site, edge)
        return {
            o: site.emit(keep_top, made, self._relevance(site, o, made), self.fraction) for o, made in edges.items()
        }

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        raw = self.rule.propagate(site, edge)
        found = self.rule.sinks(site, edge, raw)
        for number, (operand, kept) in enumerate(edges.items()):
            value = operand.node if self.kind == "coefficient" else None
            gone = site.emit(dropped, raw[operand], kept, value) if value else site.emit(torch.sub, raw[operand], kept)
            found = {**found, f"filtered_{number}" if number else "filtered": gone}
        return found

    def _relevance(self, site: Site, operand: Operand, made: Any) -> Any:
        return made if self.kind == "relevance" else site.emit(masked_product, made, operand.node)

    def __str__(self) -> str:
        return f"top {self.fraction:g} of {self.rule}"
