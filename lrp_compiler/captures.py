"""Captured calls: a model's graphs, traced once per kind of call and shared by every composite that explains it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrp_compiler.passes.codegen import Executable
from lrp_compiler.passes.eager_failure import unsupported_argument
from lrp_compiler.passes.errors import DeviceMismatchError
from lrp_compiler.passes.pipeline import Stage, capture_call, compile_forward, depends_on_grad_mode
from lrp_compiler.passes.program import Program


@dataclass(frozen=True, eq=False)
class CapturedCall:
    """One kind of call: the stages of its capture and the code of its forward pass."""

    stages: tuple[Stage, ...]
    forward: Executable

    @property
    def program(self) -> Program:
        """The captured program."""
        return self.stages[-1].program


class Captures:
    """The captured calls of one model; safe to share between threads and between composites."""

    def __init__(self) -> None:
        self._calls: dict[Any, CapturedCall] = {}
        self.lock = threading.RLock()

    def call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], kept: frozenset[str]
    ) -> CapturedCall:
        """This kind of call, captured at its first use; ops named in ``kept`` stay whole."""
        key = (call_key(model, args, kwargs), kept)
        grad_enabled = torch.is_grad_enabled()
        try:
            found = self._calls.get((key, grad_enabled))
        except TypeError:
            # Only what can be hashed can be told apart from other calls.
            raise (unsupported_argument(args, kwargs) or TypeError(f"{type(model).__name__}: no key")) from None
        if found is not None:
            return found
        with self.lock:
            if (key, grad_enabled) not in self._calls:
                self._capture(key, grad_enabled, model, args, kwargs, kept)
            return self._calls[key, grad_enabled]

    def _capture(
        self,
        key: Any,
        grad_enabled: bool,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kept: frozenset[str],
    ) -> None:
        """Capture a call; the result serves both grad modes unless the model's attention tells them apart."""
        _check_devices(model, args, kwargs)
        stages = capture_call(model, args, kwargs, kept, grad_enabled)
        captured = CapturedCall(stages, compile_forward(stages))
        modes = (grad_enabled,) if depends_on_grad_mode(stages) else (False, True)
        self._calls.update({(key, mode): captured for mode in modes})


def call_key(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Everything that decides what a call compiles to: arguments, parameters, training flags and autocast."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    owners: dict[int, int] = {}
    weights = []
    for name, value in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        owner = owners.setdefault(id(value), len(owners))
        weights.append((name, owner, value.shape, value.dtype, value.device, value.requires_grad))
    training = tuple(module.training for module in model.modules())
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
    autocast = tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in sorted(devices)
        if torch.amp.is_autocast_available(kind)
    )
    return tuple(map(_leaf_key, leaves)), tree, tuple(weights), training, autocast


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return ("tensor", leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    return (type(leaf), leaf)


def _check_devices(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse inputs that lie on another device than the parameters."""
    parameter = next(iter([*model.parameters(), *model.buffers()]), None)
    if parameter is None:
        return
    for path, leaf in pytree.tree_flatten_with_path((args, kwargs))[0]:
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.device.type != parameter.device.type:
            name = pytree.keystr(path[1:]).strip(".[]'\"")
            raise DeviceMismatchError(name=name, input_device=leaf.device, model_device=parameter.device)
