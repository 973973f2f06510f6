"""Where a program attends: its attention maps and the outputs of its heads, fused ops and opened ones alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lrp_compiler.passes.operation import DATA_OF_A_VALUE
from lrp_compiler.passes.optable import OpClass, classify
from lrp_compiler.passes.program import Program, facts, forward_nodes, module_path, tensor_of, value_of
from lrp_compiler.passes.request import Reading


@dataclass(frozen=True)
class AttentionSite:
    """One attention: the node its map is read at and how, and the node that holds the heads' outputs."""

    map: str
    reading: Reading
    output: str


def attention_sites(program: Program) -> dict[str, AttentionSite]:
    """Every attention on the path of relevance, by the path of its module (``path@1`` for the second there)."""
    found: dict[str, AttentionSite] = {}
    counts: dict[str, int] = {}
    for node in forward_nodes(program):
        site = _site(node) if facts(node).live and node.op == "call_function" else None
        if site is not None:
            path = module_path(node) or node.name
            counts[path] = counts.get(path, -1) + 1
            found[f"{path}@{counts[path]}" if counts[path] else path] = site
    return found


def _site(node: fx.Node) -> AttentionSite | None:
    entry = classify(node)
    if entry is not None and entry.op_class is OpClass.ATTENTION:
        output = node if not isinstance(value_of(node), (tuple, list)) else _first_output(node)
        return AttentionSite(node.name, "attention_map", output.name)
    if entry is not None and entry.op_class is OpClass.SOFTMAX and tensor_of(node).dim() >= 3:
        mixed = _mixed_values(node)
        return None if mixed is None else AttentionSite(node.name, "relevance", mixed.name)
    return None


def _first_output(node: fx.Node) -> fx.Node:
    return next(user for user in node.users if user.args[1] == 0)


def _mixed_values(weights: fx.Node) -> fx.Node | None:
    """The product of an attention map with values, behind casts, reshapes and dropout."""
    for user in weights.users:
        entry = classify(user) if user.op == "call_function" else None
        if entry is None:
            continue
        if entry.op_class is OpClass.LINEAR and user.args[0] is weights:
            return user
        if entry.op_class in DATA_OF_A_VALUE or entry.op_class is OpClass.MULTIPLY:
            found = _mixed_values(user)
            if found is not None:
                return found
    return None
