"""What relevance costs: forward + relevance of ours against eager input x gradient, in one run.

    python bench/cost.py [--out FOLDER] [--repeats N]

Checks first that both sides compute what they should (ours with composite input_x_gradient must equal autograd's);
a red check prints no timing. Providers take turns, so that drift hits both; medians with p20 and p80 and the ratio to
a plain forward of the same run are reported. Random weights, float32, batch 1.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial

from harness import command, in_turns, publish, spread
from workloads import Workload, agrees_with_autograd, input_x_gradient, plain_forward, timed, with_outputs

from lrp_compiler import compile_for_lrp

HEADER = ("model", "provider", "median ms", "p20", "p80", "x forward", "x input x gradient")


def providers(work: Workload) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""

    explained = {name: compile_for_lrp(work.model, name) for name in ("attnlrp", "cp_lrp", "epsilon")}
    return {
        "plain forward": partial(plain_forward, work),
        "eager input x gradient": partial(input_x_gradient, work),
        **{f"ours, {name}": partial(one.attribute, work.x, work.target) for name, one in explained.items()},
        "ours, attnlrp, outputs too": partial(with_outputs, explained["attnlrp"], work),
    }


def rows(work: Workload, repeats: int) -> list[list[str]]:
    """One line per provider: median, p20, p80, ratio to the plain forward and to input x gradient."""
    taken = in_turns(providers(work), repeats)
    median = {name: statistics.median(values) for name, values in taken.items()}
    lines = []
    for name, values in taken.items():
        figures = [f"{milliseconds:.0f}" for milliseconds in spread(values)]
        ratios = [f"{median[name] / median[bar]:.2f}" for bar in ("plain forward", "eager input x gradient")]
        lines.append([work.name, name, *figures, *ratios])
    return lines


def main() -> None:
    """Check, measure, print, and write files if asked."""
    parser = command(__doc__, "also write cost.csv and cost.md into this folder")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    lines: list[list[str]] = []
    for work in timed():
        if not agrees_with_autograd(work):
            sys.exit(f"{work.name}: ours disagrees with autograd; nothing was timed")
        lines += rows(work, options.repeats)
    publish("cost", HEADER, lines, options.out)


if __name__ == "__main__":
    main()
