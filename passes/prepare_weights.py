"""prepare_weights: what weights alone decide is an input of both graphs, made once for each version of the weights.

That is what rules make of weights (W + gamma W+), what the model does (weight norm), and on CPU the layout that
products read (kernels/packed_products.py). The program from before stays beside it: derivatives with respect to weights
and answers to several questions at once go by that one. Packed products may round otherwise, so that a forward pass
whose outputs or buffers are asked for has none.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lrp_compiler.kernels.packed_products import packs
from lrp_compiler.passes.branches import Branches
from lrp_compiler.passes.buffers import Buffer
from lrp_compiler.passes.canonicalise import bound
from lrp_compiler.passes.deferral import GENERATOR_READERS
from lrp_compiler.passes.lifetimes import writes
from lrp_compiler.passes.optable import schema_name
from lrp_compiler.passes.preparation import Preparation
from lrp_compiler.passes.program import (
    FACTS,
    Facts,
    InputKind,
    Program,
    copy_graph,
    facts,
    first_argument,
    output_node,
    tensor_of,
    value_of,
)
from lrp_compiler.passes.sizes import Size, is_settled
from lrp_compiler.passes.storage import base_of, bytes_of, shown

aten = torch.ops.aten

Recipe = tuple[tuple[str, ...], fx.Graph]
"""Names of weights, and how a value is made of them."""

KEPT = (InputKind.PARAMETER, InputKind.BUFFER)
"""The graph inputs whose values stay from call to call, until somebody changes them."""


def prepare_weights(program: Program, is_wanted: bool = False, keeps_outputs: bool = True) -> Program:
    """The same program with further inputs, where the option of this name asks for it."""
    if not is_wanted or program.relevance_graph is None:
        return program
    changed = {mutation.input for mutation in program.mutations}
    weights = {spec.node for spec in program.inputs if spec.kind in KEPT} - changed
    casts = {cast.name: cast for cast in program.casts}
    returned = sum(isinstance(leaf, str) for leaf in program.outputs) + len(program.mutations)
    forward = _Preparer(program.graph, weights, casts, returned)
    forward.run(packing=not keeps_outputs and not program.mutations)
    relevance = _Preparer(program.relevance_graph, weights, casts, len(program.results))
    relevance.run(packing=True)
    return program.having(
        graph=forward.graph,
        relevance_graph=relevance.graph,
        prepared_forward=tuple(forward.made),
        prepared_relevance=tuple(relevance.made),
        buffers=_held_elsewhere(program.buffers, relevance.graph),
        plain=program,
    )


def _held_elsewhere(buffers: tuple[Buffer, ...], relevance: fx.Graph) -> tuple[Buffer, ...]:
    """The buffers that are left: recipes make the others, and inputs hold some of them."""
    nodes = {node.name for node in relevance.nodes}
    prepared = {facts(node).origin: node.name for node in relevance.nodes if facts(node).part == "prepared"}
    found = []
    for buffer in buffers:
        if buffer.holder in nodes:
            found.append(buffer)
        elif buffer.holder in prepared:
            found.append(replace(buffer, kind="prepared", holder=prepared[buffer.holder]))
    return tuple(found)


class _Preparer:
    """Rewrites a copy of one graph; of what it returns the first ``returned`` values belong to the caller."""

    def __init__(self, graph: fx.Graph, weights: set[str], casts: dict[str, Any], returned: int) -> None:
        self.graph = copy_graph(graph)
        self.casts = casts
        self.made: list[Preparation] = []
        self.steady = self._steady(weights)
        output = output_node(self.graph).args[0]
        handed_out = output[:returned] if isinstance(output, tuple) else ()
        self.handed_out = {base_of(node) for node in handed_out if isinstance(node, fx.Node)}
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        # Behind all that the passes before know of, in front of seeds.
        self.behind = next((node for node in reversed(inputs) if facts(node).part != "seed"), inputs[0])

    def run(self, packing: bool) -> None:
        """Pack the weights of products, then let inputs take the place of what is still made of weights."""
        for node in list(self.graph.nodes) if packing else ():
            self.pack(node)
        # All recipes first: one may lead past a value that becomes an input itself.
        recipes = {node: self.recipe(node) for node in self.graph.nodes if self.is_prepared(node)}
        for node, recipe in recipes.items():
            node.replace_all_uses_with(self.input(node, recipe))
        for node in reversed(list(self.graph.nodes)):
            if node in self.steady and node.op != "placeholder" and not node.users:
                self.graph.erase_node(node)

    def _steady(self, weights: set[str]) -> set[fx.Node]:
        """The nodes whose values are the same at every call as long as the weights are."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "placeholder":
                is_steady = node.name in weights or node.name in self.casts
            else:
                is_steady = _is_repeatable(node) and found.issuperset(node.all_input_nodes)
            if is_steady:
                found.add(node)
        return found

    def is_prepared(self, node: fx.Node) -> bool:
        """Whether a value is to be an input: it is steady, no view, and others than steady ops read it."""
        if node not in self.steady or node.op == "placeholder" or shown(node) is not None or node in self.handed_out:
            return False
        return isinstance(value_of(node), torch.Tensor) and self.is_read(node)

    def is_read(self, node: fx.Node) -> bool:
        """Whether an op that is not steady reads ``node`` or a view of it."""
        views = (user for user in node.users if user in self.steady and shown(user) is node)
        return any(user not in self.steady for user in node.users) or any(map(self.is_read, views))

    def pack(self, node: fx.Node) -> None:
        """Have a product read its weight in the layout it is computed in."""
        product = _product_with_weight(node)
        if product is None:
            return
        x, weight, is_transposed, bias = product
        rows = math.prod(tensor_of(x).shape[:-1])
        is_known = weight in self.steady and base_of(weight).op == "placeholder" and x not in self.steady
        if not is_known or not is_settled(rows) or not packs(tensor_of(weight), int(rows)):
            return
        if not is_transposed:
            with self.graph.inserting_before(node):
                shape_of = self.graph.call_function(aten.t.default, (weight,))
            shape_of.meta = {"val": tensor_of(weight).t(), FACTS: facts(node)}
            self.steady.add(shape_of)
            weight = shape_of
        packed = self.input(weight, self.recipe(weight), int(rows))
        node.target = torch.ops.mkl._mkl_linear.default
        node.args, node.kwargs = (x, packed, weight, bias, int(rows)), {}

    def recipe(self, node: fx.Node) -> Recipe:
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        weights: dict[str, fx.Node] = {}
        for one in _made_of(node):
            if one.op != "placeholder":
                values[one] = graph.create_node(one.op, one.target)
                values[one].args = fx.map_arg(one.args, values.__getitem__)
                values[one].kwargs = fx.map_arg(one.kwargs, values.__getitem__)
                values[one].meta = {"val": value_of(one)}
                continue
            cast = self.casts.get(one.name)
            name = one.name if cast is None else cast.of
            if name not in weights:
                with graph.inserting_before(next(iter(graph.nodes), None)):
                    weights[name] = graph.placeholder(f"weight_{len(weights)}")
            values[one] = weights[name]
            if cast is not None:
                values[one] = graph.call_function(aten._to_copy.default, (weights[name],), {"dtype": cast.dtype})
                values[one].meta = {"val": value_of(one)}
        graph.output(values[node])
        placed = [one for one in graph.nodes if one.op == "placeholder"]
        return tuple(next(name for name, held in weights.items() if held is one) for one in placed), graph

    def input(self, node: fx.Node, recipe: Recipe, packed_for: int = 0) -> fx.Node:
        """A graph input with what a recipe makes of the size of ``node``, perhaps packed for so many rows."""
        with self.graph.inserting_after(self.behind):
            made = self.graph.placeholder(f"prepared_{node.name}")
        # One weight may be packed for several numbers of rows: arguments are called by their targets.
        made.target = made.name
        made.meta = {"val": value_of(node), FACTS: Facts(part="prepared", origin=node.name)}
        self.behind = made
        of, graph = recipe
        self.made.append(Preparation(made.name, of, graph, bytes_of(value_of(node)), packed_for))
        return made


