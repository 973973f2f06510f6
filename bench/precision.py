"""Relevance in bfloat16 under a float32 model, with and without prepared weights: what it saves and what it loses.

    python bench/precision.py [--out FOLDER] [--repeats N] [--models NAME ...]

Composite attnlrp, attributions alone, beside eager input x gradient and ours in float32; they take turns. The error is
that which `report(measure_error=True)` gives: against float64 on the same input, relative to the norm of relevance.
Products in bfloat16 are fast on processors that have instructions for them; the first line says which this one has.
Prepared weights stay from call to call, and are not part of the megabytes for relevance.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from harness import command, in_turns, of_this_machine, publish, spread
from workloads import TIMED, Workload, input_x_gradient, timed

from lrp_compiler import compile_for_lrp

HEADER = (
    "model",
    "relevance in",
    "median ms",
    "p20",
    "p80",
    "x input x gradient",
    "error",
    "MB for relevance",
    "MB prepared",
)
PREPARED = ", weights prepared"
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


def instructions() -> str:
    """What this processor has for products in bfloat16."""
    found = {"AMX": torch.cpu._is_amx_tile_supported(), "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported()}
    return ", ".join(name for name, has in found.items() if has) or "none"


def rows(work: Workload, repeats: int) -> list[list[str]]:
    """A line for each variant: median, p20, p80, ratio, error, what relevance takes at most, what stays of weights."""
    modules = {
        name + suffix: compile_for_lrp(work.model, "attnlrp", relevance_dtype=given, prepare_weights=bool(suffix))
        for name, given in DTYPES.items()
        for suffix in ("", PREPARED)
    }
    calls = {name: partial(module.attribute, work.x, work.target) for name, module in modules.items()}
    taken = in_turns({"": partial(input_x_gradient, work), **calls}, repeats)
    bar = statistics.median(taken.pop(""))
    lines = []
    for name, module in modules.items():
        figures = [f"{milliseconds:.0f}" for milliseconds in spread(taken[name])]
        report = module.report(work.x, target=work.target, measure_error=True)
        assert report.error is not None
        ratio = f"{statistics.median(taken[name]) / bar:.2f}"
        memory = [f"{size / 1e6:.1f}" for size in (report.memory.peak, report.prepared.bytes)]
        lines.append([work.name, name, *figures, ratio, f"{report.error.relative:.1e}", *memory])
    return lines


def main() -> None:
    """Measure, print, and write files if asked."""
    parser = command(
        __doc__, "also write precision.csv and precision.md into a folder of this machine's in here", of_this_machine
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=list(TIMED), default=list(TIMED))
    options = parser.parse_args()
    print(f"instructions for products in bfloat16: {instructions()}")
    lines = [line for work in timed(options.models) for line in rows(work, options.repeats)]
    publish("precision", HEADER, lines, options.out)


if __name__ == "__main__":
    main()
