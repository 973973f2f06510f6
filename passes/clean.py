"""clean: inline grad-mode and autocast regions, make torch.cond one op; drop assertions, aliases, no-op casts.

Ops remember which autocast regions they stood in. Sizes that differ from call to call become literals of the ops that
take them.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lrp_compiler.passes.branches import Conditional
from lrp_compiler.passes.program import Constant, Program, first_argument, is_float, tensor_of
from lrp_compiler.passes.regions import (
    AUTOCAST,
    AUTOCAST_REGION,
    COND_REGION,
    VMAP_MODULES,
    AutocastRegion,
    branch_program,
    region_error,
)
from lrp_compiler.passes.sizes import as_literal, is_size

aten = torch.ops.aten
GRAD_REGION = "wrap_with_set_grad_enabled"
DROPPED_NAMES = (
    "aten::_assert",
    "aten::sym_constrain",
    "aten::_functional_assert",
    "aten::_nn_functional_assert",
)
ALIASES = frozenset({aten.alias.default, aten.lift_fresh_copy.default})
CASTS = frozenset({"aten::to", "aten::type_as", "aten::contiguous", "aten::_to_copy"})


def clean(program: Program, regions: tuple[AutocastRegion, ...] = ()) -> Program:
    """A flat graph of ATen calls without sub-graphs, assertions, aliases or casts that change nothing.

    A torch.cond becomes one call of a Conditional, whose two programs are cleaned alike. ``regions`` are the autocast
    regions around the program. Raises RegionError for loops and other regions.
    """
    return _Cleaner(program, regions).run()


class _Cleaner:
    """Copies a graph node by node; ``values`` knows what stands for each old node."""

    def __init__(self, program: Program, regions: tuple[AutocastRegion, ...]) -> None:
        self.program = program
        self.regions = regions
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}

    def run(self) -> Program:
        values = self.values
        for node in self.program.graph.nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], lambda old: values[old]))
            else:
                self.copy(self.program.root, node, values)
        renamed = {old.name: new.name for old, new in values.items() if isinstance(new, fx.Node)}
        sizes = {old.name: Constant(new) for old, new in values.items() if not isinstance(new, (fx.Node, tuple, list))}
        known = {**sizes, **renamed}
        outputs = tuple(leaf if isinstance(leaf, Constant) else known[leaf] for leaf in self.program.outputs)
        inputs = tuple(replace(spec, node=renamed[spec.node]) for spec in self.program.inputs)
        self.graph.eliminate_dead_code()
        return self.program.having(graph=self.graph, inputs=inputs, outputs=outputs)

    def copy(self, root: torch.nn.Module, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Copy one node of ``root``'s graph, or stand another in for it."""
        if node.op == "get_attr":
            values[node] = root.get_submodule(str(node.target))
        elif node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            self.enter(node, values)
        elif node.target is operator.getitem and isinstance(values[first_argument(node)], (tuple, list)):
            values[node] = values[first_argument(node)][node.args[1]]
        elif is_size(node.meta.get("val")):
            values[node] = as_literal(node.meta["val"])
        elif getattr(node.target, "__module__", None) in VMAP_MODULES:
            raise region_error("vmap", node)
        elif _is_dropped(node):
            values[node] = None
        elif _is_identity(node):
            values[node] = values[first_argument(node)]
        else:
            values[node] = self.graph.node_copy(node, lambda old: values[old])
            if self.regions:
                values[node].meta[AUTOCAST] = self.regions

    def enter(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Splice a region in, or make it one op."""
        name = getattr(node.target, "__name__", str(node.target))
        arguments: Any = fx.map_arg(node.args, lambda old: values[old])
        if name == GRAD_REGION:
            grad_enabled, body, *operands = arguments
            self.inline(node, values, body, operands, grad_enabled)
        elif name == AUTOCAST_REGION:
            *region, body = arguments[:5]
            outer, self.regions = self.regions, (*self.regions, tuple(region))
            self.inline(node, values, body, list(arguments[5:]), True)
            self.regions = outer
        elif name == COND_REGION:
            values[node] = self.conditional(node, *arguments)
        else:
            raise region_error(name, node)

    def inline(
        self, node: fx.Node, values: dict[fx.Node, Any], body: fx.GraphModule, operands: list[Any], grad_enabled: bool
    ) -> None:
        """Splice in the body of a region; what leaves a no-grad region is detached."""
        inner: dict[fx.Node, Any] = {}
        supplied = iter(operands)
        for old in body.graph.nodes:
            if old.op == "placeholder":
                inner[old] = next(supplied)
            elif old.op == "output":
                results = fx.map_arg(old.args[0], lambda leaf: inner[leaf])
                values[node] = results if grad_enabled else [_detached(self.graph, leaf) for leaf in results]
            else:
                self.copy(body, old, inner)

    def conditional(self, node: fx.Node, predicate: Any, *bodies_and_operands: Any) -> fx.Node:
        """The call of a Conditional in place of a torch.cond."""
        *bodies, operands = bodies_and_operands
        if any(is_size(size) for tensor in _tensors(node) for size in tensor.shape):
            raise region_error("cond with open sizes", node)
        specs = {spec.node: spec for spec in self.program.inputs}
        known = {new: specs[old.name] for old, new in self.values.items() if old.name in specs}
        kept = [known.get(operand) for operand in operands]
        branches = tuple(clean(branch_program(self.program, body, kept, node), self.regions) for body in bodies)
        made = self.graph.create_node("call_function", Conditional(branches), (predicate, *operands), name=node.name)
        made.meta = dict(node.meta)
        return made


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    """The fake tensors that a region takes and gives."""
    values = [node.meta.get("val"), *(operand.meta.get("val") for operand in node.all_input_nodes)]
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _is_dropped(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name.startswith(DROPPED_NAMES)


def _is_identity(node: fx.Node) -> bool:
    """Whether the node returns its first argument unchanged (the same storage, not a copy)."""
    if node.target in ALIASES:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.name not in CASTS:
        return False
    if schema.name == "aten::_to_copy" or node.kwargs.get("copy") or True in node.args[2:]:
        return False
    before, after = tensor_of(first_argument(node)), tensor_of(node)
    same = before.dtype == after.dtype and before.device == after.device and before.stride() == after.stride()
    return same and before.shape == after.shape


def _detached(graph: fx.Graph, node: Any) -> Any:
    if not isinstance(node, fx.Node) or not is_float(node.meta.get("val")):
        return node
    with_grad = graph.call_function(aten.detach.default, (node,))
    with_grad.meta = dict(node.meta)
    return with_grad
