"""plan_memory: when every deferred buffer is written and last read, which share memory, and what the peak will be."""

from __future__ import annotations

import bisect
import heapq
import operator
from dataclasses import replace
from types import FunctionType

from torch import fx

from lrp_compiler.passes.buffers import Buffer, MemoryPlan
from lrp_compiler.passes.lifetimes import footprint, last_reads, roots_of
from lrp_compiler.passes.optable import schema_name
from lrp_compiler.passes.program import Program, facts, first_argument, module_path


def plan_memory(program: Program) -> Program:
    """Complete the table of buffers by producers, lifetimes and shared memory, and predict the peak.

    Time is counted in ops: those of the forward graph, then those of the relevance graph. Values of the forward pass
    are taken to be given up behind their last reader, and outputs before the seed is made, as ``attribute`` does for a
    class; a tape keeps them.
    """
    relevance = program.relevance_graph
    if relevance is None:
        return program
    forward = footprint(program.graph)
    kept = {*(cast.name for cast in program.casts), *(one.name for one in program.prepared_relevance)}
    inputs = {spec.node for spec in program.inputs} | kept
    held = frozenset(node for node in relevance.nodes if node.op == "placeholder" and node.name not in inputs)
    peaks = [footprint(relevance, held).peak]
    if any(buffer.kind == "reference" for buffer in program.buffers):
        # The second run, on the baselines, finds what the first one kept.
        peaks.append(forward.left + forward.peak)
    memory = MemoryPlan(forward.peak, max(peaks), forward.left)
    return program.having(buffers=_with_slots(_with_lifetimes(program, relevance)), memory=memory)


def _with_lifetimes(program: Program, relevance: fx.Graph) -> list[Buffer]:
    """The buffers with producer, first write and last read."""
    steps = len(program.graph.nodes)
    forward = {_held_by(node): (place, node) for place, node in enumerate(program.graph.nodes)}
    later = {node.name: (place + steps, node) for place, node in enumerate(relevance.nodes)}
    roots = roots_of(relevance)
    last = last_reads(relevance, roots)
    found = []
    for buffer in program.buffers:
        place, node = later[buffer.holder]
        end = steps + last[roots[node]]
        if node.op == "placeholder" and buffer.kind != "prepared":
            place, node = forward[buffer.name]
        found.append(replace(buffer, producer=_producer(node), first_write=place, last_read=end))
    return found


def _held_by(node: fx.Node) -> str:
    """The name of the value that a node holds: a prepared input's is that of the op it stands for."""
    return facts(node).origin if facts(node).part == "prepared" else node.name


def _producer(node: fx.Node) -> str:
    """The op that makes a value, and its module."""
    while node.target is operator.getitem:
        node = first_argument(node)
    if node.op == "placeholder":
        return "an input"
    name = getattr(node.target, "__name__", "") if isinstance(node.target, FunctionType) else schema_name(node.target)
    return f"{name} in {path}" if (path := module_path(node)) else name


def _with_slots(buffers: list[Buffer]) -> tuple[Buffer, ...]:
    """Number the memories: a buffer takes the smallest one it fits in whose last reader has run when it is written."""
    sizes: list[int] = []
    busy: list[tuple[int, int]] = []
    free: list[tuple[int, int]] = []
    numbers: dict[str, int] = {}
    for buffer in sorted(buffers, key=lambda one: (one.first_write, one.name)):
        if buffer.bytes == 0:
            continue
        while busy and busy[0][0] < buffer.first_write:
            number = heapq.heappop(busy)[1]
            bisect.insort(free, (sizes[number], number))
        if free:
            # Where none is large enough, the largest one that is free grows.
            place = min(bisect.bisect_left(free, (buffer.bytes, 0)), len(free) - 1)
            number = free.pop(place)[1]
            sizes[number] = max(buffer.bytes, sizes[number])
        else:
            number = len(sizes)
            sizes.append(buffer.bytes)
        heapq.heappush(busy, (buffer.last_read, number))
        numbers[buffer.holder] = number
    return tuple(replace(buffer, slot=numbers.get(buffer.holder)) for buffer in buffers)
