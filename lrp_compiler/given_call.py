"""A call as it is given: its arguments, and the model as it is then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrp_compiler.live_model import Live, LiveModel
from lrp_compiler.passes.cast_explicitly import current_autocast, is_trained
from lrp_compiler.passes.program import TRACING


@dataclass(frozen=True, eq=False)
class GivenCall:
    """The call ``model(*args, **kwargs)``: leaves and tree of its arguments, and what the model held when it was made.

    Raises HookError for hooks that no compiled call would run.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    tree: pytree.TreeSpec
    live: Live

    @classmethod
    def of(cls, known: LiveModel, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GivenCall:
        """The call as of now; ``known`` is what was read of the model before."""
        leaves, tree = pytree.tree_flatten((args, kwargs))
        with TRACING:
            return cls(model, args, kwargs, leaves, tree, known.read(model))

    def key(self) -> Any:
        """Everything but sizes that decides what it compiles to: arguments, the model's state, autocast."""
        devices = {leaf.device.type for leaf in self.leaves if isinstance(leaf, Tensor)}
        autocast = current_autocast(devices)
        trained = tuple(map(is_trained, self.leaves)) if autocast.dtypes else ()
        return tuple(map(_leaf_key, self.leaves)), self.tree, self.live.state, autocast, trained


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return ("tensor", leaf.dim(), leaf.dtype, leaf.device)
    return (type(leaf), leaf)
