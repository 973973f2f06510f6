"""Kernels compiled for GPUs that are not here: nothing shipped spills on sm_90, and what is reported is what is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lrp_compiler.kernels.aot import CHIPS, described, occupancy
from lrp_compiler.kernels.launch import Launch
from lrp_compiler.kernels.registry import DIALECT

ROOT = Path(__file__).resolve().parent.parent.parent
META = torch.device("meta")


NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
AT_ONCE = 10
"""Ops compiled by one process: it takes seconds to start."""
EVERY = [
    # The others in make test-full and make aot: fp16 differs from bf16 in little, fp32 takes longest to compile.
    pytest.param(names, NAMES[dtype], marks=() if dtype is torch.bfloat16 else pytest.mark.slow, id=f"{names[0]}...")
    for dtype in NAMES
    for first in range(0, len(DIALECT), AT_ONCE)
    if (names := [spec.name for spec in DIALECT[first : first + AT_ONCE] if dtype in spec.dtypes])
]


@pytest.mark.thorough
@pytest.mark.parametrize(("ops", "dtype"), EVERY)
def test_no_shipped_configuration_spills_on_sm_90(ops: list[str], dtype: str) -> None:
    """Every configuration, for every workload."""
    chosen = [word for op in ops for word in ("--op", op)]
    command = [sys.executable, str(ROOT / "bench/aot.py"), "--chip", "sm_90", "--dtype", dtype, *chosen]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environ)
    # Columns: ..., chip, registers / spilled / shared / occupancy.
    spilled = [line for line in done.stdout.splitlines() if int(line.split()[-5])]
    assert done.stdout and not spilled and done.returncode == 0, "\n".join([*spilled, done.stderr])


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [
        (32, 0, 4, 16),  # 64 warps in all: everything fits
        (32, 0, 1, 32),  # places for programs run out first
        (33, 0, 4, 12),  # 33 are given out as 40: 65,536 / (40 x 32 x 4) = 12.8
        (255, 0, 8, 1),  # 256 x 32 x 8 is all there is
        (255, 0, 16, 0),  # more than there is
        (32, 100 * 1024, 4, 2),  # 228 KB hold two
        (32, 229 * 1024, 4, 0),
        (0, 0, 4, 16),  # a kernel of no registers is counted as one of few
    ],
)
def test_occupancy_by_hand(registers: int, shared: int, warps: int, programs: int) -> None:
    assert occupancy(CHIPS["sm_90"], registers, shared, warps) == pytest.approx(programs * warps / 64)


def test_occupancy_of_wavefronts() -> None:
    """MI300X: 131,072 registers of 64 lanes' waves; 128 x 64 x 4 leave room for four programs of four waves."""
    assert occupancy(CHIPS["gfx942"], 128, 0, 4) == pytest.approx(16 / 32)
    assert occupancy(CHIPS["gfx942"], 128, 40 * 1024, 4) == pytest.approx(4 / 32)


def _launch(**arguments: Any) -> Launch:
    """A launch of a kernel with these parameters; names in capitals are constexprs."""
    parameters = [SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in arguments]
    return Launch(SimpleNamespace(params=parameters), (1,), arguments)


def test_a_launch_is_described_as_the_runtime_would() -> None:
    """Ones and None are constants, multiples of 16 and pointers divisible, large numbers of 64 bits."""
    x = torch.empty(2, 3, device=META, dtype=torch.bfloat16)
    launch = _launch(x=x, y=None, even=48, odd=47, one=1, large=2**31, least=-(2**31), scale=0.5, BLOCK=64, CAUSAL=True)
    signature, constants, attributes = described(launch)
    assert signature == {
        "x": "*bf16", "y": "constexpr", "even": "i32", "odd": "i32", "one": "constexpr", "large": "i64",
        "least": "i32", "scale": "fp32", "BLOCK": "constexpr", "CAUSAL": "constexpr",
    }  # fmt: skip
    assert constants == {(1,): None, (4,): 1, (8,): 64, (9,): True}
    assert attributes == {(index,): [["tt.divisibility", 16]] for index in (0, 2, 5, 6)}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool])
def test_every_dtype_of_an_operand_has_a_name(dtype: torch.dtype) -> None:
    signature, _, _ = described(_launch(x=torch.empty(1, device=META, dtype=dtype)))
    assert signature["x"].startswith("*")


def test_importing_the_specs_imports_no_triton() -> None:
    """Contracts, references and the tuner; the kernels themselves are imported when one is used."""
    code = (
        "import sys, lrp_compiler, lrp_compiler.kernels.registry, lrp_compiler.kernels.autotune\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'triton']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
