"""One provider on one model in a process of its own; bench/peers.py starts it and asks.

    python bench/peer_worker.py --model vit --provider "ours, attnlrp" [--batch 1] [--device cpu] [--threads 2]

One question a line on stdin, one JSON object a line on stdout: ``{"value": ...}`` or ``{"error": "..."}``. The
questions are the methods of Session; "go" is one call. Whatever libraries print goes to stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import astuple
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from harness import DTYPES, command
from peer_gate import rounding
from providers.base import Prepared, Provider, Setting
from providers.registry import PROVIDERS
from torch import Tensor
from workloads import ENTRIES

from lrp_compiler.memory import allocated_peak


def milliseconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """How long a call takes until its device has finished it, and what it returned."""
    synchronise(device)
    start = time.perf_counter()
    result = call()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3, result


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; a CPU has nothing outstanding."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident_peak(call: Callable[[], Any]) -> int | None:
    """The most bytes of this process in memory during a call above those before it; None where Linux does not say."""
    try:
        # Else freed memory that the allocator has not given back would hide what the call needs.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = kilobytes("VmRSS")
        call()
        return 1024 * (kilobytes("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


def kilobytes(field: str) -> int:
    """A field of /proc/self/status; raises KeyError where it is missing."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(values[field].split()[0])


class Session:
    """A provider on a model; each public method answers a question of the same name."""

    def __init__(self, provider: Provider, setting: Setting) -> None:
        self._provider, self._setting = provider, setting
        self._device = setting.work.x.device
        self._made: Prepared | None = None
        self._first: Any = None
        self._found: Tensor | None = None

    @property
    def _prepared(self) -> Prepared:
        if self._made is None:
            self._made = self._provider.prepare(self._setting)
        return self._made

    def first(self) -> float:
        """Milliseconds of the first call, with whatever the provider prepares for it; what it gave is kept."""
        taken, self._first = milliseconds(lambda: self._prepared.call(), self._device)
        return taken

    def go(self) -> float:
        """Milliseconds of one call."""
        self._first = None
        return milliseconds(self._prepared.call, self._device)[0]

    def relevance(self, path: str) -> bool:
        """Save the relevance of the input; False for a provider that has none."""
        found = self._relevance()
        if found is not None:
            torch.save(found.cpu(), path)
        return found is not None

    def _relevance(self) -> Tensor | None:
        """The relevance of the input, the first call's if that is still there."""
        if self._found is None and self._prepared.relevance is not None:
            made = self._prepared.call() if self._first is None else self._first
            self._found, self._first = self._prepared.relevance(made), None
        return self._found

    def rounding(self) -> list[float]:
        """The fields of Rounding for this model."""
        return list(astuple(rounding(self._setting.work.model, self._setting.relevance_dtype)))

    def peak(self) -> int:
        """The most bytes that torch hands out in one call, above the loaded model."""
        return allocated_peak(self._prepared.call, self._device)

    def resident(self) -> int | None:
        """The same of the process's memory, where the model is in it."""
        return resident_peak(self._prepared.call) if self._device.type == "cpu" else None

    def conservation(self) -> float | None:
        """The share of the explained output that is accounted for nowhere."""
        found = self._relevance()
        return None if found is None or self._prepared.conservation is None else self._prepared.conservation(found)


def serve(session: Any, questions: Iterable[str], answers: TextIO) -> None:
    """Answer every line until "quit"; a question that fails is answered by its error."""
    for line in questions:
        name, *arguments = line.split()
        if name == "quit":
            return
        try:
            answer = {"value": getattr(session, name)(*arguments)}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {lines[0]}"}
        print(json.dumps(answer), file=answers, flush=True)


def parse() -> Namespace:
    """The command line."""
    parser = command(__doc__)
    parser.add_argument("--model", choices=ENTRIES, required=True)
    parser.add_argument("--provider", choices=PROVIDERS, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--dynamic-lrp", type=Path)
    return parser.parse_args()


def main() -> None:
    """Load the model, then answer."""
    options = parse()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False
    transformers.utils.logging.set_verbosity_error()
    entry = ENTRIES[options.model]
    work = entry.seeded(options.batch, options.device)
    setting = Setting(entry, work, DTYPES[options.dtype], options.dynamic_lrp)
    print(json.dumps({"value": work.name}), file=answers, flush=True)
    with contextlib.closing(answers):
        serve(Session(PROVIDERS[options.provider], setting), sys.stdin, answers)


if __name__ == "__main__":
    main()
