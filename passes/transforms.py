"""Transforms of torch.func (vmap, grad, jvp): whether one is at work here, and compiling as if none were."""

from __future__ import annotations

import contextlib

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack


def is_transforming() -> bool:
    """Whether this code runs inside of a function that torch.func transforms."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def without_transforms() -> contextlib.AbstractContextManager[object]:
    """What is compiled outlives the transform, and holds none of its tensors."""
    return temporarily_clear_interpreter_stack() if is_transforming() else contextlib.nullcontext()
