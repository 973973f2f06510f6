"""Calls without values: models and inputs on the meta device or of fake tensors, which have shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lrp_compiler.passes.errors import NoValuesError
from lrp_compiler.passes.program import Program


def has_values(value: Any) -> bool:
    """Whether a value is more than a shape."""
    return not isinstance(value, Tensor) or not (isinstance(value, FakeTensor) or value.is_meta)


def without_values(program: Program, inputs: Iterable[Any]) -> str | None:
    """The first of a graph's inputs, parameters or buffers that has no values, if there is one."""
    for spec, value in zip(program.inputs, inputs, strict=True):
        if not has_values(value):
            return spec.target
    return None


def require_values(program: Program, inputs: Iterable[Any]) -> None:
    """Raise NoValuesError when there is nothing to compute relevance from."""
    name = without_values(program, inputs)
    if name is not None:
        raise NoValuesError(name=name)
