"""What is asked of a relevance graph: which results, for which seeds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

Reading = Literal["relevance", "token_relevance", "coefficient", "activation", "attention_map", "parameter"]
"""What can be read at a node: its relevance, summed over the last dimension for embeddings of tokens, coefficient or
value; of an attention op, relevance at its map; of a parameter, the relevance of what it contributes, summed over the
batch and over all its uses."""


@dataclass(frozen=True)
class Result:
    """One value a relevance graph returns: what kind, of which site or op, and its place in the output."""

    kind: Reading | Literal["sink", "given", "taken"]
    site: str
    detail: str = ""


@dataclass(frozen=True)
class Pick:
    """``count`` rows of dimension ``dim`` of output leaf ``output``; nothing of the seed lies outside them."""

    output: int
    dim: int
    count: int


@dataclass(frozen=True)
class Request:
    """What one relevance graph has to produce: for seeds at ``outputs``, results at ``sites``.

    ``outputs`` are indices of output leaves; ``sites`` are pairs (node name, result kind). With ``sinks`` every
    sink becomes a result, with ``ledger`` also what each op is given and passes on. Edges at the nodes named in
    ``through`` are multiplied by masks, which follow the seeds among the relevance graph's arguments. ``starts`` names
    further nodes that get seeds, after the outputs'; nothing passes the nodes named in ``blocked``. The edges that
    arrive at the nodes named in ``edges`` are results as they are, one for each kind.

    Seeds at an output with ``picks`` have these rows alone, whose numbers follow the inputs of the graph. Where it is
    not so that the program ``keeps_outputs``, its forward pass returns none, and the rows are known before it runs.
    """

    outputs: tuple[int, ...]
    sites: tuple[tuple[str, Reading], ...]
    sinks: bool = False
    ledger: bool = False
    through: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()
    edges: tuple[str, ...] = ()
    picks: tuple[Pick, ...] = ()
    keeps_outputs: bool = True
    kept: tuple[str, ...] = ()

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:
        # Calls look code up by it several times, and its names may be hundreds.
        return self._hash