def _is_repeatable(node: fx.Node) -> bool:
    """Whether an op gives the same of the same operands at every call, whatever the sizes of inputs are."""
    if node.op != "call_function" or not node.all_input_nodes or isinstance(node.target, Branches) or writes(node):
        return False
    if node.target in GENERATOR_READERS or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    return not any(isinstance(leaf, Size) for leaf in pytree.tree_leaves((node.args, node.kwargs)))


def _made_of(node: fx.Node) -> list[fx.Node]:
    """``node`` behind all that it is made of, in the order of the graph."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += current.all_input_nodes
    return sorted(found)


def _product_with_weight(node: fx.Node) -> tuple[fx.Node, fx.Node, bool, fx.Node | None] | None:
    """(x, weight, whether it is read transposed, bias) of a product of rows with a matrix."""
    name = schema_name(node.target) if node.op == "call_function" else ""
    if name == "aten::linear":
        given = bound(node)
        return given["input"], given["weight"], True, given["bias"]
    if name in ("aten::mm", "aten::matmul"):
        x, weight = node.all_input_nodes if len(node.all_input_nodes) == 2 else (first_argument(node),) * 2
        is_matrix = tensor_of(weight).dim() == 2 and tensor_of(x).dim() >= 2
        return (x, weight, False, None) if is_matrix else None
    if name == "aten::addmm":
        given = bound(node)
        is_plain = given["beta"] == 1 and given["alpha"] == 1 and tensor_of(given["self"]).dim() == 1
        return (given["mat1"], given["mat2"], False, given["self"]) if is_plain else None
    return None
