"""Deferred buffers: where each promise is kept, and which values the two halves of a program exchange for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lrp_compiler.passes.program import Program

BufferKind = Literal["free", "view", "compressed", "recomputed", "saved", "reference", "prepared"]


@dataclass(frozen=True)
class Buffer:
    """Where one promise is kept: ``free`` (a graph input or an output), ``view`` of something kept, ``compressed``
    (less than the value, made of it in the forward pass), ``recomputed`` in the relevance pass, ``saved``, or
    ``prepared`` of weights and kept from call to call.

    ``bytes`` and ``shape`` are those of the captured call where sizes differ from call to call.
    A ``reference`` buffer holds the value that the node has in the reference run. ``holder`` names the node of the
    relevance graph. ``plan_memory`` adds the rest: ``producer``, lifetime in ops (of the forward pass, then of
    relevance), and ``slot``, the same number for buffers that take the same memory one after the other.
    """

    name: str
    kind: BufferKind
    bytes: int
    dtype: str
    shape: tuple[int, ...]
    readers: tuple[str, ...]
    holder: str = ""
    producer: str = ""
    first_write: int = 0
    last_read: int = 0
    slot: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes above parameters and inputs, in the captured call: what running forward and relevance will take.

    ``forward_peak`` and ``relevance_peak`` are the most that either half holds at once, the latter with what the
    forward pass left; ``left`` is what a tape holds on to. Working memory inside an op is not counted.
    """

    forward_peak: int
    relevance_peak: int
    left: int

    @property
    def peak(self) -> int:
        """The most that is alive at any time."""
        return max(self.forward_peak, self.relevance_peak)


def saved_values(program: Program) -> list[str]:
    """The nodes of the forward graph whose values are handed to relevance beside the graph's inputs."""
    inputs = {spec.node for spec in program.inputs}
    handed = (buffer.name for buffer in program.buffers if buffer.kind in ("free", "saved", "compressed"))
    return [name for name in handed if name not in inputs]


def free_values(program: Program) -> list[str]:
    """The graph inputs that the relevance pass reads."""
    inputs = {spec.node for spec in program.inputs}
    return [buffer.name for buffer in program.buffers if buffer.kind == "free" and buffer.name in inputs]


def reference_values(program: Program) -> list[str]:
    """The forward nodes whose values in the reference run the relevance pass reads."""
    return [buffer.name for buffer in program.buffers if buffer.kind == "reference"]


def recorded_values(program: Program) -> list[str]:
    """What a forward pass returns for relevance: values read of this run, of the reference run alone, and any kept."""
    inputs = {spec.node for spec in program.inputs}
    others = (name for name in (*reference_values(program), *program.kept) if name not in inputs)
    return list(dict.fromkeys([*saved_values(program), *others]))
