"""Relevance of tokens and of the positions they stand at (PA-LRP)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrp_compiler.passes.rules.position import POSITION
from lrp_compiler.seeds import Target
from lrp_compiler.tape import Tape


@dataclass(frozen=True)
class PositionalRelevance:
    """Relevance (batch, tokens) of the tokens themselves, and per op that adds or rotates by positions of those."""

    tokens: Tensor
    positions: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """Tokens and positions together: PA-LRP's attribution."""
        return self.tokens + torch.stack([*self.positions.values(), torch.zeros_like(self.tokens)]).sum(0)


def positional_relevance(tape: Tape, target: Target = None, *, output: str | None = None) -> PositionalRelevance:
    """Token and positional relevance from a tape of a model compiled with ``pa_lrp``; its input are ids or embeddings.

    Raises what ``Tape.relevance`` raises. A model without positional embeddings, or a composite that keeps no
    positional sinks, gives no positions.
    """
    tokens = tape.relevance(target, output=output)
    if tokens.dim() > 2:
        tokens = tokens.sum(-1, dtype=torch.promote_types(tokens.dtype, torch.float32))
    sinks = tape.sinks(target, output=output)
    return PositionalRelevance(tokens, {op: kinds[POSITION] for op, kinds in sinks.items() if POSITION in kinds})
