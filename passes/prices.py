"""What it costs to keep a forward value for relevance, and what to compute it again: both in bytes moved."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from lrp_compiler.passes.deferral import GENERATOR_READERS, REPLAY, either
from lrp_compiler.passes.draws import draws
from lrp_compiler.passes.emitter import promise
from lrp_compiler.passes.optable import OpClass, OpEntry, aten_names, classify, op_name
from lrp_compiler.passes.packing import PACKERS, UNPACKERS
from lrp_compiler.passes.program import facts, first_argument, value_of
from lrp_compiler.passes.sizes import hints
from lrp_compiler.passes.storage import bytes_of, shown
from lrp_compiler.passes.trace import SCALARS

HEAVY = frozenset({OpClass.LINEAR, OpClass.BILINEAR, OpClass.ATTENTION})
FLOPS_PER_BYTE_OF_OTHERS = {OpClass.RECURRENT: 1000}
"""Ops whose flops are not counted -> a guess per byte of what they read and write."""


@dataclass(frozen=True)
class Prices:
    """How much memory traffic one is ready to pay for a byte not kept, and what a call, a flop and a draw cost.

    A processor moves about 10 GB/s while it computes 100 GFlop/s and takes 5 us per op, on two cores as on an
    accelerator a hundred times faster, and 9 ns to draw a number; only these ratios matter.
    """

    kept_byte: float = 4.0
    call: float = 65536.0
    flop: float = 0.1
    draw: float = 90.0


@dataclass
class Pricing:
    """The prices of one program's values; flops are counted once per signature, computing is priced once per value.

    What is ``late`` is no forward pass' to keep that ran before.
    """

    prices: Prices
    late: frozenset[fx.Node] = frozenset()
    counted: dict[Any, int] = field(default_factory=dict)
    computing: dict[fx.Node, int | None] = field(default_factory=dict)

    def dearer(self, factor: float) -> Pricing:
        """The same where a byte that is kept costs ``factor`` times as much."""
        return replace(self, prices=replace(self.prices, kept_byte=self.prices.kept_byte * factor))

    def keep(self, node: fx.Node) -> int | None:
        """The price of keeping a value from the forward pass on; None for what has no memory of its own."""
        value = value_of(node)
        if node.op == "placeholder":
            return 0
        if node.target is either or node.target in UNPACKERS:
            # Kept, if at all, as what they are made of.
            return None
        if node in self.late or shown(node) is not None or not isinstance(value, (torch.Tensor, *SCALARS)):
            return None
        extra = 0.0
        if node.target in PACKERS:
            # Packed in the forward pass and unpacked in the other: two calls that would not be made otherwise.
            elements = math.prod(_sizes(first_argument(node)))
            extra = 2 * self.prices.call + PACKERS[node.target].time * elements
        return int(self.prices.kept_byte * bytes_of(value) + extra)

    def recompute(self, node: fx.Node) -> int | None:
        """The price of computing a value again from its operands; None where that gives another value."""
        if node not in self.computing:
            self.computing[node] = self._recompute(node)
        return self.computing[node]

    def _recompute(self, node: fx.Node) -> int | None:
        if facts(node).part != "forward" or node.target is operator.getitem or shown(node) is not None:
            # Relevance ops run once on whichever side they are.
            return 0
        if REPLAY not in node.meta and not is_repeatable(node):
            return None
        if all(user.target is promise for user in node.users):
            # What relevance alone reads is computed once as well, on whichever side.
            return 0
        if REPLAY in node.meta:
            return int(self.prices.call + self.prices.draw * math.prod(hints(value_of(node).shape)))
        return int(self.prices.call + _moved(node) + self.prices.flop * self.flops(node))

    def never_pays(self, node: fx.Node, recompute: int) -> bool:
        """Whether keeping all that an op makes is no dearer than running it again, its operands left aside."""
        return 0 < recompute >= self.prices.kept_byte * bytes_of(value_of(node))

    def flops(self, node: fx.Node) -> int:
        """The floating-point operations of a product, a convolution or attention; 0 where traffic says it all."""
        entry = classify(node)
        if entry is not None and entry.op_class in FLOPS_PER_BYTE_OF_OTHERS:
            return FLOPS_PER_BYTE_OF_OTHERS[entry.op_class] * _moved(node)
        if entry is None or entry.op_class not in HEAVY:
            return 0
        tensors = [value_of(operand) for operand in node.all_input_nodes]
        key = (node.target, tuple(hints(value.shape) for value in tensors if isinstance(value, torch.Tensor)))
        if key not in self.counted:
            self.counted[key] = self._count(node, entry)
        return self.counted[key]

    def _count(self, node: fx.Node, entry: OpEntry) -> int:
        if entry.op_class is OpClass.ATTENTION:
            # Two products of queries with all keys or values.
            return 4 * math.prod(_sizes(node.args[0])) * _sizes(node.args[1])[-2]
        outputs = math.prod(hints(value_of(node).shape))
        if "conv" in op_name(node):
            return 2 * outputs * math.prod(_sizes(node.args[1])[1:])
        return 2 * outputs * _sizes(node.args[entry.factors[0]])[-1]


def _sizes(operand: Any) -> tuple[int, ...]:
    """The shape of an operand in the captured call."""
    return hints(value_of(operand).shape)


PICKING = aten_names("index_select embedding gather take")
"""Ops that read no more of their first operand than they write."""


def _moved(node: fx.Node) -> int:
    """The bytes an op reads and writes."""
    if op_name(node) in PICKING:
        return 2 * bytes_of(value_of(node))
    return sum(bytes_of(value_of(operand)) for operand in node.all_input_nodes) + bytes_of(value_of(node))


def is_repeatable(node: fx.Node) -> bool:
    """Whether an op gives the same value when run again: torch's own, and draws from a generator of known state."""
    if REPLAY in node.meta or node.target is operator.getitem:
        return True
    if node.target in GENERATOR_READERS or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target.namespace == "aten" and not draws(node) and not node.target._schema.is_mutable
