"""Rules that users write as plain torch functions of coefficients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from lrp_compiler.passes.errors import RuleResultError, RuleTraceError
from lrp_compiler.passes.rules.base import Edges, Rule
from lrp_compiler.passes.site import Site

RuleFunction = Callable[..., Any]
"""(c, out, *args, **kwargs) -> the coefficient of each tensor argument (a tensor, or a tuple; None for nothing)."""


def _called(fn: RuleFunction, c: Any, out: Any, args: Any, kwargs: Any) -> list[Any]:
    made = fn(c, out, *args, **kwargs)
    return list(made) if isinstance(made, (tuple, list)) else [made]


@dataclass(frozen=True)
class UserRule(Rule):
    """A function of the output's coefficient, the output and the op's arguments, traced into the graph."""

    fn: RuleFunction
    name: ClassVar[str] = "user"

    def propagate(self, site: Site, edge: Any) -> Edges:
        op = site.op
        outputs = list(site.float_outputs().values())
        out = outputs[0] if isinstance(site.node.meta["val"], torch.Tensor) else outputs
        try:
            made = site.emit(_called, self.fn, edge, out, op.args, op.kwargs, autograd=True)
        except GuardOnDataDependentSymNode:
            raise RuleTraceError(op=op, cause=f"'{self}' branches on the value of a tensor") from None
        if len(made) != len(op.operands):
            raise RuleResultError(
                rule=str(self),
                op=str(op),
                got=f"{len(made)} value(s)",
                expected=f"{len(op.operands)}, one per tensor",
            )
        for c in made:
            if c is not None and not isinstance(c, fx.Node):
                raise RuleResultError(
                    rule=str(self), op=str(op), got=f"a {type(c).__name__}", expected="a tensor or None"
                )
        return {o: c for o, c in zip(op.operands, made, strict=True) if c is not None and o in op.flowing}

    def __str__(self) -> str:
        return getattr(self.fn, "__name__", self.name)
