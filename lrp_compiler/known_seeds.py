"""Seeds of classes and tokens on their rows, kept from call to call: loops ask for the same ones again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrp_compiler.entries import SparseSeed
from lrp_compiler.seeds import Target, sparse_seeds

KEPT = 64
"""Of more seeds than these all are made anew."""


class KnownSeeds:
    """What ``sparse_seeds`` gave for targets that are numbers; safe to share between threads."""

    def __init__(self) -> None:
        self._found: dict[Any, list[SparseSeed] | None] = {}

    def of(self, output: Tensor, targets: Sequence[Target], share: int) -> list[SparseSeed] | None:
        """The seeds of ``targets`` on rows of ``output``, as ``sparse_seeds`` gives them; values are the caller's."""
        if not all(map(_is_number, targets)):
            return sparse_seeds(output, targets, share)
        mode = torch.is_inference_mode_enabled()
        key = (tuple(targets), output.shape, output.dtype, output.device, share, mode)
        found = self._found
        if key not in found:
            if len(found) >= KEPT:
                found = self._found = {}
            found[key] = sparse_seeds(output, targets, share)
        made = found[key]
        return None if made is None else [SparseSeed(seed.values.clone(), seed.rows) for seed in made]


def _is_number(target: Target) -> bool:
    return type(target) is int or (type(target) is tuple and all(type(index) is int for index in target))
