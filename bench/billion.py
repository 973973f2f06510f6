"""Relevance of one token of a Llama of 1.2 billion parameters in bfloat16: seconds, memory and conservation.

The sizes are those of Llama-3.2-1B, the weights random; bench/scaling.py --billion runs it.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path

import torch
import transformers
from harness import machine, markdown, show, write
from peer_worker import kilobytes, synchronise
from published import llama_1b_config
from workloads import Workload, of_tokens

from lrp_compiler import LRPModule, compile_for_lrp

HEADER = ("tokens", "first call s", "second call s", "peak GB of the process", "of it the model", "unaccounted")


def built(tokens: int, device: torch.device) -> Workload:
    """The model in bfloat16, frozen, on the embeddings of random tokens; the last token is explained."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(llama_1b_config()).requires_grad_(False).to(device)
    finally:
        torch.set_default_dtype(before)
    return of_tokens("Llama 1B", model, "model.layers.*", (-1, 3), (1, tokens))


def seconds(module: LRPModule, work: Workload) -> float:
    """How long one call takes; relevance must be finite."""
    start = time.perf_counter()
    relevance = module.attribute(work.x, work.target)
    synchronise(work.x.device)
    taken = time.perf_counter() - start
    assert relevance.shape == work.x.shape and bool(relevance.isfinite().all())
    return taken


def unaccounted(module: LRPModule, work: Workload) -> float:
    """The share of the explained logit that is found neither at the embeddings nor in sinks."""
    with torch.no_grad():
        _, tape = module.run(work.x)
        ledger = tape.ledger(work.target)
    return abs(ledger.gap) / abs(ledger.seed)


def run(sizes: list[int], device: torch.device, folder: Path | None = None) -> None:
    """Explain a token of a sequence of each length; print what it took, and write it to billion.md in a folder."""
    where = f"Llama-3.2-1B sizes, random weights, bfloat16, {machine(device)}"
    lines = []
    for tokens in sizes:
        work = built(tokens, device)
        held = sum(value.nbytes for value in work.model.parameters())
        module = compile_for_lrp(work.model, "attnlrp")
        times = [seconds(module, work) for _ in range(2)]
        peak = kilobytes("VmHWM") * 1024 if device.type == "cpu" else torch.cuda.max_memory_allocated(device)
        sizes_gb = [f"{size / 1e9:.2f}" for size in (peak, held)]
        lines.append([str(tokens), *(f"{taken:.1f}" for taken in times), *sizes_gb, f"{unaccounted(module, work):.1e}"])
        print(" | ".join(lines[-1]), flush=True)
        del work, module
        gc.collect()
    show(where, HEADER, lines)
    if folder:
        write(folder / "billion.md", f"{markdown(HEADER, lines)}\n\n{where}\n")
