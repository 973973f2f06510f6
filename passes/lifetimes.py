"""How long the values of a graph live in the code made of it: from the op that makes them to their last reader."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import fx

from lrp_compiler.kernels.bits import BLOCK as MASKED_AT_ONCE
from lrp_compiler.kernels.bits import through, through_
from lrp_compiler.passes.optable import aten_names, schema_name
from lrp_compiler.passes.packing import WORKING_MEMORY
from lrp_compiler.passes.program import first_argument, tensor_of, value_of
from lrp_compiler.passes.sizes import hints
from lrp_compiler.passes.storage import bytes_of, shown


def roots_of(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Per node the one that made its memory: behind views, and ops that write to their first argument."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = first_argument(node) if writes(node) else shown(node)
        found[node] = node if source is None else found[source]
    return found


def writes(node: fx.Node) -> bool:
    """Whether an op changes one of its arguments."""
    if node.target is through_:
        return True
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def last_reads(graph: fx.Graph, roots: dict[fx.Node, fx.Node]) -> dict[fx.Node, int]:
    """Per node with memory of its own, the place in the graph of the last op that reads it, also through views."""
    found: dict[fx.Node, int] = {}
    for place, node in enumerate(graph.nodes):
        for value in (node, *node.all_input_nodes):
            found[roots[value]] = place
    return found


@dataclass(frozen=True)
class Footprint:
    """What running a graph allocates: bytes alive while each op runs, and those alive at the end.

    ``peak`` does not count the graph's inputs; of what ops allocate inside, what convolutions do.
    """

    peak: int
    left: int
    at: str


def footprint(graph: fx.Graph, owned: frozenset[fx.Node] = frozenset()) -> Footprint:
    """Follow the allocations of the code made of ``graph``, which gives a value up behind its last reader.

    Inputs in ``owned`` are there from the start and given up likewise.
    """
    roots = roots_of(graph)
    last = last_reads(graph, roots)
    ending: dict[int, int] = {}
    alive, peak, at = 0, 0, ""
    for node in owned:
        alive += bytes_of(value_of(node))
        ending[last[node]] = ending.get(last[node], 0) + bytes_of(value_of(node))
    for place, node in enumerate(graph.nodes):
        for size, end in _allocations(node, last) if roots[node] is node else ():
            alive += size
            ending[end] = ending.get(end, 0) + size
        if (needed := alive + working_memory(node)) > peak:
            peak, at = needed, node.name
        if node.op != "output":
            alive -= ending.pop(place, 0)
    return Footprint(peak, alive, at)


CONVOLUTIONS = aten_names("convolution conv1d conv2d conv3d convolution_backward")
BLOCK = 16
"""oneDNN lays channels out in blocks of so many, the last one padded."""


def working_memory(node: fx.Node) -> int:
    """What packing and, on CPU, convolutions take beside their result; other ops need little, or it is not known here.

    A convolution lays its operands out in blocks, and makes its result so before it is laid out plainly; what oneDNN
    takes beyond that for strided ones is not known.
    """
    if node.target in WORKING_MEMORY:
        return WORKING_MEMORY[node.target] * math.prod(hints(value_of(first_argument(node)).shape))
    if node.target in (through, through_):
        masked = tensor_of(node)
        elements = math.prod(hints(masked.shape))
        is_in_blocks = node.target is through_ and masked.device.type == "cpu"
        return masked.element_size() * (min(elements, MASKED_AT_ONCE) if is_in_blocks else elements)
    if node.op != "call_function" or schema_name(node.target) not in CONVOLUTIONS:
        return 0
    is_backward = schema_name(node.target) == "aten::convolution_backward"
    read, weight = (value_of(node.args[place]) for place in ((0, 2) if is_backward else (0, 1)))  # type: ignore[arg-type]
    if weight.device.type != "cpu":
        return 0
    made, of, *kernel = hints(weight.shape)
    blocks = math.prod(-(-channels // BLOCK) * BLOCK for channels in (made, of)) if is_backward else made * of
    packed: int = blocks * math.prod(kernel) * weight.element_size()
    # The backward op makes the input dense even where it reads its shape alone.
    given = value_of(node.args[1])  # type: ignore[arg-type]
    copied = bytes_of(given) if is_backward and 0 in hints(given.stride()) else 0
    return copied + max(bytes_of(read) + packed, bytes_of(value_of(node)))


def _allocations(node: fx.Node, last: dict[fx.Node, int]) -> list[tuple[int, int]]:
    """(bytes, place of the last reader) of what the call of ``node`` allocates: each part of a tuple ends by itself."""
    value = value_of(node) if node.op == "call_function" and node.target is not operator.getitem else None
    if isinstance(value, torch.Tensor):
        return [(bytes_of(value), last[node])]
    if not isinstance(value, (tuple, list)):
        return []
    ends = [last[node]] * len(value)
    for reader in node.users:
        if reader.target is operator.getitem:
            ends[reader.args[1]] = max(ends[reader.args[1]], last[reader])  # type: ignore[index]
    return [(bytes_of(part), end) for part, end in zip(value, ends, strict=True)]
