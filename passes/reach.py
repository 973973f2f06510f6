"""How rows of an op's output reach back to its operands: which rows of which operand decide them.

One entry for each kind of op that treats rows alike and apart from each other. What is not here needs its operands
whole. Nothing here is about relevance: a linear map of rows is one, whatever its rule.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from lrp_compiler.passes.cuts import Cut, Window, shape_of
from lrp_compiler.passes.optable import aten_names, schema_name
from lrp_compiler.passes.program import value_of
from lrp_compiler.passes.sizes import expression

Reached = dict[int, Cut]
"""Place of an operand among the leaves of an op's arguments -> the rows of it that are read; others are read whole."""

Reach = Callable[[fx.Node, Cut], Reached | None]


def reach(node: fx.Node, cut: Cut) -> Reached | None:
    """The rows of its operands that ``node`` needs for these rows of its (first) output; None where it needs all."""
    known = REACH.get(_name(node))
    if known is not None:
        return known(node, cut)
    tags = getattr(node.target, "tags", ())
    return pointwise(node, cut) if torch.Tag.pointwise in tags and not _draws(node) else None


def _name(node: fx.Node) -> str:
    return "getitem" if node.target is operator.getitem else schema_name(node.target)


def _draws(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def leaves_of(node: fx.Node) -> list[Any]:
    """The leaves of an op's arguments; operands are known by their place among them."""
    return pytree.tree_leaves((node.args, node.kwargs))


def _operands(node: fx.Node) -> Iterator[tuple[int, fx.Node]]:
    for place, leaf in enumerate(leaves_of(node)):
        if isinstance(leaf, fx.Node) and isinstance(value_of(leaf), torch.Tensor):
            yield place, leaf


def aligned(operand: fx.Node, cut: Cut, rank: int, size: sympy.Expr) -> Cut | None:
    """A cut of a value of this rank as it meets an operand that broadcasts to it; None where that has one row."""
    shape = shape_of(operand)
    dim = cut.dim - rank + len(shape)
    return cut.at(dim) if dim >= 0 and shape[dim] == size else None


def pointwise(node: fx.Node, cut: Cut) -> Reached | None:
    """Ops that make every element of those at the same place."""
    shape = shape_of(node)
    found = {place: aligned(operand, cut, len(shape), shape[cut.dim]) for place, operand in _operands(node)}
    return {place: one for place, one in found.items() if one is not None}


def alike(node: fx.Node, cut: Cut) -> Reached | None:
    """Ops that hand on their first argument, of the same shape."""
    return {0: cut}


def _dim(value: Any, rank: int) -> int:
    return int(value) % rank


def _along(node: fx.Node, cut: Cut, place: int = 1) -> Reached | None:
    """Ops along one dimension, those of others apart."""
    return None if cut.dim == _dim(node.args[place], len(shape_of(node))) else {0: cut}


def _linear(node: fx.Node, cut: Cut) -> Reached | None:
    if cut.dim != len(shape_of(node)) - 1:
        return {0: cut}
    has_bias = len(node.args) > 2 and isinstance(node.args[2], fx.Node)
    return {1: cut.at(0), **({2: cut.at(0)} if has_bias else {})}


def _product(node: fx.Node, cut: Cut) -> Reached | None:
    """Matrix products, of stacks of matrices as well."""
    left, right = (shape_of(node.args[place]) for place in (0, 1))  # type: ignore[arg-type]
    rank = len(shape_of(node))
    if len(left) < 2 or len(right) < 2:
        return None
    if cut.dim == rank - 1:
        return {1: cut.at(len(right) - 1)}
    if cut.dim == rank - 2:
        return {0: cut.at(len(left) - 2)}
    size = shape_of(node)[cut.dim]
    found = {place: aligned(node.args[place], cut, rank, size) for place in (0, 1)}  # type: ignore[arg-type]
    return {place: one for place, one in found.items() if one is not None}


def _sum_and_product(node: fx.Node, cut: Cut) -> Reached | None:
    shape = shape_of(node)
    added = aligned(node.args[0], cut, len(shape), shape[cut.dim])  # type: ignore[arg-type]
    return {1 + cut.dim: cut, **({0: added} if added is not None else {})}


def _layer_norm(node: fx.Node, cut: Cut) -> Reached | None:
    normalised = len(node.args[1])  # type: ignore[arg-type]
    return {0: cut} if cut.dim < len(shape_of(node)) - normalised else None


def _reduction(node: fx.Node, cut: Cut) -> Reached | None:
    """Sums and means over given dimensions."""
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    given = node.args[1] if len(node.args) > 1 else None
    if not isinstance(given, (list, tuple)) or not given:
        return None
    gone = {_dim(dim, rank) for dim in given}
    if len(node.args) > 2 and node.args[2]:
        return None if cut.dim in gone else {0: cut}
    return {0: cut.at([dim for dim in range(rank) if dim not in gone][cut.dim])}


def _attention(node: fx.Node, cut: Cut) -> Reached | None:
    """Queries attend each by itself."""
    rank = len(shape_of(node))
    dropout = next(iter(node.args[_DROPOUT[_name(node)] :]), node.kwargs.get("dropout_p", 0.0))
    if cut.dim != rank - 2 or dropout or not (cut.is_plain or not is_causal(node)):
        return None
    reached = {0: cut}
    mask = attention_mask(node)
    if mask is not None:
        place = next(place for place, leaf in enumerate(leaves_of(node)) if leaf is mask and place > 2)
        own = aligned(mask, cut, rank, shape_of(node)[cut.dim])
        reached |= {place: own} if own is not None else {}
    return reached


FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
_DROPOUT = {FLASH: 3, "aten::scaled_dot_product_attention": 4}
_CAUSAL = {FLASH: 4, "aten::scaled_dot_product_attention": 5}


def is_causal(node: fx.Node) -> bool:
    """Whether an attention op lets queries see keys up to their own place alone."""
    return bool(next(iter(node.args[_CAUSAL[_name(node)] :]), node.kwargs.get("is_causal", False)))


def attention_mask(node: fx.Node) -> fx.Node | None:
    """The mask or bias of an attention op."""
    given = node.args[3] if _name(node) != FLASH and len(node.args) > 3 else node.kwargs.get("attn_mask")
    return given if isinstance(given, fx.Node) else None


def _transpose(node: fx.Node, cut: Cut) -> Reached | None:
    rank = len(shape_of(node))
    one, other = (_dim(dim, rank) for dim in node.args[1:3])
    return {0: cut.at({one: other, other: one}.get(cut.dim, cut.dim))}


def _permute(node: fx.Node, cut: Cut) -> Reached | None:
    dims: Any = node.args[1]
    return {0: cut.at(_dim(dims[cut.dim], len(dims)))}


def _flip_two(node: fx.Node, cut: Cut) -> Reached | None:
    rank = len(shape_of(node))
    return {0: cut.at(rank - 1 - cut.dim)} if rank == 2 else None


def _select(node: fx.Node, cut: Cut) -> Reached | None:
    gone = _dim(node.args[1], len(shape_of(node)) + 1)
    return {0: cut.at(cut.dim + (cut.dim >= gone))}


def _slice(node: fx.Node, cut: Cut) -> Reached | None:
    dim = _dim(node.args[1] if len(node.args) > 1 else 0, len(shape_of(node)))
    # A slice of all rows may stand where sizes are open.
    is_whole = shape_of(node) == shape_of(node.args[0])  # type: ignore[arg-type]
    return {0: cut} if cut.dim != dim or is_whole else None


def _join(node: fx.Node, cut: Cut) -> Reached | None:
    dim = _dim(node.args[1] if len(node.args) > 1 else 0, len(shape_of(node)))
    return None if cut.dim == dim else {place: cut for place, _ in _operands(node)}


def _parts(node: fx.Node, cut: Cut) -> Reached | None:
    dim = _dim(node.args[2] if len(node.args) > 2 else 0, len(shape_of(node)))
    return None if cut.dim == dim else {0: cut}


def _part(node: fx.Node, cut: Cut) -> Reached | None:
    """One output of an op that has several: cuts of such ops are told in terms of the first."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    name = _name(source)
    return {0: cut} if node.args[1] == 0 or name in PARTS or name == "aten::native_layer_norm" else None


def reshaped(node: fx.Node, cut: Cut) -> Reached | None:
    """Views of the same elements in the same order: rows stay rows of a dimension, maybe merged with others."""
    before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    above = sympy.prod(after[: cut.dim]) * cut.outer
    below = sympy.prod(after[cut.dim + 1 :]) * cut.inner
    for dim, size in enumerate(before):
        outer, inner = (
            sympy.cancel(above / sympy.prod(before[:dim])),
            sympy.cancel(below / sympy.prod(before[dim + 1 :])),
        )
        whole = all(sympy.fraction(part)[1] == 1 for part in (outer, inner))
        if whole and sympy.expand(outer * cut.size * inner - size) == 0:
            return {0: Cut(dim, cut.rows, cut.size, outer, inner)}
    return None


def _expand(node: fx.Node, cut: Cut) -> Reached | None:
    own = aligned(node.args[0], cut, len(shape_of(node)), shape_of(node)[cut.dim])  # type: ignore[arg-type]
    return {0: own} if own is not None else {}


def _lookup(node: fx.Node, cut: Cut) -> Reached | None:
    return {1: cut} if cut.dim < len(shape_of(node)) - 1 else None


def _table(names: str, how: Reach) -> dict[str, Reach]:
    return dict.fromkeys(sorted(aten_names(names)), how)


RESHAPES = aten_names("view reshape _unsafe_view flatten unflatten unsqueeze squeeze")
EXPANDS = aten_names("expand")
PARTS = aten_names("split split_with_sizes unsafe_split chunk")
WINDOWS = aten_names("select slice")
ATTENTION = frozenset(_DROPOUT)

REACH: dict[str, Reach] = {
    **_table("contiguous to _to_copy detach alias type_as", alike),
    **_table("where __and__ __or__ __xor__ hardswish hardsigmoid", pointwise),
    **_table("linear", _linear),
    **_table("mm bmm matmul", _product),
    **_table("addmm", _sum_and_product),
    **_table("native_layer_norm", _layer_norm),
    **_table("softmax _softmax log_softmax _log_softmax _safe_softmax cumsum", _along),
    **_table("sum mean amax amin", _reduction),
    **dict.fromkeys(sorted(ATTENTION), _attention),
    **_table("transpose", _transpose),
    **_table("permute", _permute),
    **_table("t numpy_T", _flip_two),
    **_table("select", _select),
    **_table("slice", _slice),
    **_table("cat", _join),
    **dict.fromkeys(sorted(PARTS), _parts),
    **dict.fromkeys(sorted(RESHAPES), reshaped),
    **dict.fromkeys(sorted(EXPANDS), _expand),
    **_table("embedding", _lookup),
    "getitem": _part,
}
"""Table name -> how rows reach back; any other op that torch calls pointwise is one."""


def window_of(node: fx.Node) -> Cut | None:
    """The rows that a selection with numbers known ahead shows of its operand."""
    if schema_name(node.target) not in WINDOWS or len(node.args) < 3 or not isinstance(node.args[0], fx.Node):
        return None
    shape = value_of(node.args[0]).shape
    dim, size = _dim(node.args[1], len(shape)), shape[_dim(node.args[1], len(shape))]
    numbers = [arg for arg in node.args[2:] if isinstance(arg, int)]
    if len(numbers) != len(node.args) - 2:
        return None
    if schema_name(node.target) == "aten::select":
        start = numbers[0] % size if isinstance(size, int) else numbers[0]
        return Cut(dim, Window(start, sys.maxsize if start == -1 else start + 1, 1), expression(size))
    if not isinstance(size, int):
        return None
    start, stop, step = (slice(*numbers) if numbers[1:] else slice(numbers[0], size)).indices(size)
    return Cut(dim, Window(start, stop, len(range(start, stop, step)), step), expression(size))
