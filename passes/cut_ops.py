"""Calling an op of the graph once more, on fewer rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lrp_compiler.passes.cuts import Cut, Cuts, Picked, Window, cut_shape
from lrp_compiler.passes.optable import schema_name
from lrp_compiler.passes.program import Facts, first_argument, tensor_of
from lrp_compiler.passes.reach import ATTENTION, EXPANDS, FLASH, RESHAPES, WINDOWS, is_causal
from lrp_compiler.passes.trace import Emitter

aten = torch.ops.aten


def called_on_rows(
    emitter: Emitter,
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cuts: Cuts,
    nodes: dict[str, fx.Node],
    shown: Cut | None,
) -> fx.Node:
    """Emit the op of ``node`` on operands of which ``cuts`` (in terms of its output) left some rows.

    Of the operand of a selection nothing but the rows ``shown`` may be left.
    """
    name = schema_name(node.target)
    if name in RESHAPES:
        return emitter.call(aten.reshape.default, args[0], cut_shape(node, cuts))
    if name in EXPANDS:
        return emitter.call(aten.expand.default, args[0], cut_shape(node, cuts))
    if name in WINDOWS and shown is not None:
        if name == "aten::slice":
            return emitter.call(aten.alias.default, args[0])
        return emitter.call(aten.select.int, args[0], shown.dim, 0)
    if name in ATTENTION and cuts and is_causal(node):
        (cut,) = cuts
        return _causal_attention(emitter, node, args, kwargs, cut.rows, nodes)
    return emitter.call(node.target, *args, **kwargs)


def _causal_attention(
    emitter: Emitter,
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rows: Window | Picked,
    nodes: dict[str, fx.Node],
) -> fx.Node:
    """Attention of some queries to the keys up to the place of each."""
    stamp, emitter.stamp = emitter.stamp, Facts()
    key = tensor_of(args[1])
    if isinstance(rows, Window):
        queries = tensor_of(first_argument(node)).shape[-2]
        every = emitter.call(aten.arange.default, queries, device=key.device)
        places = emitter.call(aten.slice.Tensor, every, 0, rows.start, rows.stop, rows.step)
    else:
        places = nodes[rows.indices]
    bias = emitter(causal_bias, places, key.shape[-2], key.dtype)
    emitter.stamp = stamp
    if schema_name(node.target) != FLASH:
        given = {name: value for name, value in kwargs.items() if name in ("scale", "enable_gqa")}
        return emitter.call(node.target, *args[:3], bias, 0.0, False, **given)
    return emitter.call(node.target, *args[:3], 0.0, False, **{**kwargs, "attn_mask": bias})


def causal_bias(places: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """(queries, keys): 0 up to the place of each query, -inf beyond."""
    later = torch.arange(keys, device=places.device) > places[:, None]
    return torch.zeros(later.shape, dtype=dtype, device=places.device).masked_fill(later, float("-inf"))
