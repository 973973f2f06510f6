"""What is made of weights (casts, rules' modified weights, packed ones), kept as long as these do not change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from lrp_compiler.passes.preparation import Preparation

LAYOUTS = 2
"""For so many numbers of rows a weight is kept packed; each takes as much memory as the weight."""

State = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Kept:
    """A value, and what the weights that it was made of were then; the first of them is the key it is found by."""

    value: Tensor
    state: State
    others: tuple[TensorWeakRef, ...]

    def holds_for(self, weights: tuple[Tensor, ...], state: State) -> bool:
        same = all(kept() is weight for kept, weight in zip(self.others, weights[1:], strict=True))
        return same and self.state == state


class PreparedWeights:
    """What is made of weights: when first read, again when one of them has changed, gone when the first of them is.

    A weight counts as changed when torch's version counter has moved or its memory is another one, as for tapes; what
    is written through ``.data`` or in inference mode is seen by neither. Safe between threads: at worst two make the
    same.
    """

    def __init__(self) -> None:
        self._kept: MutableMapping[Tensor, dict[Hashable, dict[int, _Kept]]] = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        """How many weights something is kept for."""
        return len(self._kept)

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """``weight`` in ``dtype``, without history."""
        return self._of((weight,), dtype, 0, lambda of: of.to(dtype))

    def prepared(self, preparation: Preparation, weights: tuple[Tensor, ...]) -> Tensor:
        """What ``preparation`` makes of these weights, without history."""
        return self._of(weights, preparation.key, preparation.packed_for, preparation.make)

    def _of(self, weights: tuple[Tensor, ...], key: Hashable, rows: int, make: Callable[..., Tensor]) -> Tensor:
        # What is made in inference mode could not be read where gradients are recorded.
        with torch.inference_mode(mode=False), torch.no_grad():
            if any(weight.is_inference() for weight in weights):
                # These have no version.
                return make(*weights)
            known = self._kept.setdefault(weights[0], {}).setdefault(key, {})
            found = known.get(rows)
            state = tuple((weight._version, weight.data_ptr()) for weight in weights)
            if found is None or not found.holds_for(weights, state):
                made = make(*(weight.detach() for weight in weights))
                found = known[rows] = _Kept(made, state, tuple(map(TensorWeakRef, weights[1:])))
                for oldest in list(known)[:-LAYOUTS]:
                    known.pop(oldest, None)
            return found.value
