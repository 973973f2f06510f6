"""What backend="inductor" costs and saves: first call, first call of a second process, and later calls against eager.

    python bench/backends.py [--models NAME ...] [--composite NAME] [--repeats N] [--out FOLDER]

Each model runs in two processes, one after the other, with a cache on disk of their own: the second finds what inductor
made in the first. In each, ``attribute`` of both backends takes turns; the least and the median of the second process
are reported. Relevance is compared first, and no time is printed where it disagrees. Random weights, float32, batch 1.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import Any

import torch
from harness import command, in_turns, machine, markdown, of_this_machine, show, write, write_csv
from workloads import ENTRIES

from lrp_compiler import compile_for_lrp

BACKENDS = ("eager", "inductor")
HEADER = ("model", "backend", "first call s", "in a second process s", "least ms", "median ms", "x eager (least)")
AGREES = 1e-2
"""Largest share of relevance that another order of rounding may move, through ReLUs that flip."""


def measured(model: str, composite: str, repeats: int) -> dict[str, Any]:
    """Seconds of the first call and milliseconds of later ones per backend, and how far the two results differ."""
    work = ENTRIES[model].seeded(1, torch.device("cpu"))
    calls, first, found = {}, {}, {}
    for backend in BACKENDS:
        explained = compile_for_lrp(work.model, composite, backend=backend)
        calls[backend] = partial(explained.attribute, work.x, work.target)
        start = time.perf_counter()
        found[backend] = calls[backend]()
        first[backend] = time.perf_counter() - start
    difference = (found["inductor"] - found["eager"]).norm() / found["eager"].norm()
    return {"name": work.name, "first": first, "taken": in_turns(calls, repeats), "difference": float(difference)}


def in_a_process(model: str, cache: str, options: Any) -> dict[str, Any]:
    """``measured`` in a process of its own, whose inductor keeps what it makes in the folder ``cache``."""
    line = [sys.executable, __file__, "--models", model, "--composite", options.composite, "--inside"]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(
        [*line, "--repeats", str(options.repeats)], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(model: str, options: Any) -> list[list[str]]:
    """A line per backend; exits where their relevance differs."""
    with tempfile.TemporaryDirectory() as cache:
        fresh, cached = (in_a_process(model, cache, options) for _ in range(2))
    if not fresh["difference"] <= AGREES:
        sys.exit(f"{fresh['name']}: inductor's relevance is {fresh['difference']:.2g} away from eager's")
    least = {backend: min(cached["taken"][backend]) for backend in BACKENDS}
    lines = []
    for backend in BACKENDS:
        seconds = [f"{run['first'][backend]:.1f}" for run in (fresh, cached)]
        median = f"{statistics.median(cached['taken'][backend]):.1f}"
        ratio = f"{least[backend] / least['eager']:.2f}"
        lines.append([fresh["name"], backend, *seconds, f"{least[backend]:.1f}", median, ratio])
    return lines


def main() -> None:
    """Measure, print, and write files if asked."""
    parser = command(
        __doc__, "also write backends.csv and backends.md into a folder of this machine's in here", of_this_machine
    )
    parser.add_argument("--models", nargs="+", choices=ENTRIES, default=["llama", "gpt2", "vit", "resnet50"])
    parser.add_argument("--composite", default="attnlrp")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--inside", action="store_true", help="measure one model in this process, and print it as JSON")
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measured(options.models[0], options.composite, options.repeats)))
        return
    lines = [line for model in options.models for line in rows(model, options)]
    where = f"{machine()}, float32, batch 1, {options.composite}"
    show(where, HEADER, lines)
    if options.out:
        write(options.out / "backends.md", f"{markdown(HEADER, lines)}\n\n{where}\n")
        write_csv(options.out / "backends.csv", ("machine", *HEADER), ([where, *line] for line in lines))


if __name__ == "__main__":
    main()
