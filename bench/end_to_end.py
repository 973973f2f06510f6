"""AttnLRP of whole transformers against eager input x gradient, on this GPU: the bar it must not be slower than.

    python bench/end_to_end.py [--out FOLDER] [--repeats N] [--dtype bf16]

A ViT-B/16 and a Llama of 1.2 billion parameters from plain torch modules, random weights. Checks first, in float32,
that ours with composite input_x_gradient equals autograd; a red check times nothing. Wall time of whole calls, which
take turns, forward included. Without a GPU it runs on models of few layers, to show that it runs.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from ceilings import gpu, is_gpu
from harness import DTYPES, command, in_turns, machine, markdown, show, spread, write, write_csv
from plain_models import LLAMA_1B, VIT_B_16, Llama, VisionTransformer
from torch import Tensor, nn

from lrp_compiler import LRPModule, compile_for_lrp

HEADER = ("model", "dtype", "provider", "median ms", "p20", "p80", "x forward", "x input x gradient", "target")
EAGER, OURS = "eager input x gradient", "ours, attnlrp"
PROVIDERS = ("attnlrp", "cp_lrp", "input_x_gradient")


@dataclass(frozen=True)
class Whole:
    """A model and what it reads; its class 3 is explained."""

    name: str
    model: nn.Module
    x: Tensor

    def to(self, dtype: torch.dtype) -> Whole:
        """The same in another dtype."""
        return Whole(self.name, self.model.to(dtype), self.x.to(dtype))


def wholes(device: torch.device, full: bool) -> Iterator[Whole]:
    """Both models on ``device``, at full size or cut to two narrow layers."""
    few = {"layers": 2, "width": 48, "heads": 4, "hidden": 96, "tokens": 16, "batch": 1, "outputs": 10}
    vit = VIT_B_16 if full else replace(VIT_B_16, **few, shared_heads=4)
    llama = LLAMA_1B if full else replace(LLAMA_1B, **few, shared_heads=2)
    side = 16 * round(vit.tokens**0.5)
    with device:
        yield Whole("ViT-B/16", VisionTransformer(vit).eval(), torch.randn(vit.batch, 3, side, side))
        x = 0.02 * torch.randn(llama.batch, llama.tokens, llama.width)
        yield Whole(f"Llama 1B, {llama.tokens} tokens", Llama(llama).eval(), x)


def input_x_gradient(whole: Whole) -> Tensor:
    """Autograd's gradient of the explained logit, times the input."""
    leaf = whole.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(whole.model(leaf)[:, 3].sum(), leaf)
    return gradient * whole.x


def agrees(whole: Whole) -> bool:
    """Whether ours computes autograd's input x gradient, to float32 rounding."""
    expected = input_x_gradient(whole)
    found = compile_for_lrp(whole.model, "input_x_gradient").attribute(whole.x, 3)
    return bool((found - expected).norm() <= 1e-3 * expected.norm())


def calls(whole: Whole) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each waits until the device is done."""
    # One traces for all.
    first = compile_for_lrp(whole.model, PROVIDERS[0])
    compiled: dict[str, LRPModule] = {f"ours, {name}": compile_for_lrp(first, name) for name in PROVIDERS}

    def plain() -> Tensor:
        with torch.no_grad():
            return whole.model(whole.x)  # type: ignore[no-any-return]

    def done(call: Callable[[], object]) -> None:
        call()
        if is_gpu(whole.x.device):
            torch.cuda.synchronize()

    found: dict[str, Callable[[], object]] = {
        "plain forward": plain,
        EAGER: partial(input_x_gradient, whole),
        **{name: partial(ours.attribute, whole.x, 3) for name, ours in compiled.items()},
    }
    return {name: partial(done, call) for name, call in found.items()}


def rows(whole: Whole, dtype: str, repeats: int) -> list[list[str]]:
    """One line per provider."""
    taken = in_turns(calls(whole), repeats)
    median = {name: statistics.median(values) for name, values in taken.items()}
    lines = []
    for name, values in taken.items():
        figures = [f"{milliseconds:.2f}" for milliseconds in spread(values)]
        ratios = [f"{median[name] / median[bar]:.2f}" for bar in ("plain forward", EAGER)]
        asked = name == OURS and is_gpu(whole.x.device)
        met = ("met" if median[name] <= median[EAGER] else "missed") if asked else ""
        lines.append([whole.name, dtype, name, *figures, *ratios, met])
    return lines


@dataclass
class Run:
    """What was measured so far, and what was not and why; the files are kept up to date."""

    device: torch.device
    out: Path | None
    lines: list[list[str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        """The machine."""
        return machine(self.device) + ("" if is_gpu(self.device) else ": no GPU, two narrow layers, nothing to keep")

    def time(self, whole: Whole, dtypes: Sequence[str], repeats: int) -> None:
        """Check and time one model; one that fails does not take the other's numbers along."""
        try:
            if not agrees(whole):
                raise ValueError("ours disagrees with autograd, nothing was timed")
            for name in dtypes:
                made = rows(whole.to(DTYPES[name]), name, repeats)
                print("\n".join(" ".join(line) for line in made), flush=True)
                self.lines += made
                self.write()
        except Exception as error:
            self.left_out.append(": ".join([whole.name, type(error).__name__, *str(error).splitlines()[:1]]))
            self.write()

    def write(self) -> None:
        """end_to_end.md and end_to_end.csv, if asked for."""
        if self.out:
            notes = "\n".join(f"* {line}" for line in self.left_out)
            write(self.out / "end_to_end.md", f"{markdown(HEADER, self.lines)}\n\n{self.where}\n\n{notes}\n")
            rows = ([self.where, *line] for line in self.lines)
            write_csv(self.out / "end_to_end.csv", ("machine", *HEADER), rows)


def main() -> int:
    """Check, measure, print and write; 1 where something was not timed."""
    parser = command(__doc__, "also write end_to_end.csv and end_to_end.md into this folder")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="dtypes (default: fp32, bf16)")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    run = Run(gpu(), chosen.out)
    for whole in wholes(run.device, full=is_gpu(run.device)):
        whole.model.requires_grad_(False)
        run.time(whole, chosen.dtype or ("fp32", "bf16"), chosen.repeats)
    show(run.where, HEADER, run.lines)
    print("\n".join(run.left_out))
    return 1 if run.left_out else 0


if __name__ == "__main__":
    sys.exit(main())
