"""The regions of a captured graph: a branch of torch.cond as a program of its own, and which regions are refused."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lrp_compiler.passes.errors import RegionError
from lrp_compiler.passes.program import Constant, InputKind, InputSpec, Program, learn, output_node
from lrp_compiler.passes.source_lines import user_source

COND_REGION = "cond"
AUTOCAST_REGION = "wrap_with_autocast"
AUTOCAST = "autocast"
"""Where a node's meta says which autocast regions it stood in, outermost first."""

AutocastRegion = tuple[str, torch.dtype | None, bool, bool]
"""The arguments of torch.autocast: device type, dtype, whether it is on, whether casts of parameters are kept."""

VMAP_MODULES = frozenset({"torch._functorch.predispatch", "torch._functorch.vmap", "torch._C._functorch"})
"""Where the functions come from that open and close what torch.vmap maps."""
REMEDIES = {
    "while_loop": "Use a python loop with a fixed number of steps; steps past the end can be masked by torch.where.",
    "map_impl": "Write map as a batched operation, or as a python loop over a fixed number of slices.",
    "scan": "Write the scan as a python loop over its steps; selective scans are recognised in that form.",
    "associative_scan": "Write the scan as a python loop over its steps, or as cumsum where it is a running sum.",
    "vmap": "Write the function for a whole batch; most operations broadcast over leading dimensions.",
}
"""Regions that torch can capture and relevance cannot enter -> what to write instead."""


def region_error(name: str, node: fx.Node) -> RegionError:
    """The refusal of a region, with the line that opened it."""
    remedy = REMEDIES.get(name, "Write it with plain tensor operations.")
    inside = [inner for one in node.all_input_nodes for inner in _body(one)]
    places = (place for one in (node, *inside) if (place := user_source(one)) is not None)
    return RegionError(region=name.removesuffix("_impl"), remedy=remedy, source=next(places, None))


def _body(node: fx.Node) -> list[fx.Node]:
    """The nodes of the sub-graph that a node fetches."""
    owner = node.graph.owning_module
    body = owner.get_submodule(str(node.target)) if node.op == "get_attr" and owner is not None else None
    return list(body.graph.nodes) if isinstance(body, fx.GraphModule) else []


def branch_program(outer: Program, body: fx.GraphModule, specs: list[InputSpec | None], region: fx.Node) -> Program:
    """The body of a branch as a program whose inputs are the operands of the region.

    ``specs`` says which operands are graph inputs of ``outer``; the others count as what a user passes in. Every
    operand's value comes with the call, a constant's too. Its ops, whose modules torch forgets, are taken to lie in the
    module that called ``region``.
    """
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    inputs = []
    for node, spec in zip(placeholders, specs, strict=True):
        own = InputSpec(node.name, InputKind.USER, node.name)
        made = own if spec is None else replace(spec, node=node.name, constant=None)
        inputs.append(made)
        learn(node, origin=made.target)
    for node in body.graph.nodes:
        if node.op == "call_function" and not node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = region.meta.get("nn_module_stack")
    leaves = output_node(body.graph).args[0]
    assert isinstance(leaves, (tuple, list))
    return Program(
        graph=body.graph,
        root=body,
        fake_mode=outer.fake_mode,
        inputs=tuple(inputs),
        outputs=tuple(leaf.name if isinstance(leaf, fx.Node) else Constant(leaf) for leaf in leaves),
        in_spec=pytree.tree_structure(tuple(range(len(inputs)))),
        out_spec=pytree.tree_structure(tuple(range(len(leaves)))),
        traces=outer.traces,
    )
