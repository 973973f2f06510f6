"""What a device can do at best, measured: copies through its memory and products of matrices; and how long calls take.

python bench/ceilings.py
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from harness import DTYPES, command, in_turns, machine, show

from lrp_compiler.kernels.autotune import device_times
from lrp_compiler.kernels.spec import Work

COPIED = {"cuda": 2**31, "cpu": 2**28}
"""Bytes copied per device: many times what its caches hold."""

SIDE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the matrices multiplied per device."""


@dataclass(frozen=True)
class Ceilings:
    """Bytes read plus written per second by a copy, and operations per second by a product, per dtype."""

    copy: float
    product: Mapping[torch.dtype, float]

    def floor(self, work: Work, dtype: torch.dtype) -> float:
        """The seconds that no implementation of ``work`` goes below, but for data that the cache holds."""
        return max(work.bytes / self.copy, work.flops / self.product[dtype])


def gpu() -> torch.device:
    """The GPU that is measured; the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def is_gpu(device: torch.device) -> bool:
    """Whether kernels can be timed on ``device``."""
    return device.type == "cuda"


def times(calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each call, which take turns: device time on a GPU, wall time on the CPU."""
    return device_times(calls, repeats, device) if is_gpu(device) else in_turns(calls, repeats)


def measure(device: torch.device, dtypes: tuple[torch.dtype, ...], repeats: int = 10) -> Ceilings:
    """Both ceilings of ``device``, on random data: zeros multiply faster."""
    source = torch.empty(COPIED[device.type] // 4, device=device).uniform_()
    target = torch.empty_like(source)
    (copied,) = times({"copy": partial(target.copy_, source)}, repeats, device).values()
    moved = 2 * source.numel() * source.element_size()
    del source, target
    rates = {}
    for dtype in dtypes:
        one, other = (torch.randn(2 * [SIDE[device.type]], device=device).to(dtype) for _ in range(2))
        (taken,) = times({"product": partial(torch.mm, one, other)}, repeats, device).values()
        rates[dtype] = 2 * SIDE[device.type] ** 3 / (statistics.median(taken) / 1e3)
    return Ceilings(moved / (statistics.median(copied) / 1e3), rates)


def lines(ceilings: Ceilings) -> list[list[str]]:
    """The rows of a table of them."""
    products = [
        [f"product, {str(dtype)[6:]}", f"{rate / 1e12:.2f} TFLOP/s"] for dtype, rate in ceilings.product.items()
    ]
    return [["copy, bytes read plus written", f"{ceilings.copy / 1e9:.1f} GB/s"], *products]


def main() -> int:
    """Measure and print."""
    command(__doc__).parse_args()
    device = gpu()
    dtypes = tuple(DTYPES.values()) if is_gpu(device) else (torch.float32,)
    show(machine(device), ("ceiling", "measured"), lines(measure(device, dtypes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
