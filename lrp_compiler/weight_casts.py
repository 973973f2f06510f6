"""Weights in the dtype of relevance, kept from call to call as long as they do not change."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class _Kept:
    """A cast, and what its parameter was when it was made."""

    cast: Tensor
    version: int
    address: int


class WeightCasts:
    """Parameters in other dtypes: made when first read, again when the parameter has changed, gone when that is.

    A parameter counts as changed when torch's version counter has moved or its memory is another one, as for tapes;
    what is written through ``.data`` or in inference mode is seen by neither. Safe between threads: at worst two make
    the same cast.
    """

    def __init__(self) -> None:
        self._kept: MutableMapping[Tensor, dict[torch.dtype, _Kept]] = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        """How many parameters have casts."""
        return len(self._kept)

    def of(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """``parameter`` in ``dtype``, without history; an inference tensor, which has no version, is cast each time."""
        # A cast made in inference mode could not be read where gradients are recorded.
        with torch.inference_mode(mode=False), torch.no_grad():
            if parameter.is_inference():
                return parameter.to(dtype)
            known = self._kept.setdefault(parameter, {})
            found = known.get(dtype)
            version, address = parameter._version, parameter.data_ptr()
            if found is None or (found.version, found.address) != (version, address):
                found = known[dtype] = _Kept(parameter.detach().to(dtype), version, address)
            return found.cast
