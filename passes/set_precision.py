"""set_precision: relevance in another dtype than the model's; the forward pass keeps every bit.

A wider dtype is entered as early as possible: forward values are widened where relevance reads them, and all that is
made of them is computed wide. A narrower one as late as possible: what depends on no seed (gates, denominators) is
computed in the model's dtype and rounded where it meets an edge. Narrow are the ops that are known to add up in float32
or to round once per element; others, and what the results are read off with, run in the model's dtype. Weights that are
narrowed become graph inputs, which a module keeps from call to call (``casts``).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lrp_compiler.kernels.registry import spec_of
from lrp_compiler.passes.branches import Branches
from lrp_compiler.passes.casting import Casts, names_dtype, rename_dtypes
from lrp_compiler.passes.deferral import GENERATOR_READERS, drop_dead_nodes
from lrp_compiler.passes.optable import aten_names, schema_name
from lrp_compiler.passes.packing import PACKERS
from lrp_compiler.passes.precision import ADJUSTED, Precision
from lrp_compiler.passes.program import Program, facts, first_argument, is_complex, value_of
from lrp_compiler.passes.storage import VIEWS

NARROWED = VIEWS | aten_names(
    "matmul mm bmm addmm baddbmm linear dot mv convolution convolution_backward conv1d conv2d conv3d conv_transpose1d"
    " conv_transpose2d conv_transpose3d sum mean cat stack pad constant_pad_nd slice_backward select_backward reshape"
    " flatten contiguous clone pixel_shuffle pixel_unshuffle channel_shuffle roll flip repeat index_select"
    " avg_pool2d_backward avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward"
    " _softmax_backward_data native_layer_norm_backward _scaled_dot_product_flash_attention_backward"
    " _scaled_dot_product_efficient_attention_backward new_zeros zeros_like"
)
"""Ops beside the pointwise ones and the kernels that compute in a narrower dtype: they add up in float32 inside."""

ROUNDED = aten_names("_scaled_dot_product_flash_attention_for_cpu_backward")
"""Ops that take longer in a narrower dtype (up to four times): what they read is stored in it, and widened for them."""

READING = VIEWS | aten_names("sum reshape flatten")
"""Ops beside the pointwise ones that results are read off with, of which one addition or product each is rounded."""

STATISTICS: dict[str, frozenset[str]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": frozenset({"logsumexp", "attn_mask"}),
    "aten::_scaled_dot_product_flash_attention_backward": frozenset({"logsumexp"}),
    "aten::_scaled_dot_product_efficient_attention_backward": frozenset({"logsumexp"}),
    "aten::native_layer_norm_backward": frozenset({"mean", "rstd", "weight", "bias"}),
    "lrp::attention_lrp_bwd": frozenset({"logsumexp", "bias", "sink"}),
    "lrp::norm_bwd": frozenset({"scale"}),
}
"""Op -> its arguments that stay as they are, since it takes them in float32 beside narrower values."""


def set_precision(program: Program, precision: Precision | None = None) -> Program:
    """The same relevance, computed in the dtypes that ``precision`` gives; None keeps the model's."""
    if precision is None:
        return program
    program = program.fork()
    setter = _Setter(program, precision)
    setter.run()
    drop_dead_nodes(program.graph, kept=GENERATOR_READERS)
    return program.having(casts=setter.casts.read())


