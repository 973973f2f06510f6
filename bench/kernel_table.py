"""Write kernels/dialect/TABLE.md: the ops that have a kernel, and what is left to torch and why.

python bench/kernel_table.py --out kernels/dialect/TABLE.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from harness import command, markdown, short, write

from lrp_compiler.kernels.registry import DIALECT, LEFT_TO_TORCH
from lrp_compiler.kernels.spec import KernelSpec, Work

META, BF16 = torch.device("meta"), torch.bfloat16

COPY, PRODUCT = 3.35e12, 989e12
"""Bytes and bf16 operations per second of an H100 SXM by NVIDIA's datasheet: promised, not measured."""


@dataclass(frozen=True)
class Counted:
    """What torch runs in one example in bf16: its work, and bytes of passes beside it that a kernel could spare."""

    example: str
    work: Work
    spared: int = 0


def product(rows: int, inner: int, columns: int, times: int = 1) -> Work:
    """Of ``times`` matrix products in bf16, each operand read and each result written once."""
    moved = rows * inner + inner * columns + rows * columns
    return Work(2 * times * moved, 2 * times * rows * inner * columns)


def elementwise(elements: int, moved: int, flops: int = 1) -> Work:
    """Of ops on ``elements`` numbers that read and write ``moved`` numbers of bf16 for each."""
    return Work(2 * elements * moved, flops * elements)


def convolution(images: int, channels: int, side: int, window: int) -> Work:
    """Of a convolution that keeps its channels and its size, or of its data gradient."""
    activations, weights = images * channels * side**2, (channels * window) ** 2
    return Work(2 * (2 * activations + weights), 2 * activations * channels * window**2)


def twice(work: Work) -> Work:
    """Forward and back."""
    return Work(2 * work.bytes, 2 * work.flops)


LLAMA, STREAM = (2048, 14336, 4096), 8 * 197 * 768

COUNTED: dict[str, Counted] = {
    "plain linear": Counted("2048 x 14336 -> 4096 (Llama 8B)", product(*LLAMA)),
    "plain convolution": Counted("8 x 256 x 56 x 56, 3x3", convolution(8, 256, 56, 3)),
    "plain product": Counted("both factors, 32 x 2048 x 2048 x 128", product(2048, 2048, 128, times=64)),
    "one-sided linear": Counted(
        "2048 x 14336 -> 4096, forward and back", twice(product(*LLAMA)), spared=4 * 14336 * 4096
    ),
    "one-sided convolution": Counted(
        "8 x 256 x 56 x 56, 3x3, forward and back", twice(convolution(8, 256, 56, 3)), spared=4 * (256 * 3) ** 2
    ),
    "addition": Counted("two paths of 8 x 197 x 768 meet (ViT-B/16)", elementwise(STREAM, 3)),
    "movement": Counted("heads of 8 x 197 x 768 put side by side", elementwise(STREAM, 2, 0)),
    "mean pooling and resizing": Counted("8 x 2048 x 7 x 7 from their means", elementwise(8 * 2048 * 49, 1)),
    "batch norm": Counted("8 x 256 x 56 x 56", elementwise(8 * 256 * 56**2, 2)),
    "Fourier transform": Counted("8 x 16000 samples, real", elementwise(8 * 16000, 4, 35)),
    "recurrence": Counted("LSTM of width 1024, 512 steps, batch 32", product(512 * 32, 4096, 1024)),
    "difference rules": Counted("2048 x 14336 -> 4096 (Llama 8B)", product(*LLAMA)),
}
"""Example per row of LEFT_TO_TORCH that does something on its own."""

KERNELS = (
    "op",
    "what it computes",
    "source",
    "bound",
    "configurations",
    "samples",
    "workload",
    "MB",
    "GFLOP",
    "floor µs",
)
LEFT = ("what", "why torch's", "example", "MB", "GFLOP", "floor µs", "to be spared")


def floor(work: Work) -> float:
    """Microseconds that bytes or operations take at the datasheet's rates, whichever is more."""
    return 1e6 * max(work.bytes / COPY, work.flops / PRODUCT)


def figures(work: Work) -> list[str]:
    """Megabytes, billions of operations, and the floor."""
    return [f"{work.bytes / 1e6:.1f}", f"{work.flops / 1e9:.2f}", f"{floor(work):.1f}"]


def kernel_rows(spec: KernelSpec) -> Iterator[list[str]]:
    """A line per workload; what belongs to the op stands in its first."""
    dtype = BF16 if BF16 in spec.dtypes else spec.dtypes[0]
    tests = f"{len(list(spec.samples(dtype, META)))} x {', '.join(short(each) for each in spec.dtypes)}"
    facts = [f"`{spec.name}`", spec.summary, spec.source, spec.bound, str(len(spec.configs)), tests]
    for sample in spec.workloads(dtype, META):
        cells = [*facts, sample.label, *figures(spec.work(*sample.arguments))]
        yield [cell.replace("|", "\\|") for cell in cells]
        facts = [""] * len(facts)


def left_rows() -> Iterator[list[str]]:
    """A line per thing that is left to torch."""
    for name, reason in LEFT_TO_TORCH.items():
        counted = COUNTED.get(name)
        if counted is None:
            yield [name, reason, *["-"] * 5]
        else:
            beside = 1e6 * counted.spared / COPY
            spared = f"{beside / (floor(counted.work) + beside):.0%}"
            yield [name, reason, counted.example, *figures(counted.work), spared]


TEXT = """# The relevance dialect

Written by `make kernel-table` from `kernels/registry.py`; not by hand. Bytes and operations are counted from each
spec, in bf16; the floor is what they take at the rates of an H100's **datasheet** (3.35 TB/s, 989 TFLOP/s in bf16),
whichever is more: nothing in this file was measured.

## Ops with a kernel

`torch.ops.lrp.<op>`: contract and eager reference in `kernels/dialect/`, kernel in `kernels/triton_dialect/`. Samples
are the calls of `tests/kernels/test_dialect.py`, each in every dtype; configs counts the shipped configurations, of
which a launch on a GPU chooses by measurement (`kernels/autotune.py`).

{kernels}

## Left to torch

To be spared: what a kernel of ours could save at most, as a share of the floor and of the passes that it would not
make.

{left}
"""


def document() -> str:
    """The whole file."""
    rows = [row for spec in DIALECT for row in kernel_rows(spec)]
    return TEXT.format(kernels=markdown(KERNELS, rows), left=markdown(LEFT, left_rows()))


def main() -> int:
    """Write the file, or print it."""
    chosen = command(__doc__, "write to this file instead of the terminal").parse_args()
    if chosen.out:
        write(chosen.out, document())
    else:
        print(document(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
