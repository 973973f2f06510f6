"""Emitting relevance ops: whatever forward value they read, of this run or of the reference run, is promised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lrp_compiler.passes.program import FACTS, Facts, facts, value_of
from lrp_compiler.passes.trace import Emitter


def promise(value: torch.Tensor) -> torch.Tensor:
    """A relevance node's demand for a forward value; ``lower_promises`` decides where the value is kept."""
    return value


def reference_promise(value: torch.Tensor) -> torch.Tensor:
    """A demand for what a forward value is in the reference run, the same forward pass on baseline inputs."""
    return value


PROMISES: dict[Any, str] = {promise: "promise", reference_promise: "reference_promise"}
"""The two kinds of demand, and how they print."""


@dataclass
class RelevanceEmitter(Emitter):
    """Emits relevance ops; a forward node that emitted code reads becomes a promise."""

    promises: dict[tuple[Callable[..., torch.Tensor], fx.Node], fx.Node] = field(default_factory=dict)

    def resolve(self, node: fx.Node) -> fx.Node:
        return node if facts(node).part != "forward" else self._promised(promise, node)

    def reference(self, node: fx.Node) -> fx.Node:
        """The promise of a forward node's value in the reference run, or ``node`` itself where it cannot differ."""
        return self._promised(reference_promise, node) if facts(node).varies else node

    def _promised(self, kind: Callable[..., torch.Tensor], node: fx.Node) -> fx.Node:
        if (kind, node) not in self.promises:
            with self.graph.inserting_before(self.before):
                made = self.graph.call_function(kind, (node,))
            made.meta = {**self.provenance, "val": value_of(node), FACTS: Facts(part="promise", origin=node.name)}
            self.promises[kind, node] = made
        return self.promises[kind, node]
