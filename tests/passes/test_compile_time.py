"""Every pass does work in proportion to the network: counted in lines run, which no other process disturbs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrp_compiler.composites import composite_named
from lrp_compiler.passes.codegen import codegen
from lrp_compiler.passes.insert_relevance import insert_relevance
from lrp_compiler.passes.pin import pin
from lrp_compiler.passes.pipeline import CAPTURE, EMIT, EXPLAIN, Stage, run
from lrp_compiler.passes.request import Request
from lrp_compiler.passes.specialise import specialise

COUNTED = ("passes/", "torch/fx/")
LINEAR = 1.01
"""How far twice the growth may miss twice the work, to the line; one walk over the graph per opened op is 1.07."""


class Residual(nn.Module):
    """A norm, a gated pair of linear layers, attention that is opened, and a sum written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.wide(self.norm(x)).chunk(2, -1)
        mixed = nn.functional.scaled_dot_product_attention(value, value, value, dropout_p=0.0)
        x += self.narrow(nn.functional.silu(gate) * mixed)
        return x


class Chain(nn.Module):
    """Residual blocks one behind the other."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.blocks:
            x = block(x)
        return x


@contextmanager
def counting(lines: dict[str, int], name: str) -> Iterator[None]:
    """Count, under ``name``, the lines of the compiler and of torch.fx that run inside."""

    def local(frame: Any, event: str, arg: Any) -> Any:
        lines[name] = lines.get(name, 0) + (event == "line")
        return local

    def on_call(frame: Any, event: str, arg: Any) -> Any:
        return local if any(part in frame.f_code.co_filename for part in COUNTED) else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)


def work(blocks: int, composite: str) -> dict[str, int]:
    """Lines run per pass; capture itself is torch.export's."""
    lines: dict[str, int] = {}
    call = (Chain(blocks).eval(), (torch.randn(1, 3, 4),), {})
    history: tuple[Stage, ...] = run(CAPTURE[0], (), *call)
    settings: dict[Callable[..., Any], tuple[Any, ...]] = {EXPLAIN[1]: (composite_named(composite),), pin: call}
    for one in (*CAPTURE[1:], *EXPLAIN, *EMIT):
        if one in (specialise, insert_relevance):
            sources = history[-1].program.sources.values()
            settings[one] = (Request((0,), tuple((node, "relevance") for nodes in sources for node in nodes)),)
        with counting(lines, one.__name__):
            history = run(one, history, *settings.get(one, ()))
    with counting(lines, "codegen"):
        codegen(history[-1].program)
    return lines


@pytest.mark.thorough
@pytest.mark.parametrize("composite", ["attnlrp", pytest.param("deep_lift", marks=pytest.mark.slow)])
def test_every_pass_is_linear_in_the_size_of_the_network(composite: str) -> None:
    work(1, composite)
    small, middle, large = (work(blocks, composite) for blocks in (4, 8, 16))
    for name in large:
        growth = (large[name] - middle[name], middle[name] - small[name])
        assert growth[0] <= 2 * LINEAR * growth[1], (name, small[name], middle[name], large[name])
