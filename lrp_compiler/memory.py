"""Measured memory, to hold against what a plan predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def allocated_peak(call: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """The most bytes that tensors made during ``call()`` take at once, working memory inside ops included.

    What was allocated before does not count. On CPU torch's profiler is asked, which must not be running; CUDA keeps
    statistics, and other work on the device counts as well.
    """
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = call()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: int(event.start_ns())):
        alive += int(event.nbytes())
        peak = max(peak, alive)
    del result
    return peak
