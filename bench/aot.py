"""Compile every kernel ahead of time, for GPUs that are not here: registers, spills, shared memory, occupancy bound.

python bench/aot.py --out bench/results/aot.md
python bench/aot.py --chip sm_90 --dtype bf16
"""

from __future__ import annotations

import os
import sys

# The compiler needs kernels as they are written, not as the interpreter wraps them.
os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from harness import command, markdown, write

from lrp_compiler.kernels.aot import CHIPS, NAMES, Build, builds
from lrp_compiler.kernels.registry import DIALECT

FIGURES = "registers / bytes spilled / bytes shared / occupancy at most"


def figures(build: Build) -> str:
    """What one compilation takes of its chip."""
    return f"{build.registers} / {build.spilled} / {build.shared} / {build.occupancy:.0%}"


def names(build: Build) -> tuple[str, ...]:
    """What was compiled: kernel, workload, dtype, configuration."""
    return build.kernel.removesuffix("_kernel"), build.workload, build.dtype, build.config


def document(made: list[Build]) -> str:
    """The table, a line per kernel and configuration and a column per chip, under a head that says what it shows."""
    chips = list(dict.fromkeys(build.chip for build in made))
    rows: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for build in made:
        # One call may launch a kernel several times, each compiled for what it is given.
        rows.setdefault(names(build), {}).setdefault(build.chip, []).append(figures(build))
    spilling = {chip: sum(build.spilled > 0 for build in made if build.chip == chip) for chip in chips}
    spilled = ", ".join(f"{count} on {chip}" for chip, count in spilling.items())
    lines = ([*what, *("; ".join(found.get(chip, [])) for chip in chips)] for what, found in rows.items())
    return f"""# Kernels compiled ahead of time

`python bench/aot.py`, triton {triton.__version__}: {len(made)} compilations, a line per kernel and configuration.
Values are kept in local memory by {spilled} of them.

Per chip: {FIGURES}; one group of figures for every
way in which a call launches the kernel. Registers and bytes spilled are per thread, shared memory is per program, and
the occupancy is the share of a multiprocessor's warps that registers, shared memory and places for programs admit: 0 %
where not even one program fits. Nothing here was run on a GPU.

{markdown(["kernel", "workload", "dtype", "configuration", *chips], lines)}
"""


def main() -> int:
    """Compile, print and write; 1 when a shipped configuration spills on sm_90."""
    parser = command(__doc__, "write the table to this file")
    parser.add_argument("--chip", choices=CHIPS, action="append", help="chips to compile for (default: all)")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], action="append", help="dtypes (default: all)")
    parser.add_argument("--op", choices=[spec.name for spec in DIALECT], action="append", help="ops (default: all)")
    chosen = parser.parse_args()
    known = {name: dtype for dtype, name in NAMES.items()}
    dtypes: tuple[torch.dtype, ...] = tuple(known[name] for name in chosen.dtype or ("fp32", "bf16", "fp16"))
    made: list[Build] = []
    for spec in DIALECT:
        if chosen.op and spec.name not in chosen.op:
            continue
        for chip in chosen.chip or CHIPS:
            for build in builds(spec, CHIPS[chip], tuple(dtype for dtype in dtypes if dtype in spec.dtypes)):
                print("  ".join([*names(build), build.chip, figures(build)]), flush=True)
                made.append(build)
    if chosen.out:
        write(chosen.out, document(made))
    spilling = [build for build in made if build.spilled and build.chip == "sm_90"]
    if spilling:
        print(f"{len(spilling)} shipped configurations spill on sm_90", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
