"""Every stage prints as a Python program, each line with what the passes know of its value."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lrp_compiler.passes.branches import SIDES, Branches, ConditionalRelevance
from lrp_compiler.passes.emitter import PROMISES
from lrp_compiler.passes.program import Program, facts, module_path, output_node
from lrp_compiler.passes.source_lines import user_source

DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b8",
}


def print_program(program: Program, *, sources: bool = True) -> str:
    """The program as text; ``sources`` adds the user's source lines (goldens leave them out)."""
    parts = [_function("forward", program.graph, sources)]
    if program.relevance_graph is not None:
        parts.append(_function("relevance", program.relevance_graph, sources))
    parts += [
        _function(one.name, one.recipe, sources) for one in (*program.prepared_forward, *program.prepared_relevance)
    ]
    if program.mutations:
        parts.append("\n".join(f"# {m.input} becomes {m.value}" for m in program.mutations))
    if program.buffers:
        parts.append("\n".join(_describe_buffer(buffer) for buffer in program.buffers))
    if program.results:
        labels = (f"# result: {r.kind} at {r.site} {r.detail}".rstrip() for r in program.results)
        parts.append("\n".join(labels))
    return "\n\n".join(parts) + "\n"


def _describe_buffer(buffer: Any) -> str:
    readers = ", ".join(buffer.readers)
    return f"# buffer: {buffer.name} {buffer.kind} {buffer.dtype}{list(buffer.shape)} {buffer.bytes} B for {readers}"


def _function(name: str, graph: fx.Graph, sources: bool) -> str:
    arguments = [node.name for node in graph.nodes if node.op == "placeholder"]
    lines = [f"def {name}({', '.join(arguments)}):"]
    source = None
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        here = user_source(node) if sources else None
        if here is not None and here != source:
            lines.append(f"    # {here}")
            source = here
        lines += [f"    {line}" for line in _branches(node, sources)]
        lines.append(f"    {node.name} = {_call(node)}  # {_comment(node)}")
    lines.append(f"    return {_text(output_node(graph).args[0])}")
    return "\n".join(lines)


def _branches(node: fx.Node, sources: bool) -> list[str]:
    """The programs inside a torch.cond, as functions it is given."""
    if not isinstance(node.target, Branches):
        return []
    lines: list[str] = []
    for side, branch in zip(SIDES, node.target.branches, strict=True):
        relevance = isinstance(node.target, ConditionalRelevance) and branch.relevance_graph is not None
        graph = branch.relevance_graph if relevance else branch.graph
        assert graph is not None
        lines += _function(f"{node.name}_when_{side}", graph, sources).splitlines()
    return lines


def _call(node: fx.Node) -> str:
    if node.op == "get_attr":
        return str(node.target)
    if node.target is operator.getitem:
        return f"{_text(node.args[0])}[{node.args[1]}]"
    arguments = [_text(arg) for arg in node.args] + [f"{key}={_text(value)}" for key, value in node.kwargs.items()]
    if isinstance(node.target, Branches):
        arguments = [f"{node.name}_when_{side}" for side in SIDES] + arguments
    is_op = isinstance(node.target, torch._ops.OpOverload)
    name = str(node.target) if is_op else getattr(node.target, "__name__", str(node.target))
    target = PROMISES.get(node.target) or name
    return f"{target}({', '.join(arguments)})"


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, tuple):
        return f"({', '.join(_text(item) for item in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(_text(item) for item in value)}]"
    return repr(value)


def _comment(node: fx.Node) -> str:
    known = facts(node)
    words = [_type(node.meta.get("val"))]
    if known.part in ("relevance", "promise"):
        words.append(f"of {known.origin}")
    elif known.live:
        words.append("live" if known.flows or known.rule is None else "live, stopped")
    if known.pattern is not None:
        words.append(f"{known.pattern.kind} of {', '.join(known.pattern.inputs)}")
    words += [structure.kind for structure in known.structures]
    if known.rule is not None:
        words.append(f"rule {known.rule}")
    if path := module_path(node):
        words.append(f"in {path}")
    return "; ".join(words)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_type(item) for item in value)})"
    return type(value).__name__
