"""decompose: composite ops that the table does not know -> the ops they call, which it may know.

It runs before functionalise, since torch's decompositions write in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lrp_compiler.passes.canonicalise import REWRITES
from lrp_compiler.passes.optable import classify, op_name
from lrp_compiler.passes.program import Program
from lrp_compiler.passes.rewriter import Replacement, Rewriter


def decompose(program: Program, kept: frozenset[str] = frozenset()) -> Program:
    """The same calls with unknown composite ops opened; ops named in ``kept`` (``aten::x``) stay as they are."""
    if not any(is_opaque(node, kept) for node in program.graph.nodes):
        return program
    return _Decomposer(program.fork(), kept).run()


def is_opaque(node: fx.Node, kept: frozenset[str]) -> bool:
    """Whether ``node`` calls a composite op that has no rule of its own and is not written in place."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    known = classify(node) is not None or op_name(node) in REWRITES
    return is_composite(node) and not known and op_name(node) not in kept


def is_composite(node: fx.Node) -> bool:
    """Whether ``node`` calls an op that is nothing but calls of other ops."""
    return has_kernel(node, "CompositeImplicitAutograd")


def has_kernel(node: fx.Node, key: str) -> bool:
    """Whether torch has code of its own for the op of ``node`` under a dispatch key."""
    schema = node.target._schema  # type: ignore[union-attr]
    name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


class _Decomposer(Rewriter):
    def __init__(self, program: Program, kept: frozenset[str]) -> None:
        super().__init__(program)
        self.kept = kept

    def replacement(self, node: fx.Node) -> Replacement:
        if not is_opaque(node, self.kept):
            return None
        return self.expand(node, node.target, call_op, node.target, tuple(node.args), dict(node.kwargs))


def call_op(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``target(*args, **kwargs)``."""
    return target(*args, **kwargs)
