"""Which dtype relevance is computed in, where that is not the model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lrp_compiler.passes.errors import OptionValueError

GivenPrecision = torch.dtype | Literal["high"] | None

ADJUSTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of values whose relevance may have another one; complex numbers and 8-bit floats keep theirs."""
CHOICES = (torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Precision:
    """The dtype of relevance, or with ``is_least`` the narrowest one that it may have."""

    dtype: torch.dtype
    is_least: bool = False

    def of(self, dtype: torch.dtype) -> torch.dtype:
        """What relevance of values of ``dtype`` is computed in."""
        if dtype not in ADJUSTED:
            return dtype
        return torch.promote_types(dtype, self.dtype) if self.is_least else self.dtype

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} or wider" if self.is_least else name


def precision_of(given: GivenPrecision) -> Precision | None:
    """What the option ``relevance_dtype`` asks for: None for the model's own; raises OptionValueError."""
    if given is None:
        return None
    if given == "high":
        return Precision(torch.float32, is_least=True)
    if not isinstance(given, torch.dtype) or given not in CHOICES:
        known = ", ".join(map(str, CHOICES))
        cause = f"it is None, 'high' or one of {known}"
        if given is torch.float16:
            cause += "; relevance leaves the range of float16, whose largest number is 65504"
        raise OptionValueError(name="relevance_dtype", value=given, cause=cause)
    return Precision(given)
