"""Which values share memory, and how much a value takes."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from lrp_compiler.passes.optable import aten_names, schema_name
from lrp_compiler.passes.program import first_argument, value_of
from lrp_compiler.passes.sizes import at_hints, hints

VIEWS = aten_names(
    "view transpose permute expand unsqueeze squeeze select slice t unflatten alias detach as_strided diagonal narrow"
    " movedim swapaxes numpy_T mT unfold real imag view_as_real view_as_complex _conj _neg_view"
)
"""Ops that always show what they are given."""
CASTS = aten_names("to type_as contiguous resolve_conj resolve_neg")
"""Ops that return what they are given where there is nothing to do."""
TUPLE_VIEWS = aten_names("split split_with_sizes chunk unbind")


def shown(node: fx.Node) -> fx.Node | None:
    """The node whose memory ``node`` shows, seen another way; None for a value with memory of its own."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        source = first_argument(node)
        return first_argument(source) if schema_name(source.target) in TUPLE_VIEWS else None
    schema = getattr(node.target, "_schema", None)
    if schema is None or len(node.all_input_nodes) != 1 or not isinstance(node.args[0], fx.Node):
        return None
    if all(given.alias_info is None for given in schema.returns):
        return None
    shows = schema.name in VIEWS | TUPLE_VIEWS or (_is_unchanged(node) if schema.name in CASTS else _is_view(node))
    return node.args[0] if shows else None


def _is_unchanged(node: fx.Node) -> bool:
    """Whether a cast has nothing to cast."""
    before, after = value_of(first_argument(node)), value_of(node)
    if node.kwargs.get("copy") or not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    same = before.dtype == after.dtype and before.device == after.device
    return same and hints(before.stride()) == hints(after.stride())


def _is_view(node: fx.Node) -> bool:
    """Whether an op that copies only where it must (a reshape) need not; found out on a tensor without memory."""
    before = value_of(first_argument(node))
    others = pytree.tree_leaves((node.args[1:], node.kwargs))
    if not isinstance(before, torch.Tensor) or any(isinstance(leaf, fx.Node) for leaf in others):
        return False
    meta = torch.empty_strided(hints(before.shape), hints(before.stride()), dtype=before.dtype, device="meta")
    made: Any = node.target(meta, *at_hints(node.args[1:]), **at_hints(node.kwargs))  # type: ignore[operator]
    if not isinstance(made, torch.Tensor):
        return False
    return bool(made.untyped_storage()._cdata == meta.untyped_storage()._cdata)


def base_of(node: fx.Node) -> fx.Node:
    """The node whose memory a chain of views shows."""
    while (source := shown(node)) is not None:
        node = source
    return node


def bytes_of(value: Any) -> int:
    """What a value takes (in the captured call, where sizes differ): a tensor's elements, eight for a number.

    Of a tensor whose size the data decides it is not known ahead: 0.
    """
    if isinstance(value, (tuple, list)):
        return sum(map(bytes_of, value))
    if not isinstance(value, torch.Tensor):
        # A number (an item, a predicate); an absent output takes nothing.
        return 0 if value is None else 8
    if any(not isinstance(size, int) and free_unbacked_symbols(size) for size in value.shape):
        return 0
    return math.prod(hints(value.shape)) * value.element_size()
