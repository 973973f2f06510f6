"""Python that depends on tensor values: which line does it, and what to write instead."""

from __future__ import annotations

import ast
import contextlib

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols
from torch.utils import _pytree as pytree

from lrp_compiler.passes.errors import DataDependentError
from lrp_compiler.passes.program import Program, facts, forward_nodes
from lrp_compiler.passes.source_lines import user_source

BRANCH = (
    "Write it with torch.cond(predicate, true_fn, false_fn, operands), or compute both sides and choose with"
    " torch.where; a python bool argument works too."
)
LOOP = "Run a fixed number of steps, and let torch.where keep what steps past the end would change."
STEPS = "Pass the number of steps as a python int argument of forward, or run a fixed number of steps."
SIZE = "Pass the size as a python int argument of forward, or read it from an integer input with .item()."
BOOL = "Keep it a tensor and choose with torch.where or torch.cond; bool() of a tensor decides while tracing."
FLOAT = "Take .item() in place of float(): it gives a number that differs from call to call."
MATHS = "Compute on the tensor before .item() (v.sqrt().item()), or use torch.sym_sqrt and its like on the number."
EXTREME = "Compute on tensors: torch.minimum, torch.maximum or clamp."
ASSERTION = "Leave the check out of forward, or write it as torch._assert_async, which does not decide anything."
MASK = "Keep the size fixed: torch.where(mask, x, 0), or x * mask, in place of x[mask]."
POSITIONS = "Keep the size fixed: compute with the mask itself, or take a fixed number of positions with topk."
FIXED = "Keep the size fixed: pad to the largest and mask with torch.where."
REMEDIES = {
    "aten::index": MASK,
    "aten::masked_select": MASK,
    "aten::nonzero": POSITIONS,
    "aten::nonzero_numpy": POSITIONS,
    "aten::slice": SIZE,
}
"""Op whose result has a size that depends on values -> what to write instead."""

CALLS = {"int": SIZE, "bool": BOOL, "float": FLOAT, "range": STEPS, "min": EXTREME, "max": EXTREME}


def refusal(model: str, error: BaseException, place: str | None) -> DataDependentError | None:
    """The refusal of a decision that python takes by a tensor's value, if that is what failed at ``file:line``."""
    if not isinstance(error, GuardOnDataDependentSymNode) or place is None:
        return None
    path, _, number = place.partition(" ")[0].rpartition(":")
    tree, text = ast.Module([], []), ""
    with contextlib.suppress(OSError, SyntaxError), open(path, encoding="utf-8") as file:
        text = file.read()
        tree = ast.parse(text)
    line, remedy = _culprit(tree, int(number))
    lines = text.splitlines()
    source = f"{path}:{line} {lines[line - 1].strip()}" if line <= len(lines) else place
    return DataDependentError(
        model=model, cause="python decides by the value of a tensor", remedy=remedy, source=source
    )


def _culprit(tree: ast.AST, line: int) -> tuple[int, str]:
    """The line of the statement or call that decides at ``line``, and its remedy; a statement counts before calls."""
    deciding = [(node, remedy) for node in ast.walk(tree) if (remedy := _remedy(node, line)) is not None]
    statements = [(node.lineno, remedy) for node, remedy in deciding if isinstance(node, ast.stmt)]
    calls = [(line, remedy) for node, remedy in deciding if not isinstance(node, ast.stmt)]
    # ast.walk goes from the outermost to the innermost.
    return (statements or calls or [(line, BRANCH)])[-1]


def _remedy(node: ast.AST, line: int) -> str | None:
    """What to write in place of ``node`` if what it decides by stands at ``line``."""
    match node:
        case ast.If(test=decides) | ast.IfExp(test=decides):
            remedy = BRANCH
        case ast.While(test=decides):
            remedy = LOOP
        case ast.For(iter=decides):
            remedy = STEPS
        case ast.Assert(test=decides):
            remedy = ASSERTION
        case ast.Call(func=ast.Name(id=name)) as decides if name in CALLS:
            remedy = CALLS[name]
        case ast.Call(func=ast.Attribute(value=ast.Name(id="math"))) as decides:
            remedy = MATHS
        case _:
            return None
    return remedy if decides.lineno <= line <= (decides.end_lineno or line) else None


def refuse_sizes(program: Program) -> None:
    """Raise DataDependentError where relevance would pass or read a tensor whose size depends on values."""
    for node in forward_nodes(program):
        if not facts(node).live:
            continue
        for value in (*node.all_input_nodes, node):
            if any(is_unsized(leaf) for leaf in pytree.tree_leaves(value.meta.get("val"))):
                schema = getattr(value.target, "_schema", None)
                name = schema.name if schema is not None else str(value.target)
                cause = f"the size of what {name} gives depends on the values of tensors"
                raise DataDependentError(
                    model="the model", cause=cause, remedy=REMEDIES.get(name, FIXED), source=user_source(value)
                )


def is_unsized(value: object) -> bool:
    """Whether ``value`` is a tensor whose size is known only when the model runs."""
    return isinstance(value, torch.Tensor) and bool(free_unbacked_symbols(value))
