"""Which kernel computes the relevance of each op, or why torch does."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx

from lrp_compiler.kernels.registry import LEFT_TO_TORCH, spec_of
from lrp_compiler.passes.backend import Backend, takes_kernels
from lrp_compiler.passes.kernel_use import KernelUse
from lrp_compiler.passes.optable import OpClass, classify, op_name
from lrp_compiler.passes.program import Program, facts, forward_nodes, module_path
from lrp_compiler.passes.rules.signsplit import SignSplit


@dataclass(frozen=True)
class KernelRow:
    """One op of the forward graph that relevance flows through: the kernels its relevance runs, or why none."""

    node: str
    op: str
    module: str
    kernels: tuple[str, ...]
    reason: str

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        return (self.node, self.op, ", ".join(self.kernels) or "torch", self.module, self.reason)


HEAD = ("node", "op", "relevance by", "module", "why")

KINDS: dict[OpClass, str] = {
    OpClass.BILINEAR: "plain product",
    OpClass.ADD: "addition",
    OpClass.MOVEMENT: "movement",
    OpClass.TUPLE: "movement",
    OpClass.REDUCTION: "mean pooling and resizing",
    OpClass.BATCH_NORM: "batch norm",
    OpClass.RECURRENT: "recurrence",
    **dict.fromkeys(
        (OpClass.ACTIVATION, OpClass.NONLINEAR, OpClass.MULTIPLY, OpClass.DIVIDE, OpClass.POWER), "lone elementwise"
    ),
}
"""What ops of a class count as in ``LEFT_TO_TORCH``; linear maps depend on their rule."""


def kernel_rows(program: Program, backend: Backend) -> tuple[KernelRow, ...]:
    """A row for every op that relevance flows through, in the order of the forward pass; of a partitioned program."""
    allowed = takes_kernels(program.graph, backend)
    emitted: dict[str, list[fx.Node]] = {}
    assert program.relevance_graph is not None
    for node in program.relevance_graph.nodes:
        if node.op == "call_function":
            emitted.setdefault(facts(node).origin, []).append(node)
    uses: dict[str, list[KernelUse]] = {}
    for use in program.kernels:
        uses.setdefault(use.op, []).append(use)
    rows = []
    for node in forward_nodes(program):
        if node.op == "call_function" and (facts(node).flows or node.name in uses):
            made = emitted.get(node.name, [])
            runs = tuple(spec.name for one in made if (spec := spec_of(one.target)) is not None)
            # An op that is of the dialect from the start runs its reference where there are no kernels.
            kernels = runs if allowed else ()
            why = str(allowed) if not allowed else _reason(node, made, uses.get(node.name, []))
            rows.append(KernelRow(node.name, op_name(node), module_path(node), kernels, "" if kernels else why))
    return tuple(rows)


def kernel_summary(rows: tuple[KernelRow, ...]) -> str:
    """One line: how often each kernel runs, and what torch computes."""
    counts = Counter(kernel for row in rows for kernel in row.kernels)
    others = Counter(row.reason for row in rows if not row.kernels)
    if not counts:
        reason = next(iter(others), "nothing flows")
        return f"none: {reason}" if len(others) <= 1 else f"none: {len(rows)} ops by torch"
    used = ", ".join(f"{kernel} x {count}" for kernel, count in counts.items())
    return f"{used}; {sum(others.values())} of {len(rows)} ops by torch"


def _reason(node: fx.Node, made: list[fx.Node], uses: list[KernelUse]) -> str:
    """Why no kernel computes the relevance of ``node``, by ``made``."""
    refused = next((use.reason for use in uses if use.reason), None)
    if refused is not None:
        return refused
    taken = next((use for use in uses if use.kernels), None)
    if taken is not None:
        return f"taken in by {', '.join(taken.kernels)}"
    if not made:
        return "nothing is left to compute: its edge is that of its output, or a kernel took it in"
    entry = classify(node)
    if entry is not None and entry.op_class is OpClass.LINEAR:
        shape = "convolution" if "conv" in op_name(node) else "linear"
        return LEFT_TO_TORCH[f"{'one-sided' if isinstance(facts(node).rule, SignSplit) else 'plain'} {shape}"]
    if "fft" in op_name(node):
        return LEFT_TO_TORCH["Fourier transform"]
    kind = KINDS.get(entry.op_class) if entry is not None else None
    computed = ", ".join(dict.fromkeys(op_name(one) for one in made))
    return LEFT_TO_TORCH[kind] if kind is not None else f"no kernel is meant for it: {computed}"
