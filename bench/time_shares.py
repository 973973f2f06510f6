"""Where the time of an attribution goes: products, convolutions, attention, elementwise ops, copies, python.

    python bench/time_shares.py [--out FOLDER] [--repeats N] [--models NAME ...]

One row per model and side: ours (composite attnlrp, attributions alone and with outputs; for convolutional networks
those with sign-split rules too), eager input x gradient, and the forward pass, without which outputs cannot be had. Ops
are timed by torch.profiler, which makes them dearer than they are: read the shares, not the sums. What no op accounts
for of the wall-clock time is python and dispatch. The last columns are the floating-point operations of products,
convolutions and attention, and their ratio to those of input x gradient: the time that is left when all else is free.
Random weights, float32, batch 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from flops import flops
from harness import command, of_this_machine, publish
from torch import nn
from torch.profiler import ProfilerActivity, profile
from workloads import TIMED, Workload, input_x_gradient, plain_forward, timed, with_outputs

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
HEADER = ("model", "side", "ms", *KINDS, REST, PYTHON, "ops", "GFLOP", "x input x gradient")
GRADIENT = "eager input x gradient"
SIGN_SPLIT = ("epsilon_gamma_box", "epsilon_plus")


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


def sides(work: Workload) -> dict[str, Callable[[], object]]:
    """What is compared on a model, by name."""
    found: dict[str, Callable[[], object]] = {}
    for composite in ("attnlrp", *(SIGN_SPLIT if has_convolutions(work) else ())):
        explained = compile_for_lrp(work.model, composite)
        found[f"ours, {composite}"] = partial(explained.attribute, work.x, work.target)
        if composite == "attnlrp":
            found[f"ours, {composite}, outputs too"] = partial(with_outputs, explained, work)
    return {**found, GRADIENT: partial(input_x_gradient, work), "plain forward": partial(plain_forward, work)}


def has_convolutions(work: Workload) -> bool:
    """Whether a model is mostly convolutions."""
    return sum(isinstance(module, nn.Conv2d) for module in work.model.modules()) > 1


def rows(work: Workload, repeats: int) -> list[list[str]]:
    """The lines of one model."""
    calls = sides(work)
    measured = {side: shares(call, repeats) for side, call in calls.items()}
    counted = {side: flops(call) for side, call in calls.items()}
    return [
        [work.name, side, *measured[side], f"{count / 1e9:.1f}", f"{count / counted[GRADIENT]:.2f}"]
        for side, count in counted.items()
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
    lines = [line for work in timed(options.models) for line in rows(work, options.repeats)]
    publish("time_shares", HEADER, lines, options.out)


if __name__ == "__main__":
    main()
