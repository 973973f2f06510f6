"""Questions about where values come from and go to that recognisers share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from lrp_compiler.passes.optable import OpClass, aten_names, classify, op_name
from lrp_compiler.passes.program import Constant, InputKind, Program, carries_float, is_float, tensor_of
from lrp_compiler.passes.sizes import Size, at_hints

aten = torch.ops.aten

RESHAPES = aten_names(
    "view reshape _unsafe_view transpose permute t mT numpy_T squeeze unsqueeze flatten unflatten expand expand_as"
    " contiguous clone to _to_copy type_as alias movedim swapaxes view_as repeat_interleave"
)
"""Movement that keeps all of its one input."""

CONTRACTIONS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})
PRODUCTS = frozenset({aten.mul.Tensor, *CONTRACTIONS})


def factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that ``node`` multiplies, or None."""
    if node.target not in PRODUCTS:
        return None
    left, right = node.args[:2]
    return (left, right) if isinstance(left, fx.Node) and isinstance(right, fx.Node) else None


def stripped(node: fx.Node) -> fx.Node:
    """The value that ``node`` shows in another shape."""
    while node.op == "call_function" and op_name(node) in RESHAPES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def is_movement(node: fx.Node) -> bool:
    """Whether ``node`` only moves values about."""
    entry = classify(node) if node.op == "call_function" else None
    return entry is not None and entry.op_class in (OpClass.MOVEMENT, OpClass.TUPLE)


def float_operands(node: fx.Node) -> list[fx.Node]:
    """The operands of ``node`` that hold floats."""
    return [operand for operand in node.all_input_nodes if carries_float(operand)]


def value_operands(node: fx.Node) -> list[fx.Node]:
    """The operands whose values ``node`` is computed from; of reshapes such as expand_as only the first counts."""
    first = node.args[0] if node.args else None
    return [first] if op_name(node) in RESHAPES and isinstance(first, fx.Node) else list(node.all_input_nodes)


def data_nodes(program: Program) -> set[fx.Node]:
    """The nodes that depend on what the user passes in."""
    users = {spec.node for spec in program.inputs if spec.kind is InputKind.USER}
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.name in users or (
            node.op == "call_function" and any(operand in found for operand in value_operands(node))
        ):
            found.add(node)
    return found


ELEMENTWISE = frozenset({OpClass.ADD, OpClass.MULTIPLY, OpClass.DIVIDE, OpClass.ACTIVATION, OpClass.NONLINEAR})


def kin(node: fx.Node, data: set[fx.Node]) -> set[fx.Node]:
    """``node`` and the data it is computed from by elementwise ops, running sums and movement.

    Of the decay exp(Delta A) of a state-space model these hold Delta, and neither B, C nor the signal.
    """
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in found or current not in data or not carries_float(current):
            continue
        found.add(current)
        entry = classify(current) if current.op == "call_function" else None
        takes_part = current.target in (aten.select.int, aten.slice.Tensor) or op_name(current) in RESHAPES | KEEPERS
        if takes_part or (entry is not None and entry.op_class in ELEMENTWISE):
            waiting += value_operands(current)
    return found


KEEPERS = aten_names("cumsum masked_fill pad constant_pad_nd tril triu sum where")
"""Ops that compute a log-decay's running sums from its steps."""


CASTS = aten_names("to _to_copy type_as contiguous clone alias")
"""Movement that leaves even the shape."""


def uncast(node: fx.Node) -> fx.Node:
    """The value of which ``node`` is a copy, of another type perhaps."""
    while node.op == "call_function" and op_name(node) in CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def number(value: object) -> float | None:
    """``value`` as a float if it is a number among a node's arguments, an open size as in the captured call."""
    value = at_hints(value) if isinstance(value, Size) else value
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def multiple(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, k) of a node that is x k or x / k for a number k."""
    if op_name(node) not in ("aten::mul", "aten::div") or len(node.args) != 2 or node.kwargs:
        return None
    value, factor = node.args[0], number(node.args[1])
    if not isinstance(value, fx.Node) or not factor:
        return None
    return value, factor if op_name(node) == "aten::mul" else 1 / factor


def summands(node: fx.Node) -> tuple[object, ...] | None:
    """What ``node`` adds up, nodes or numbers, each once."""
    is_sum = op_name(node) == "aten::add" and len(node.args) == 2 and node.kwargs.get("alpha", 1) == 1
    return node.args if is_sum else None


class Flow:
    """A graph and where its values come from, worked out once for all recognisers.

    ``data`` depends on what the user passes in. ``signals`` are floats that may carry relevance: computed from float
    inputs, or from what integer inputs look up. ``learned`` is computed from parameters and holds no signal.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[fx.Node] = list(program.graph.nodes)
        self.places = {node: place for place, node in enumerate(self.nodes)}
        self.named = {node.name: node for node in self.nodes}
        self.kinds = {spec.node: spec.kind for spec in program.inputs}
        self.data = data_nodes(program)
        self.signals = self._signals()
        self.learned = self._learned()
        self.returned = {leaf for leaf in program.outputs if not isinstance(leaf, Constant)}
        self.returned |= {mutation.value for mutation in program.mutations}

    def kind(self, node: fx.Node) -> InputKind | None:
        """What kind of graph input ``node`` is, if it is one."""
        return self.kinds.get(node.name)

    def is_fixed(self, node: fx.Node) -> bool:
        """Whether ``node`` is no signal, or a user input as it is (a mask or rotation that the caller has made)."""
        return node not in self.signals or self.kind(stripped(node)) is InputKind.USER

    def inside(self, root: fx.Node, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
        """Those of ``nodes`` that are read on the way to ``root`` alone, in the order of the graph."""
        kept = {root}
        for node in sorted({*nodes} - kept, key=self.places.__getitem__, reverse=True):
            if node.op == "call_function" and node.name not in self.returned and kept.issuperset(node.users):
                kept.add(node)
        return tuple(node.name for node in sorted(kept - {root}, key=self.places.__getitem__))

    def _signals(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.nodes:
            if self.kind(node) is InputKind.USER and is_float(node.meta.get("val")):
                found.add(node)
            elif node.op == "call_function" and carries_float(node):
                looked_up = op_name(node) == "aten::embedding" and node.args[1] in self.data
                if looked_up or (_computes(node) and any(operand in found for operand in value_operands(node))):
                    found.add(node)
        return found

    def _learned(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.nodes:
            if self.kind(node) is InputKind.PARAMETER:
                found.add(node)
            elif node.op == "call_function" and node not in self.signals:
                computes = _computes(node) or op_name(node) == "aten::embedding"
                if computes and any(operand in found for operand in value_operands(node)):
                    found.add(node)
        return found


def _computes(node: fx.Node) -> bool:
    """Whether the floats of ``node`` are computed from those of its operands."""
    entry = classify(node)
    return entry is None or entry.op_class is not OpClass.NON_RELEVANCE


def kept_shape(node: fx.Node, dims: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of ``node`` with size 1 along ``dims``."""
    return tuple(1 if dim in dims else size for dim, size in enumerate(tensor_of(node).shape))
