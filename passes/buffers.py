"""Which values the two halves of a program exchange, read off its table of buffers."""

from __future__ import annotations

from lrp_compiler.passes.program import Program


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
    """What a forward pass returns for relevance: values read of this run, then those of the reference run alone."""
    inputs = {spec.node for spec in program.inputs}
    return list(dict.fromkeys([*saved_values(program), *(n for n in reference_values(program) if n not in inputs)]))
