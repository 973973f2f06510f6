"""Hooks on the modules of a model: which can be traced with it, and the refusal of those that cannot."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from torch import nn
from torch.nn.modules import module as globals_of_torch

from lrp_compiler.passes.errors import HookError

TRACEABLE = ("torch.nn.utils.", "torch.utils.", "transformers.", "lrp_compiler.")
"""Packages whose hooks only compute with tensors, and so become ops of the graph: weight norms, pruning, outputs."""

KINDS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}

GLOBAL = attrgetter(*(f"_global{attribute}" for attribute in KINDS))
"""Of torch's module of modules: the hooks on every module, by kind."""


def refuse_hooks(model: nn.Module, hooked: Iterable[nn.Module]) -> None:
    """Raise HookError for a hook on one of the modules ``hooked`` that a graph would lose."""
    modules = list(hooked)
    for attribute, kind in KINDS.items():
        for module in modules:
            # A copy, since another thread may add a hook of ours for the time being.
            for hook in list(vars(module)[attribute].values()):
                if not _is_traceable(hook):
                    path = next(name for name, known in model.named_modules() if known is module)
                    raise HookError(kind=kind, hook=_name(hook), module=path or "(the model itself)")


def refuse_global_hooks() -> None:
    """Raise HookError for a hook on every module that a graph would lose."""
    if not any(GLOBAL(globals_of_torch)):
        return
    for attribute, kind in KINDS.items():
        for hook in getattr(globals_of_torch, f"_global{attribute}").values():
            if not _is_traceable(hook):
                raise HookError(kind=f"global {kind}", hook=_name(hook), module="(every module)")


def _is_traceable(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(TRACEABLE)


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))
