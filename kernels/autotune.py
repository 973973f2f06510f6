"""Which of several callables that give the same result is the fastest on a device: measured once, then remembered."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Calls = Mapping[str, Callable[[], Any]]
Timer = Callable[[Calls, int, torch.device], dict[str, list[float]]]

CYCLES_PER_SECOND = 2e9
"""About the clock of a GPU under load; a slower one only waits longer."""

LONGEST_HEAD_START = 5e-3
"""Seconds; a call that takes the host longer than this waits for the device by itself."""

CACHE = 64 * 2**20
"""Bytes of cache of a device that does not say."""


def device_times(calls: Calls, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each call on a CUDA ``device``, by events; the calls take turns, so that drift hits all alike.

    The cache is filled with other data before each call, and the device kept busy for as long as the host needs to
    issue it, so that neither warm data nor gaps between launches count.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.cuda.device(device):
        # Read, not written: data to be written back would still be on its way during the call.
        other = torch.zeros(2 * cache_bytes(device) // 4, device=device)
        ahead = {name: _host_seconds(call) for name, call in calls.items()}
        for _ in range(repeats):
            for name, call in calls.items():
                other.sum()
                taken[name].append(_timed(call, ahead[name]))
    return taken


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last cache before the memory of a CUDA ``device``."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or CACHE


def _host_seconds(call: Callable[[], Any]) -> float:
    """How long the host takes to issue a call that is compiled and warm."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return min(taken, LONGEST_HEAD_START)


def _timed(call: Callable[[], Any], ahead: float) -> float:
    """Milliseconds between two events around a call, which wait until the host has issued it."""
    # Torch leaves these two without types.
    cuda: Any = torch.cuda
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    cuda._sleep(int(1.5 * ahead * CYCLES_PER_SECOND))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


class UnfitError(Exception):
    """Raised by a candidate that cannot do the call: it is out of the choice, and nothing has failed."""


@dataclass
class Autotuner:
    """Remembers, per key, the fastest of some candidates; whoever owns it decides how long. Safe to share by threads.

    ``timer`` gives milliseconds per candidate, ``repeats`` of each.
    """

    repeats: int = 9
    timer: Timer = device_times
    _chosen: dict[Hashable, str] = field(default_factory=dict, init=False, repr=False)
    _measuring: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def fastest(self, key: Hashable, candidates: Calls, device: torch.device) -> str:
        """The name of the candidate with the least median time; the first where ``measures`` says not to measure.

        A candidate that raises UnfitError, or asks for more of the chip than it has, is left out; where all do, the
        error of the last is raised.
        """
        names = tuple(candidates)
        if len(names) == 1 or not measures(device):
            return names[0]
        known = (key, names, device)
        if known not in self._chosen:
            with self._measuring:
                # Another thread may have measured while this one waited.
                if known not in self._chosen:
                    self._chosen[known] = self._measured(candidates, device)
        return self._chosen[known]

    def _measured(self, candidates: Calls, device: torch.device) -> str:
        fit = _fitting(candidates)
        if len(fit) == 1:
            return next(iter(fit))
        taken = self.timer(fit, self.repeats, device)
        return min(taken, key=lambda name: statistics.median(taken[name]))


def measures(device: torch.device) -> bool:
    """Whether candidates are timed on ``device``.

    Not off a GPU, not with LRP_AUTOTUNE=0 or torch's deterministic algorithms (another choice may round differently),
    and not while a CUDA graph is captured, which nothing may wait for.
    """
    if device.type != "cuda" or os.environ.get("LRP_AUTOTUNE") == "0" or torch.are_deterministic_algorithms_enabled():
        return False
    return not torch.cuda.is_current_stream_capturing()


def call_key(arguments: tuple[Any, ...]) -> Hashable:
    """What calls have in common that the same candidate is the fastest for: shapes, dtypes, kinds of strides, numbers.

    A stride counts as 0 (broadcast), 1 (dense) or larger.
    """
    return tuple(
        (tuple(leaf.shape), leaf.dtype, tuple(min(stride, 2) for stride in leaf.stride()))
        if isinstance(leaf, Tensor)
        else leaf
        for leaf in pytree.tree_leaves(arguments)
    )


def _fitting(candidates: Calls) -> dict[str, Callable[[], Any]]:
    """The candidates that run here, each compiled by this first run."""
    fit: dict[str, Callable[[], Any]] = {}
    last: Exception | None = None
    for name, call in candidates.items():
        try:
            call()
        except Exception as error:
            # By name, since nothing but kernels imports triton: shared memory or registers of this chip do not suffice.
            if not isinstance(error, UnfitError) and type(error).__name__ != "OutOfResources":
                raise
            last = error
        else:
            fit[name] = call
    if not fit and last is not None:
        raise last
    return fit
