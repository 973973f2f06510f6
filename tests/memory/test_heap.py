"""Memory that a call frees serves the next one, so that the system need not map it again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CALLS = """
import resource, torch
from torch import nn
from lrp_compiler import compile_for_lrp

torch.set_num_threads(1)
layers = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(8)]
model = nn.Sequential(*(layer for made in layers for layer in (made, nn.GELU()))).requires_grad_(False)
x = torch.randn(1, 8, 256, 256)
{module}
for _ in range(3):
    call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    call()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)
"""
OURS = "call = lambda m=compile_for_lrp(model, 'epsilon'): m.attribute(x, torch.ones(1, 8, 256, 256))"
PLAIN = "call = lambda: torch.autograd.grad(model(x.requires_grad_()).sum(), x)"


def page_faults(module: str) -> int:
    """Pages that the system maps per call, in a process of its own."""
    code = CALLS.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap of another C library is not affected")
def test_calls_reuse_what_earlier_ones_freed() -> None:
    activation = 8 * 256 * 256 * 4 // 4096
    assert page_faults(OURS) < activation
    # Otherwise this test could not fail.
    assert page_faults(PLAIN) > activation
