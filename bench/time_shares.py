"""Where the time of an attribution goes: products, convolutions, attention, elementwise ops, copies, python.

    python bench/time_shares.py [--out FOLDER] [--repeats N] [--models NAME ...]

One row per model and side: ours (composite attnlrp, attributions alone and with outputs), eager input x gradient, and
the forward pass, without which outputs cannot be had. Ops are timed by torch.profiler, which makes them dearer than
they are: read the shares, not the sums. What no op accounts for of the wall-clock time is python and dispatch. Random
weights, float32, batch 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from harness import command, of_this_machine, publish
from torch.profiler import ProfilerActivity, profile
from workloads import TIMED, input_x_gradient, plain_forward, timed, with_outputs

from lrp_compiler import compile_for_lrp

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "convolutions": ("convolution", "mkldnn", "slow_conv", "thnn_conv"),
    "attention": ("scaled_dot_product",),
    "norms": ("norm",),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "aten::index", "aten::clone"),
}
"""Kind -> what the names of its ops hold, tried in order; any other op of torch's is elementwise or a reduction."""
REST = "elementwise and reductions"
PYTHON = "python and dispatch"
HEADER = ("model", "side", "ms", *KINDS, REST, PYTHON, "ops")


def kind_of(name: str) -> str:
    """The kind of an op by its name."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), REST)


def shares(call: Callable[[], object], repeats: int) -> list[str]:
    """Milliseconds of one call, the share of each kind of op and of what is not an op, and the number of ops."""
    for _ in range(2):
        call()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wall = (time.perf_counter() - start) * 1e6
    spent, ops = dict.fromkeys((*KINDS, REST), 0.0), 0
    for row in profiled.key_averages():
        if row.key.startswith(("aten::", "lrp::")):
            spent[kind_of(row.key)] += row.self_cpu_time_total
            ops += row.count
    spent[PYTHON] = max(0.0, wall - sum(spent.values()))
    return [
        f"{wall / repeats / 1e3:.0f}",
        *(f"{100 * part / wall:.1f} %" for part in spent.values()),
        str(ops // repeats),
    ]


def main() -> None:
    """Measure, print, and write files if asked."""
    parser = command(
        __doc__,
        "also write time_shares.csv and time_shares.md into a folder of this machine's in here",
        of_this_machine,
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=list(TIMED), default=list(TIMED))
    options = parser.parse_args()
    lines = []
    for work in timed(options.models):
        explained = compile_for_lrp(work.model, "attnlrp")
        sides = {
            "ours, attnlrp": partial(explained.attribute, work.x, work.target),
            "ours, attnlrp, outputs too": partial(with_outputs, explained, work),
            "eager input x gradient": partial(input_x_gradient, work),
            "plain forward": partial(plain_forward, work),
        }
        lines += [[work.name, side, *shares(call, options.repeats)] for side, call in sides.items()]
    publish("time_shares", HEADER, lines, options.out)


if __name__ == "__main__":
    main()