class _Setter:
    def __init__(self, program: Program, precision: Precision) -> None:
        self.precision = precision
        self.nodes = list(program.graph.nodes)
        self.seeded = _seeded(self.nodes)
        self.read_out = _reading_results(self.nodes)
        self.before = {node: value_of(node) for node in self.nodes if node.op != "output"}
        self.casts = Casts(program, self.seeded)

    def run(self) -> None:
        for node in self.nodes:
            if node.op == "output":
                node.args = fx.map_arg(node.args, self.returned)
            elif facts(node).part == "relevance":
                self.visit(node)

    def visit(self, node: fx.Node) -> None:
        """Give an op its operands in the dtype it computes in, and note what it makes of them."""
        if node.target is operator.getitem:
            node.meta["val"] = value_of(first_argument(node))[node.args[1]]
            return
        changes = self.changes(node)
        is_rounded = not changes and self.is_rounded(node)
        kept = _statistics(node) if changes or is_rounded else set()

        def given(operand: fx.Node) -> fx.Node:
            known = self.before[operand]
            if not isinstance(known, torch.Tensor):
                return operand
            if is_rounded and operand not in kept:
                return self.casts.of(self.casts.of(operand, self.precision.of(known.dtype)), known.dtype)
            wanted = self.precision.of(known.dtype) if changes else known.dtype
            return self.casts.of(operand, torch.promote_types(known.dtype, wanted) if operand in kept else wanted)

        node.args, node.kwargs = fx.map_arg(node.args, given), fx.map_arg(node.kwargs, given)
        if changes:
            rename_dtypes(node, self.precision.of)
            node.meta["val"] = pytree.tree_map(self.casts.retyped(self.precision.of), node.meta["val"])

    def changes(self, node: fx.Node) -> bool:
        """Whether an op of relevance computes in another dtype than it was written in."""
        found = {value.dtype for value in self.values(node) if value.dtype in ADJUSTED}
        if all(self.precision.of(dtype) == dtype for dtype in found) or is_complex(node):
            return False
        if isinstance(node.target, Branches) or node.target in PACKERS or any(map(is_complex, node.all_input_nodes)):
            return False
        if all(self.precision.of(dtype).itemsize >= dtype.itemsize for dtype in found):
            # An op of integers alone makes floats of the default dtype unless it is told one.
            return bool(node.all_input_nodes) or names_dtype(node)
        return node in self.seeded and node not in self.read_out and len(found) == 1 and self.is_narrowed(node)

    def is_rounded(self, node: fx.Node) -> bool:
        """Whether an op computes in the model's dtype on values that were narrow before."""
        found = {value.dtype for value in self.values(node) if value.dtype in ADJUSTED}
        is_narrower = all(self.precision.of(dtype).itemsize < dtype.itemsize for dtype in found)
        return is_narrower and node in self.seeded and schema_name(node.target) in ROUNDED

    def values(self, node: fx.Node) -> list[torch.Tensor]:
        """The tensors that an op reads and makes, as they were before this pass."""
        leaves = pytree.tree_leaves([self.before[one] for one in (*node.all_input_nodes, node)])
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def is_narrowed(self, node: fx.Node) -> bool:
        """Whether an op may compute in a narrower dtype than the model's."""
        kernel = spec_of(node.target)
        if kernel is None:
            return schema_name(node.target) in NARROWED or _is_pointwise(node)
        kept = _statistics(node)
        retyped = self.casts.retyped(self.precision.of)

        def narrowed(operand: fx.Node) -> Any:
            value = self.before[operand]
            return value if operand in kept else pytree.tree_map(retyped, value)

        arguments = fx.map_arg(node.args, narrowed)
        return bool(kernel.supports(*arguments))

    def returned(self, node: fx.Node) -> fx.Node:
        """A result, no narrower than the model would have it."""
        known = self.before[node]
        if facts(node).part != "relevance" or not isinstance(known, torch.Tensor):
            return node
        return self.casts.of(node, torch.promote_types(known.dtype, value_of(node).dtype))


def _seeded(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on a seed."""
    found: set[fx.Node] = set()
    for node in nodes:
        if facts(node).part == "seed" or (node.op != "output" and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _reading_results(nodes: list[fx.Node]) -> set[fx.Node]:
    """The ops between the last products and the results, which read relevance off."""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        is_read = facts(node).part == "relevance" and all(user.op == "output" or user in found for user in node.users)
        if is_read and (schema_name(node.target) in READING or _is_pointwise(node)):
            found.add(node)
    return found


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _statistics(node: fx.Node) -> set[fx.Node]:
    """The operands that stay as they are."""
    names = STATISTICS.get(schema_name(node.target), frozenset())
    if not names:
        return set()
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    named = {argument.name: given for argument, given in zip(arguments, node.args, strict=False)} | node.kwargs
    return {given for name in names if isinstance(given := named.get(name), fx.Node)}
