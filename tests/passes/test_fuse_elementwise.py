"""fuse_elementwise: which pointwise ops make a chain, and the program that is written of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lrp_compiler import LRPModule, compile_for_lrp

pytestmark = pytest.mark.usefixtures("interpreted")


class Gates(nn.Module):
    """A mish between two linear maps: its gate has no op of its own, but a chain of them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7, dtype=dtype), nn.Linear(7, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(nn.functional.gelu(self.first(x)))
        return made


class Wide(nn.Module):
    """A product of ten values that depend on the input: the edge of each reads the nine others."""

    def forward(self, x: Tensor, factors: Tensor) -> Tensor:
        made = x
        for index in range(10):
            made = made * torch.sigmoid(factors[index])
        return made


def programs(explained: LRPModule, *inputs: Tensor) -> list[tuple[int, str]]:
    """The pointwise programs of the relevance graph, with the number of their inputs."""
    graph = explained.stages(*inputs)[-1].program.relevance_graph
    assert graph is not None
    calls = [node for node in graph.nodes if str(node.target) == "lrp.elementwise_chain.default"]
    return [(len(node.args[0]), str(node.args[1])) for node in calls]


def test_a_gate_is_one_program() -> None:
    """c Phi(x) with Phi(x) = erfc(-x / sqrt 2) / 2, over (c, x) in the order in which they are read."""
    explained = compile_for_lrp(Gates(), "attnlrp", backend="triton")
    ((inputs, text),) = programs(explained, torch.randn(2, 5))
    assert inputs == 2
    assert text.splitlines() == [
        "mul 0 -0.7071067811865476",
        "erfc 2",
        "mul 3 0.5",
        "mul 1 4",
        "out 5 fp32",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_have_the_dtype_of_the_chain(dtype: torch.dtype) -> None:
    model, x = Gates(dtype), torch.randn(2, 5, dtype=dtype)
    explained = compile_for_lrp(model, "attnlrp", backend="triton")
    ((_, text),) = programs(explained, x)
    assert text.endswith({torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype])
    found = explained.attribute(x, target=1)
    exact = compile_for_lrp(model.double(), "attnlrp", backend="eager").attribute(x.double(), target=1)
    eager = compile_for_lrp(model.to(dtype), "attnlrp", backend="eager").attribute(x, target=1)
    assert found.dtype == dtype
    # Both round to the dtype between products; the chain itself rounds once.
    assert (found.double() - exact).norm() <= 2 * (eager.double() - exact).norm()


def test_without_kernels_no_chain_is_made() -> None:
    explained = compile_for_lrp(Gates(), "attnlrp", backend="eager")
    assert programs(explained, torch.randn(2, 5)) == []


def test_values_that_are_kept_are_read_and_not_computed_in_a_chain() -> None:
    """A chain stops at what the plan of memory says is kept or computed again under its own name."""
    explained = compile_for_lrp(Gates(), "attnlrp", backend="triton", memory_budget=0.0)
    program = explained.stages(torch.randn(2, 5))[-1].program
    assert program.relevance_graph is not None
    names = {node.name for node in program.relevance_graph.nodes}
    assert {buffer.holder for buffer in program.buffers if buffer.holder} <= names


def test_every_result_is_what_the_ops_give() -> None:
    """A product of many values: chains of several lengths, some too wide to be one."""
    x, factors = torch.randn(3, 4), torch.randn(10, 3, 4)
    fused, eager = (compile_for_lrp(Wide(), "attnlrp", backend=backend) for backend in ("triton", "eager"))
    assert programs(fused, x, factors)
    for found, expected in zip(*(one.attribute((x, factors), target=2) for one in (fused, eager)), strict=True):
        torch.testing.assert_close(found, expected)
