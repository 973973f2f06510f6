"""elementwise_chain: pointwise ops that follow each other, as one pass over their inputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lrp_compiler.kernels.pointwise import DTYPES, joint_shape, parse, run
from lrp_compiler.kernels.spec import FLOATS, KernelSpec, Refusal, Sample, Supported, all_supported, same_device
from lrp_compiler.kernels.strides import walkable

INPUTS = (*FLOATS, torch.bool, torch.uint8, torch.int64)
"""The dtypes of inputs; integers are read as numbers."""


def elementwise_chain(inputs: list[Tensor], program: str) -> list[Tensor]:
    """The results of a pointwise ``program`` (kernels/pointwise.py) over ``inputs``, computed in float32.

    Inputs broadcast against each other; results have that shape, the dtypes that their ``out`` lines name, and are
    contiguous. Raises ProgramError. c sigmoid(x), for example, over (c, x) is

        sigmoid 1
        mul 0 2
        out 3 bf16
    """
    return run(parse(program, len(inputs)), inputs)


def result_dtypes(inputs: list[Tensor], program: str) -> list[torch.dtype]:
    """The dtype of every result."""
    return [one.dtype for one in parse(program, len(inputs)) if one.name == "out" and one.dtype is not None]


def empty_results(inputs: list[Tensor], program: str) -> list[Tensor]:
    """New contiguous tensors for the results."""
    shape = joint_shape(inputs)
    return [torch.empty(shape, dtype=dtype, device=inputs[0].device) for dtype in result_dtypes(inputs, program)]


def _supports(inputs: list[Tensor], program: str) -> Supported:
    instructions = parse(program, len(inputs))
    unknown = sorted({str(one.dtype) for one in inputs if one.dtype not in INPUTS})
    checks: list[Supported] = [
        same_device(*inputs),
        not unknown or Refusal(f"no kernel for inputs of {', '.join(unknown)}: kernels compute in float32"),
        all(one.dtype != torch.float64 for one in instructions) or Refusal("no kernel rounds to float64"),
    ]
    refused = all_supported(checks)
    if not refused:
        return refused
    return walkable(joint_shape(inputs), inputs)


GATE = "sigmoid 1\nmul 0 2\nout 3 {dtype}"
RATIO = """
lt 1 0.0
sub 1 1e-6
add 1 1e-6
where 2 3 4
div 1 5
mul 0 6
out 7 {dtype}"""
SCALE = "mul 0 0.25\nout 1 {dtype}"
ABSOLUTE_SHARES = """
abs 1
abs 2
add 3 4
add 5 1e-6
div 0 6
mul 7 3
mul 7 4
out 8 {dtype}
out 9 {dtype}"""
MASKED_GELU = """
mul 1 -0.7071067811865476
erfc 3
mul 4 0.5
mul 0 5
where 2 6 0.0
out 7 {dtype}"""


def _named(dtype: torch.dtype) -> str:
    return next(name for name, one in DTYPES.items() if one == dtype)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def sample(label: str, program: str, *inputs: Tensor) -> Sample:
        return Sample(label, (list(inputs), program.format(dtype=_named(dtype))))

    yield sample("gate 5x130", GATE, drawn(5, 130), drawn(5, 130))
    yield sample("ratio, several tiles", RATIO, drawn(3, 700), drawn(3, 700))
    yield sample("scale one element", SCALE, drawn(1))
    yield sample("scale a number", SCALE, drawn(1)[0])
    yield sample("shares along rows", ABSOLUTE_SHARES, drawn(37, 33), drawn(37, 33), drawn(33))
    yield sample("shares along columns", ABSOLUTE_SHARES, drawn(37, 33), drawn(37, 1), drawn(37, 33))
    yield sample("shares along both", ABSOLUTE_SHARES, drawn(37, 1), drawn(33), drawn(37, 1))
    yield sample("gate of pixels by channel", GATE, drawn(2, 5, 7, 9), drawn(5, 1, 1))
    yield sample("shares of five dimensions", ABSOLUTE_SHARES, drawn(2, 3, 2, 3, 5).mT, drawn(3, 1, 5, 1), drawn(1))
    yield sample("ratio of other strides each", RATIO, drawn(40, 30).mT, drawn(30, 80)[:, ::2])
    keep = torch.rand(9, 70, device=device) > 0.5
    yield sample("masked GELU by bool", MASKED_GELU, drawn(9, 70), 3 * drawn(9, 70), keep)
    yield sample("masked GELU by uint8", MASKED_GELU, drawn(9, 70), drawn(9, 70), keep.to(torch.uint8))
    yield sample("masked GELU by int64", MASKED_GELU, drawn(9, 70), drawn(9, 70), keep[:1].to(torch.int64))
    yield sample("results of two dtypes", "mul 0 1\ngt 2 0.0\nout 2 fp32\nout 3 bool", drawn(9, 70), drawn(70))
    yield sample("nothing", GATE, drawn(0, 7), drawn(7))


def _refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    c = torch.randn(3, 4, device=device)
    yield Sample("float64", ([c.double(), c.double()], GATE.format(dtype="fp64")))
    yield Sample("float64 result", ([c], SCALE.format(dtype="fp64")))
    yield Sample("complex numbers", ([c.to(torch.complex64)], SCALE.format(dtype="fp32")))
    wide = torch.empty((3,) * 12, device="meta")[::2, :, ::2, :, ::2, :, ::2, :, ::2, :, ::2]
    yield Sample("too many strides", ([wide], SCALE.format(dtype="fp32")))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    shape, name = (8 * 197, 3072), _named(dtype)
    c, x, bias, keep = (torch.empty(*size, device=device, dtype=dtype) for size in (shape, shape, shape[1:], shape))
    for label, program, inputs in (
        ("gate", GATE, [c, x]),
        ("ratio", RATIO, [c, x]),
        ("absolute shares of a bias", ABSOLUTE_SHARES, [c, x, bias]),
        ("masked GELU", MASKED_GELU, [c, x, keep.to(torch.bool)]),
    ):
        yield Sample(f"{label} 8*197x3072 (ViT-B/16)", (inputs, program.format(dtype=name)))


def _flops(inputs: list[Tensor], program: str) -> int:
    size = joint_shape(inputs).numel()
    return size * sum(one.name not in ("cast", "out") for one in parse(program, len(inputs)))


ELEMENTWISE_CHAIN = KernelSpec(
    name="elementwise_chain",
    summary="a program of pointwise ops: gates, ratios, scales and shares in one pass",
    source="RULES.md 0.1, 1.5; the stabilised ratio of Bach et al. 2015, eq. 58",
    reference=elementwise_chain,
    fake=empty_results,
    supports=_supports,
    samples=_samples,
    refused=_refused,
    workloads=_workloads,
    flops=_flops,
    bound="memory",
)
