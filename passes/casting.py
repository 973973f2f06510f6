"""Casts among relevance ops: each value once per dtype, as early as what it is made of allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from lrp_compiler.passes.deferral import either
from lrp_compiler.passes.emitter import promise
from lrp_compiler.passes.packing import UNPACKERS
from lrp_compiler.passes.precision import ADJUSTED
from lrp_compiler.passes.program import (
    FACTS,
    Cast,
    Facts,
    InputKind,
    Program,
    facts,
    first_argument,
    tensor_of,
    value_of,
)
from lrp_compiler.passes.sizes import hints
from lrp_compiler.passes.storage import shown

aten = torch.ops.aten


class Casts:
    """Makes casts in the joint graph of ``program``, which it changes in place.

    What shows a whole value (a transposed weight, say) is shown again of the cast value, so that this one is cast once;
    of ``seeded`` values it is not worth it. A parameter that is cast to a narrower dtype becomes a graph input.
    """

    def __init__(self, program: Program, seeded: set[fx.Node]) -> None:
        self.program = program
        self.seeded = seeded
        self.parameters = {spec.node for spec in program.inputs if spec.kind is InputKind.PARAMETER}
        self.last_input = [node for node in program.graph.nodes if node.op == "placeholder"][-1]
        promises = (node for node in program.graph.nodes if node.target is promise)
        self.promises: dict[fx.Node, fx.Node] = {first_argument(node): node for node in promises}
        self.made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.inputs: list[tuple[fx.Node, Cast]] = []

    def read(self) -> tuple[Cast, ...]:
        """The graph inputs that hold narrower parameters."""
        return tuple(cast for node, cast in self.inputs if node.users)

    def of(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The value of ``node`` in another dtype: itself where it has that, or holds no floats."""
        now = tensor_of(node).dtype
        if now == dtype or now not in ADJUSTED:
            return node
        if (node, dtype) not in self.made:
            self.made[node, dtype] = self.cast(node, dtype)
        return self.made[node, dtype]

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if node.target is either:
            return self.again(node, {one: self.of(one, dtype) for one in node.all_input_nodes}, dtype)
        if names_dtype(node) and (node.target in UNPACKERS or not node.all_input_nodes):
            return self.again(node, {}, dtype)
        source = self.whole(node)
        if source is not None:
            seen = first_argument(node) if node.target is promise else node
            return self.again(seen, {first_argument(seen): self.of(source, dtype)}, dtype, at=node)
        value = first_argument(node) if node.target is promise else node
        if value.name in self.parameters and dtype.itemsize < tensor_of(value).dtype.itemsize:
            return self.input(value, dtype)
        with self.program.graph.inserting_after(node if node.op != "placeholder" else self.last_input):
            made = self.program.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
        return self.described(made, node, dtype)

    def whole(self, node: fx.Node) -> fx.Node | None:
        """What ``node`` shows, in the joint graph's terms, where a cast of that serves all that show it."""
        if node in self.seeded:
            return None
        value = first_argument(node) if node.target is promise else node
        source = shown(value)
        if source is None or value.all_input_nodes != [source] or not isinstance(value_of(source), torch.Tensor):
            return None
        if _elements(source) > _elements(value) and self.root(source).name not in self.parameters:
            return None
        return source if value is node else self.promised(source, node)

    def root(self, node: fx.Node) -> fx.Node:
        """The value that ``node`` shows in the end."""
        while (source := first_argument(node) if node.target is promise else shown(node)) is not None:
            node = source
        return node

    def promised(self, value: fx.Node, at: fx.Node) -> fx.Node:
        """The promise of a forward value in front of ``at``: one that stands behind moves there, since it may."""
        known = self.promises.get(value)
        if known is None:
            with self.program.graph.inserting_before(at):
                known = self.program.graph.call_function(promise, (value,))
            known.meta = {"val": value_of(value), FACTS: Facts(part="promise", origin=value.name)}
            self.promises[value] = known
        elif at < known:
            at.prepend(known)
        return known

    def again(
        self, node: fx.Node, operands: dict[fx.Node, fx.Node], dtype: torch.dtype, at: fx.Node | None = None
    ) -> fx.Node:
        """An op once more, behind ``at``, on cast operands and with ``dtype`` where it named its own."""
        with self.program.graph.inserting_after(at or node):
            made = self.program.graph.node_copy(node, lambda old: operands.get(old, old))
        rename_dtypes(made, lambda own: dtype if own in ADJUSTED else own)
        return self.described(made, node, dtype)

    def input(self, parameter: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A graph input that holds a parameter in a narrower dtype."""
        name = f"{parameter.name}_{str(dtype).removeprefix('torch.')}"
        with self.program.graph.inserting_after(self.last_input):
            made = self.program.graph.placeholder(name)
        self.last_input = made
        self.inputs.append((made, Cast(made.name, parameter.name, dtype)))
        made.meta = {"val": self.retyped(lambda _: dtype)(value_of(parameter))}
        made.meta[FACTS] = Facts(part="cast", origin=parameter.name)
        return made

    def described(self, made: fx.Node, like: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A new relevance op with the value of ``like`` in ``dtype``."""
        origin = facts(like).origin or like.name
        made.meta = {
            "val": self.retyped(lambda _: dtype)(value_of(like)),
            FACTS: Facts(part="relevance", origin=origin),
        }
        return made

    def retyped(self, dtypes: Callable[[torch.dtype], torch.dtype]) -> Callable[[Any], Any]:
        """Fake value -> the same in the dtype that ``dtypes`` gives for its own."""

        def retype(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.dtype not in ADJUSTED:
                return value
            with self.program.fake_mode:
                return torch.empty_strided(value.shape, value.stride(), dtype=dtypes(value.dtype), device=value.device)

        return retype


def rename_dtypes(node: fx.Node, dtypes: Callable[[torch.dtype], torch.dtype]) -> None:
    """Have an op name other dtypes among its arguments."""

    def renamed(leaf: Any) -> Any:
        return dtypes(leaf) if isinstance(leaf, torch.dtype) else leaf

    node.args = tuple(map_aggregate(node.args, renamed))
    node.kwargs = dict(map_aggregate(node.kwargs, renamed))


def names_dtype(node: fx.Node) -> bool:
    """Whether an op is told the dtype of what it makes."""
    return any(isinstance(leaf, torch.dtype) for leaf in pytree.tree_leaves((node.args, node.kwargs)))


def _elements(node: fx.Node) -> int:
    """How many elements a value has in the captured call."""
    return math.prod(hints(tensor_of(node).shape))
