"""Triton's interpreter, mended for tests: bfloat16 rounded as GPUs do, and calls within kernels at a third of the time.

Its own casts to bfloat16 cut digits off; and it replaces the functions of Triton's language anew for every function
that a kernel calls, ``tl.sum`` among them.
"""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


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


def replace_once(patch: pytest.MonkeyPatch) -> None:
    """A function that a kernel calls replaces the language's functions when the first of its module is called."""
    replaced: set[str] = set()

    def call(function: Any, *arguments: Any, **named: Any) -> Any:
        if function.fn.__module__ not in replaced:
            interpreter._patch_lang(function.fn)
            replaced.add(function.fn.__module__)
        return function.rewrite()(*arguments, **named)

    patch.setattr(InterpretedFunction, "__call__", call)
