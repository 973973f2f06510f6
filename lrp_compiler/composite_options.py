"""Composites made of others: with the largest relevance alone, with a rule for routers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from lrp_compiler.passes.errors import ArgumentError
from lrp_compiler.passes.operation import Operation
from lrp_compiler.passes.optable import OpClass
from lrp_compiler.passes.rules.base import Composite, Matcher, Rule, on
from lrp_compiler.passes.rules.filter import TopRelevance
from lrp_compiler.passes.rules.product import Uniform
from lrp_compiler.passes.rules.routing import ConstantRouter, is_routing


def keep_top(composite: Composite, fraction: float) -> Composite:
    """``composite`` keeping the ``fraction`` of largest relevance per sample behind every linear map and product."""
    lines: list[tuple[Matcher, Rule]] = []
    for matcher, rule in composite.lines:
        lines.append((_restricted(matcher, to_products=True), TopRelevance(rule, fraction)))
        lines.append((_restricted(matcher, to_products=False), rule))
    return replace(composite, name=f"{composite.name}, top {fraction:g}", lines=tuple(lines))


def _restricted(matcher: Matcher, *, to_products: bool) -> Matcher:
    """``matcher`` for linear maps and products alone, or for all else."""
    return replace(matcher, where=_IsProduct(to_products, matcher.where))


@dataclass(frozen=True)
class _IsProduct:
    """Whether an op is a linear map or product, as asked, and meets a further test."""

    wanted: bool
    further: Callable[[Operation], bool] | None

    def __call__(self, op: Operation) -> bool:
        is_product = op.op_class in (OpClass.LINEAR, OpClass.BILINEAR)
        return is_product == self.wanted and (self.further is None or self.further(op))


WITH_ROUTER = "lrp_compiler.composites.with_router"


def with_router(composite: Composite, router: Literal["constant", "product"]) -> Composite:
    """``composite`` with a rule for what weighs the experts of a mixture: routing weights constant, or factors.

    With "constant" relevance flows through the experts alone; with "product" half of it goes through the router, as
    AttnLRP shares any product. Raises ArgumentError for another value, and for composites that explain differences
    from a reference run or follow gradients, where a constant router would not be one.
    """
    rules: dict[str, Rule] = {"constant": ConstantRouter(), "product": Uniform()}
    if router not in rules:
        raise ArgumentError(function=WITH_ROUTER, name="router", value=router, cause="it is 'constant' or 'product'")
    if composite.against_reference or not composite.patterns:
        cause = f"'{composite.name}' has no products of experts and routers to share, but derivatives or differences"
        raise ArgumentError(function=WITH_ROUTER, name="router", value=router, cause=cause)
    return composite.override((on(where=is_routing), rules[router]), name=f"{composite.name}, {router} router")
