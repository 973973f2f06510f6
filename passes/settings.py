"""What the stages of EMIT are told beside the request: the same for all requests of a module."""

from __future__ import annotations

from dataclasses import dataclass

from lrp_compiler.passes.backend import Backend
from lrp_compiler.passes.budget import MemoryGoal
from lrp_compiler.passes.precision import Precision


@dataclass(frozen=True)
class Settings:
    """The memory to be reached, what runs the code, what relevance is computed in (None: the model's dtype).

    One that ``prepares_weights`` keeps what these alone decide from call to call.
    """

    goal: MemoryGoal | None = None
    backend: Backend = "auto"
    cuda_graphs: bool = False
    precision: Precision | None = None
    prepares_weights: bool = False
