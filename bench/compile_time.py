"""How long compiling takes as a network grows: processor time per pass, from a call to the code of both graphs.

    python bench/compile_time.py [--out FOLDER] [--nodes N ...]

Chains of one residual block (layer norm, two linear layers, GELU, an addition) are compiled for ``attnlrp``, each pass
timed by itself. Printed per pass: milliseconds per size, and the exponent p of time ~ nodes^p by least squares over the
logarithms; 1 is linear. The two networks whose time has a bound are timed beside them, at full size, on fake tensors.
"""

from __future__ import annotations

import gc
import math
import platform
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import transformers
from harness import command, machine, markdown, of_this_machine, write
from published import THE_15
from torch import Tensor, nn

from lrp_compiler.composites import composite_named
from lrp_compiler.passes.codegen import codegen
from lrp_compiler.passes.insert_relevance import insert_relevance
from lrp_compiler.passes.pin import pin
from lrp_compiler.passes.pipeline import CAPTURE, EMIT, EXPLAIN, compile_forward
from lrp_compiler.passes.pipeline import run as run_pass
from lrp_compiler.passes.program import Program
from lrp_compiler.passes.request import Request
from lrp_compiler.passes.specialise import specialise

T = TypeVar("T")
COMPOSITE = "attnlrp"
OPS_PER_BLOCK = 6
"""The five ops of a block, and the taking of the norm's result from its statistics."""
SIZES = (625, 1250, 2500, 5000, 10000, 20000)
LIMITS = {"ViT-b-16": 2, "Gemma-3-270m-it": 15}
"""Seconds from the call to both functions, on two cores."""


class Block(nn.Module):
    """A residual block of five ops."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))
        return result


def timed(spent: dict[str, float], name: str, work: Callable[..., T], *args: Any) -> T:
    """``work(*args)``, its processor time in milliseconds entered under ``name``."""
    start = time.process_time()
    result = work(*args)
    spent[name] = spent.get(name, 0.0) + (time.process_time() - start) * 1e3
    return result


def compiled(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """(forward nodes, milliseconds per pass) of one call; a pass's time includes the check of what it made."""
    spent: dict[str, float] = {}
    gc.collect()
    with torch.no_grad():
        history = timed(spent, "capture", run_pass, CAPTURE[0], (), model, args, kwargs)
        for one in CAPTURE[1:]:
            history = timed(spent, one.__name__, run_pass, one, history, *((model, args, kwargs) if one is pin else ()))
        timed(spent, "codegen", compile_forward, history)
        for one, settings in zip(EXPLAIN, ((), (composite_named(COMPOSITE),)), strict=True):
            history = timed(spent, one.__name__, run_pass, one, history, *settings)
        program = history[-1].program
        for one in EMIT:
            asked = [request(program)] if one in (specialise, insert_relevance) else []
            history = timed(spent, one.__name__, run_pass, one, history, *asked)
        timed(spent, "codegen", codegen, history[-1].program)
    return sum(node.op == "call_function" for node in program.graph.nodes), spent


def request(program: Program) -> Request:
    """Relevance of all attributed inputs at the first output."""
    return Request((0,), tuple((node, "relevance") for nodes in program.sources.values() for node in nodes))


def exponent(nodes: list[int], milliseconds: list[float]) -> float:
    """The p of time ~ nodes^p that fits best in the logarithms."""
    x, y = [math.log(n) for n in nodes], [math.log(max(ms, 1e-3)) for ms in milliseconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def chains(sizes: list[int]) -> str:
    """The table of chains: a row per pass, a column per size."""
    compiled(nn.Sequential(Block(), Block()), (torch.randn(2, 16),), {})
    nodes: list[int] = []
    columns: list[dict[str, float]] = []
    for size in sizes:
        count, spent = compiled(
            nn.Sequential(*(Block() for _ in range(size // OPS_PER_BLOCK))), (torch.randn(2, 16),), {}
        )
        nodes.append(count)
        columns.append(spent)
        print(f"{count} nodes: {sum(spent.values()):.0f} ms", flush=True)
    names = list(columns[0])
    totals = {
        "all but capture": [sum(c.values()) - c["capture"] for c in columns],
        "all": [sum(c.values()) for c in columns],
    }
    series = {name: [column[name] for column in columns] for name in names} | totals
    rows = [[name, *(f"{ms:,.1f}" for ms in row), f"{exponent(nodes, row):.2f}"] for name, row in series.items()]
    rows.append(["all, per node", *(f"{ms / n:.2f}" for ms, n in zip(totals["all"], nodes, strict=True)), ""])
    return markdown(("pass", *(f"{n:,} nodes" for n in nodes), "exponent"), rows)


def bounded() -> str:
    """The table of the networks that have a limit."""
    rows = []
    for published in (one for one in THE_15 if one.name in LIMITS):
        call = published.weightless_call()
        gc.collect()
        start = time.perf_counter()
        nodes, spent = compiled(call.model, call.args, call.kwargs)
        seconds = (time.perf_counter() - start, sum(spent.values()) / 1e3, spent["capture"] / 1e3)
        limit = f"{LIMITS[published.name]}"
        rows.append([published.name, call.size, f"{nodes:,}", *(f"{second:.2f}" for second in seconds), limit])
    return markdown(("network", "input", "nodes", "wall s", "processor s", "of it capture", "limit s"), rows)


def where() -> str:
    """What the times were measured on."""
    return machine(python=platform.python_version(), transformers=transformers.__version__)


TEXT = """# Compile time

Written by `python bench/compile_time.py --out bench/results`. {machine}.

Processor milliseconds per pass, with the verification of what it made, for chains of a residual block; nodes are
forward ops. Capture is `torch.export`. The exponent p fits time ~ nodes^p over all sizes; a single figure that stands
out holds one of the python garbage collector's full rounds.

{chains}

From the call of a full-size network on fake tensors to both functions, after the imports:

{bounded}

Wall time depends on what else the machine does, processor time less so.
"""


def main() -> None:
    """Measure, and print or write the tables."""
    parser = command(__doc__, "write compile_time.md into a folder of this machine's in here", of_this_machine)
    parser.add_argument("--nodes", type=int, nargs="+", default=list(SIZES), help="sizes of the chains")
    options = parser.parse_args()
    # First, before the long chains fill the memory that each full garbage collection looks through.
    networks = bounded()
    text = TEXT.format(machine=where(), chains=chains(options.nodes), bounded=networks)
    if options.out:
        write(options.out / "compile_time.md", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
