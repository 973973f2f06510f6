"""What a provider of relevance is to the comparison: a name, the models it applies to, and how its call is prepared."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from workloads import Entry, Workload


@dataclass(frozen=True)
class Setting:
    """One model that a provider is prepared for, and what the command line asks of providers."""

    entry: Entry
    work: Workload
    relevance_dtype: torch.dtype = torch.float32
    dynamic_lrp: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """A provider made ready for one model.

    ``call`` is one forward pass and its relevance, ``relevance`` picks that of the input out of the call's result, and
    ``conservation`` says of the input's relevance how much of the output's, as a share of it, ends nowhere. A provider
    of no relevance has neither of the two.
    """

    call: Callable[[], Any]
    relevance: Callable[[Any], Tensor] | None = None
    conservation: Callable[[Tensor], float] | None = None


@dataclass(frozen=True)
class Provider:
    """One way to compute relevance; ``packages`` must be importable, and one that is not ``timed`` is only compared.

    ``own`` are the bars and ours, without which the comparison says nothing: their failure fails it.
    """

    name: str
    applies: Callable[[Entry], bool]
    prepare: Callable[[Setting], Prepared]
    packages: tuple[str, ...] = ()
    timed: bool = True
    own: bool = False
    needs_checkout: bool = False

    def obstacle(self, dynamic_lrp: Path | None) -> str | None:
        """Why it cannot run here, in words; None where it can."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} not installed; make bench installs it"
        if self.needs_checkout and dynamic_lrp is None:
            return "no checkout of DynamicLRP was given; pass --dynamic-lrp FOLDER"
        return None


def everywhere(entry: Entry) -> bool:
    """Applies to every model."""
    return True


def on_convolutional(entry: Entry) -> bool:
    """Applies to convolutional networks."""
    return entry.kind == "convolutional"


def explained(work: Workload) -> tuple[Any, ...]:
    """The index of the explained logits, one of each sample."""
    chosen = work.target if isinstance(work.target, tuple) else (work.target,)
    return (slice(None), *chosen)


def seed(work: Workload, output: Tensor) -> Tensor:
    """The relevance that starts at the output: the explained logits, and zero elsewhere."""
    made = torch.zeros_like(output)
    made[explained(work)] = output.detach()[explained(work)]
    return made


def of_input_alone(work: Workload, call: Callable[[], Tensor]) -> Prepared:
    """A call that gives the input's relevance and says nothing of what was absorbed: |sum R - f| / |f|."""

    def conservation(relevance: Tensor) -> float:
        with torch.no_grad():
            given = work.model(work.x)[explained(work)].double().sum()
        return float((relevance.double().sum() - given).abs() / given.abs())

    return Prepared(call, lambda result: result, conservation)
