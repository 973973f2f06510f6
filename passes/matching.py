"""Finding again what a traced function became: its nodes, its results, and what stands for its arguments by now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from lrp_compiler.passes.program import output_node
from lrp_compiler.passes.sizes import is_size
from lrp_compiler.passes.trace import ARGUMENT, EMISSION, Emission


@dataclass
class Match:
    """The nodes that hold what an emission computes; ``values`` maps nodes of the traced graph to them."""

    emission: Emission
    results: dict[fx.Node, fx.Node]
    values: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @property
    def members(self) -> list[fx.Node]:
        """The ops between arguments and results, and the results."""
        return [node for traced, node in self.values.items() if traced.op != "placeholder"]

    @property
    def arguments(self) -> Any:
        """The call's arguments with the nodes that stand for them now, None for what the call does not read."""
        placeholders = (node for node in self.emission.traced.graph.nodes if node.op == "placeholder")

        def current(leaf: Any) -> Any:
            taken = next(placeholders) if leaf is ARGUMENT or is_size(leaf) else None
            return self.values.get(taken) if leaf is ARGUMENT and taken is not None else leaf

        return pytree.tree_map(current, self.emission.arguments)

    def is_whole(self) -> bool:
        """Whether every op of the traced graph that leads to a result stands as it was emitted; finds ``values``."""
        return all(self._stands(traced, node) for traced, node in self.results.items())

    def _stands(self, traced: fx.Node, node: object) -> bool:
        waiting: list[tuple[Any, Any]] = [(traced, node)]
        while waiting:
            expected, found = waiting.pop()
            if not isinstance(expected, fx.Node):
                if isinstance(found, fx.Node) or expected != found or type(expected) is not type(found):
                    return False
            elif is_size(expected.meta.get("val")):
                continue
            elif expected in self.values or not isinstance(found, fx.Node):
                if self.values.get(expected) is not found:
                    return False
            else:
                self.values[expected] = found
                if expected.op != "placeholder":
                    if found.op != "call_function" or found.target is not expected.target:
                        return False
                    pairs = _paired(expected, found)
                    if pairs is None:
                        return False
                    waiting += pairs
        return True


def _paired(expected: fx.Node, found: fx.Node) -> list[tuple[Any, Any]] | None:
    """The arguments of two calls, leaf by leaf; None where they differ in number."""
    leaves, tree = pytree.tree_flatten((expected.args, expected.kwargs))
    others, other_tree = pytree.tree_flatten((found.args, found.kwargs))
    return list(zip(leaves, others, strict=True)) if tree == other_tree else None


def matches(graph: fx.Graph) -> Iterator[Match]:
    """Every emission that has a result in ``graph``, in the order of their last results, whole or not."""
    found: dict[Emission, dict[fx.Node, fx.Node]] = {}
    for node in graph.nodes:
        emission, traced = node.meta.get(EMISSION, (None, None))
        if emission is not None and output_node(emission.traced.graph) in traced.users:
            found.setdefault(emission, {})[traced] = node
    for emission, results in found.items():
        yield Match(emission, results)


def match_of(node: fx.Node) -> Match | None:
    """The emission whose result ``node`` is, with this result alone."""
    emission, traced = node.meta.get(EMISSION, (None, None))
    return None if emission is None else Match(emission, {traced: node})
