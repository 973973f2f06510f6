"""Why a call that cannot be traced fails: by the model's own error, or by what it is given or gives back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from lrp_compiler.passes.errors import UnsupportedArgumentError, UnsupportedOutputError

SUPPORTED = (
    *(Tensor, int, float, complex, str, bytes, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator),
)
"""What arguments and results may hold, beside containers that torch's pytree knows."""


def eager_failure(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    """What is wrong with a call apart from tracing: the exception that describes it, or None.

    Runs the model once more on copies of its buffers and inputs, with the random numbers left as they were; not
    where tensors have no values.
    """
    refused = unsupported_argument(args, kwargs)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if refused is not None or not all(map(_has_values, [*tensors, *model.parameters(), *model.buffers()])):
        return refused
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    try:
        with torch.no_grad(), torch.random.fork_rng():
            output = functional_call(model, buffers, args, kwargs)
    except Exception as error:
        return error
    unknown = [leaf for leaf in pytree.tree_leaves(output) if not isinstance(leaf, SUPPORTED)]
    kind = type(unknown[0]) if unknown else None
    return UnsupportedOutputError(model=type(model).__name__, kind=_named(kind)) if kind is not None else None


def unsupported_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> UnsupportedArgumentError | None:
    """The refusal of the first argument that is neither a tensor nor a plain value."""
    for path, leaf in pytree.tree_flatten_with_path((args, kwargs))[0]:
        if not isinstance(leaf, SUPPORTED):
            return UnsupportedArgumentError(name=pytree.keystr(path[1:]).strip(".[]'\""), kind=_named(type(leaf)))
    return None


def _has_values(tensor: Tensor) -> bool:
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def _named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
