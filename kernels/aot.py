"""Compiling kernels ahead of time for GPUs that are not here, and what each compilation costs the chip."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lrp_compiler.kernels.launch import Launch
from lrp_compiler.kernels.spec import KernelSpec, Sample

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
NAMES |= {torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}


@dataclass(frozen=True)
class Chip:
    """A GPU to compile for, and what one of its multiprocessors has: registers, shared memory, warps, programs."""

    name: str
    backend: str
    arch: int | str
    warp: int
    registers: int
    shared: int
    warps: int
    programs: int


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("sm_80", "cuda", 80, 32, 65536, 164 * 1024, 64, 32),
        Chip("sm_90", "cuda", 90, 32, 65536, 228 * 1024, 64, 32),
        Chip("sm_100", "cuda", 100, 32, 65536, 228 * 1024, 64, 32),
        # Registers per SIMD unit times four; at most eight waves on each.
        Chip("gfx942", "hip", "gfx942", 64, 4 * 512 * 64, 64 * 1024, 32, 32),
    )
}
"""From NVIDIA's compute capability tables and AMD's CDNA 3 guide."""


@dataclass(frozen=True)
class Build:
    """One compilation: a kernel of an op under a configuration, and what it takes of the chip.

    ``registers`` and ``spilled`` (bytes) are per thread, ``shared`` bytes per program; ``occupancy`` is the share of a
    multiprocessor's warps that these let run at once, an upper bound.
    """

    op: str
    kernel: str
    workload: str
    dtype: str
    config: str
    chip: str
    registers: int
    spilled: int
    shared: int
    occupancy: float


def builds(spec: KernelSpec, chip: Chip, dtypes: tuple[torch.dtype, ...]) -> Iterator[Build]:
    """Compile every kernel of ``spec`` in every shipped configuration, for its workloads."""
    seen: set[Any] = set()
    for dtype in dtypes:
        for sample in spec.workloads(dtype, torch.device("meta")):
            for config in spec.configs:
                _, launches = spec.plan(*sample.arguments, config=config)
                for launch in launches:
                    signature, constants, attributes = described(launch)
                    key = (launch.kernel, str((signature, constants, attributes)), launch.num_warps, launch.num_stages)
                    if key not in seen:
                        seen.add(key)
                        yield _build(spec, chip, sample, dtype, str(config or "-"), launch)


def described(launch: Launch) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """(signature, constants, attributes) that a launch on a device would infer from its arguments."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = _specialised(value, (index,), constants, attributes)
    return signature, constants, attributes


def _specialised(value: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    """The type of an argument, tuples element by element, and at its path what else is known of it."""
    if isinstance(value, tuple):
        return tuple(_specialised(one, (*path, index), constants, attributes) for index, one in enumerate(value))
    # Python's True is 1 too, but booleans reach kernels as constexprs alone.
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, (Tensor, int)):
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return _type_of(value)
    return "fp32"


def _type_of(value: Tensor | int) -> str:
    if isinstance(value, Tensor):
        return f"*{NAMES[value.dtype]}"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _build(spec: KernelSpec, chip: Chip, sample: Sample, dtype: torch.dtype, config: str, launch: Launch) -> Build:
    signature, constants, attributes = described(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget(chip.backend, chip.arch, chip.warp), options=options)
    registers, spilled = _nvidia(compiled) if chip.backend == "cuda" else _amd(compiled)
    shared = int(compiled.metadata.shared)
    name = launch.kernel.fn.__name__
    bound = occupancy(chip, registers, shared, launch.num_warps)
    return Build(spec.name, name, sample.label, NAMES[dtype], config, chip.name, registers, spilled, shared, bound)


def _nvidia(compiled: Any) -> tuple[int, int]:
    """(registers, bytes of local memory) per thread, as the machine code declares them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        printed = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {printed}")
    return int(found[1]), int(found[2]) + int(found[3])


def _amd(compiled: Any) -> tuple[int, int]:
    text = compiled.asm["amdgcn"]
    registers = max(int(number) for number in re.findall(r"\.vgpr_count:\s+(\d+)", text))
    spilled = max(int(number) for number in re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text))
    return registers, spilled


def occupancy(chip: Chip, registers: int, shared: int, warps: int) -> float:
    """The share of a multiprocessor's warps that can be resident, by registers, shared memory and programs."""
    per_warp = -(-max(registers, 1) * chip.warp // 256) * 256
    by_registers = chip.registers // (per_warp * warps)
    by_shared = chip.shared // shared if shared else chip.programs
    programs = min(by_registers, by_shared, chip.programs, chip.warps // warps)
    return programs * warps / chip.warps
