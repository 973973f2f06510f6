"""Time every kernel of the relevance dialect on this GPU, after checking that it is right.

    python bench/kernels.py                          every op, workload and dtype
    python bench/kernels.py --op norm_bwd --dtype bf16 --plot roofline.png
    python bench/kernels.py --check                  check only, every configuration

Against eager torch, inductor, torch's own fused op or cuBLAS at the same operations, and against the ceilings of the
machine, a copy and a product of matrices, measured in the same run. A kernel whose error against float64 is too large
is reported and not timed. Without a GPU eager alone is timed, on the small samples of the tests, and --check runs the
kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from ceilings import Ceilings, gpu, is_gpu, measure
from ceilings import lines as ceiling_lines
from harness import DTYPES, command, machine, markdown, show, write_csv
from kernel_cases import Case, Timing, cases, checked, in_words, timings
from kernel_report import COLUMNS, HEADER, plot, record, rows, write_all

from lrp_compiler.kernels.registry import DIALECT

NO_GPU = "no GPU: kernels are not timed; these are times of the eager reference on the CPU"


def options() -> argparse.Namespace:
    """The command line; what is left open depends on whether there is a GPU."""
    parser = command(__doc__, "write kernels.md, kernels.csv and machine.json into this folder")
    parser.add_argument("--op", choices=[spec.name for spec in DIALECT], action="append", help="ops (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="dtypes (default: all; on the CPU fp32)")
    parser.add_argument("--scale", choices=("full", "small"), help="workloads of real models, or the tests' samples")
    parser.add_argument("--repeats", type=int, default=20, help="of each call (default: 20)")
    parser.add_argument("--check", action="store_true", help="check only, each configuration; no GPU: interpreted")
    parser.add_argument("--jobs", type=int, default=1, help="with --check: ops side by side, a process each")
    parser.add_argument("--no-inductor", action="store_true", help="leave inductor out: compiling takes seconds each")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so many seconds")
    parser.add_argument("--csv", type=Path, help="write the timings to this file")
    parser.add_argument("--plot", type=Path, help="draw the roofline into this PNG")
    chosen = parser.parse_args()
    chosen.device = gpu()
    on_gpu = is_gpu(chosen.device)
    chosen.scale = chosen.scale or ("full" if on_gpu else "small")
    interpreted = chosen.check and not on_gpu
    chosen.dtype = chosen.dtype or (list(DTYPES) if on_gpu else ["fp32", "fp16"] if interpreted else ["fp32"])
    chosen.dtypes = [DTYPES[name] for name in chosen.dtype]
    if interpreted and "bf16" in chosen.dtype:
        parser.error("Triton's interpreter truncates bfloat16; tests/kernels mends that, or check it on a GPU")
    if interpreted:
        # Read when a kernel is defined, which is at its first use.
        os.environ["TRITON_INTERPRET"] = "1"
    return chosen


def check(asked: list[Case], device: torch.device) -> int:
    """Compare every way of running every case; 1 when one is wrong."""
    wrong = 0
    for case in asked:
        found = checked(case, device)
        for way, reason in found.items():
            print(f"WRONG  {case}, {way}: {reason}", flush=True)
        wrong += bool(found)
    where = f"on {torch.cuda.get_device_name(device)}" if is_gpu(device) else "in Triton's interpreter"
    print(f"{len(asked)} cases checked {where}, {wrong} wrong")
    return 1 if wrong else 0


def check_apart(ops: list[str], chosen: argparse.Namespace) -> int:
    """Check each op in a process of its own, so that one that fails takes no other along; 1 when one is wrong."""
    options = [*(f"--dtype={name}" for name in chosen.dtype), f"--scale={chosen.scale}"]

    def one(op: str) -> int:
        asked = [sys.executable, __file__, "--check", f"--op={op}", *options]
        done = subprocess.run(asked, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(f"{op}: {done.stdout if done.returncode else done.stdout.splitlines()[-1]}", flush=True)
        return done.returncode

    with ThreadPoolExecutor(chosen.jobs) as pool:
        return max(list(pool.map(one, ops)), default=0)


class Run:
    """The cases of one run, what they took, and which of them were not timed and why."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen, self.device = chosen, chosen.device
        self.timings: list[Timing] = []
        self.left_out: list[str] = []
        self.wrong = 0
        self.ceilings: Ceilings = measure(self.device, tuple(chosen.dtypes))

    def time(self, asked: list[Case]) -> None:
        """Check and time each case while there is time, and keep the files up to date."""
        start = time.monotonic()
        for case in asked:
            if time.monotonic() - start > self.chosen.seconds:
                self.left_out.append(f"{case}: not measured, the time was up")
                continue
            reason = self._gate(case) or self._timed(case)
            if reason:
                print(f"{case}: {reason}", flush=True)
                self.left_out.append(f"{case}: {reason}")
            self.write()

    def _gate(self, case: Case) -> str:
        """Why a case is not timed, or nothing."""
        found = checked(case, self.device) if is_gpu(self.device) else {}
        self.wrong += bool(found)
        return "; ".join(f"WRONG, not timed: {way}: {reason}" for way, reason in found.items())

    def _timed(self, case: Case) -> str:
        """Time a case; why that failed, or nothing."""
        try:
            made = timings(case, self.device, self.chosen.repeats, inductor=not self.chosen.no_inductor)
        except Exception as error:
            # The next case may do, and what was measured stays.
            self.wrong += 1
            return f"not timed: {in_words(error)}"
        print(f"{case}: " + ", ".join(f"{row[3]} {row[4]} µs" for row in rows(made, self.ceilings)), flush=True)
        self.timings += made
        return ""

    @property
    def where(self) -> str:
        """The machine, and that kernels were not timed where they were not."""
        note = "" if is_gpu(self.device) else f". **{NO_GPU}**"
        return machine(self.device) + note

    def write(self) -> None:
        """The files that were asked for."""
        if self.chosen.out:
            texts = {
                "repeats": str(self.chosen.repeats),
                "machine": self.where,
                "ceilings": markdown(("ceiling", "measured"), ceiling_lines(self.ceilings)),
                "notes": "\n".join(f"* {line}" for line in self.left_out),
            }
            write_all(self.chosen.out, self.timings, self.ceilings, self.device, texts)
        if self.chosen.csv:
            write_csv(self.chosen.csv, COLUMNS, (record(timing, self.ceilings) for timing in self.timings))

    def show(self) -> None:
        """Tables to the terminal, and the picture."""
        self.write()
        show(self.where, ("ceiling", "measured"), ceiling_lines(self.ceilings))
        show("Kernels", HEADER, rows(self.timings, self.ceilings))
        for line in self.left_out:
            print(line)
        if self.chosen.plot and any(timing.work.flops for timing in self.timings):
            plot(self.chosen.plot, self.timings, self.ceilings, machine(self.device))


def main() -> int:
    """Check, measure, print and write; 1 when a kernel is wrong."""
    chosen = options()
    asked = cases("workloads" if chosen.scale == "full" else "samples", chosen.op or (), chosen.dtypes)
    if chosen.check and chosen.jobs > 1:
        return check_apart(list(dict.fromkeys(case.spec.name for case in asked)), chosen)
    if chosen.check:
        return check(asked, chosen.device)
    if not is_gpu(chosen.device):
        print(NO_GPU)
    run = Run(chosen)
    run.time(asked)
    run.show()
    return 1 if run.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
