"""What tests of training share: a loss for any model, steps of Adam, and the state that they leave."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Forward = Callable[..., Any]


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def identical(first: Any, second: Any) -> bool:
    """Whether two trees hold tensors of the same dtypes and the same bits."""
    pairs = zip(tensors(first), tensors(second), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def loss_of(output: Any) -> Tensor:
    """The sum of squares of every float output that gradients flow from, in float32 or wider."""
    values = [value for value in tensors(output) if value.requires_grad]
    wide = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in values]
    return torch.stack([value.square().sum() for value in wide]).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients by parameter name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def cleared(model: nn.Module) -> nn.Module:
    """The model without gradients."""
    model.zero_grad()
    return model


def adam_steps(
    model: nn.Module,
    forward: Forward,
    steps: int = 3,
    *,
    before: Callable[[int], Any] = lambda step: None,
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """Adam steps from a fixed seed on ``loss_of(forward())``; returns everything they leave, random numbers too."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    torch.manual_seed(5)
    for step in range(steps):
        before(step)
        optimizer.zero_grad()
        with contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast):
            output = forward()
        loss_of(output).backward()
        optimizer.step()
    moments = {str(index): kept for index, kept in enumerate(optimizer.state.values())}
    return {"model": model.state_dict(), "adam": moments, "random": torch.get_rng_state()}


def differing(first: Any, second: Any) -> list[str]:
    """The paths at which two states differ, in a bit of a tensor or else."""
    left, right = (dict(pytree.tree_flatten_with_path(state)[0]) for state in (first, second))
    assert left.keys() == right.keys()
    return [pytree.keystr(path) for path, value in left.items() if not _same(value, right[path])]


def _same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else bool(first == second)


THREADS = 8
"""How many call one compiled module at once."""


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """The results of all works, started at once, each in a thread of its own."""
    start = threading.Barrier(len(works))

    def begin(work: Callable[[], Any]) -> Any:
        start.wait(timeout=60)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(begin, works))
