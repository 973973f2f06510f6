"""Triton's interpreter rounds bfloat16 as GPUs do: to the nearest, where its own casts cut digits off."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def round_to_nearest(patch: pytest.MonkeyPatch) -> None:
    """Casts from float32 to bfloat16 in kernels take torch's rounding; all others stay."""
    cast = InterpreterBuilder.cast_impl

    def cast_rounding(builder: InterpreterBuilder, value: Any, dtype: Any) -> Any:
        if value.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(builder, value, dtype)
        # The interpreter holds bfloat16 as uint16.
        numbers = torch.from_numpy(numpy.array(value.data)).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(numbers, dtype.scalar)

    patch.setattr(InterpreterBuilder, "cast_impl", cast_rounding)
