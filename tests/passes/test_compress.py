"""Small forms of what relevance reads: which values get one, and that either form gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from whole import Whole

from lrp_compiler import compile_for_lrp
from lrp_compiler.kernels import bits, pooling
from lrp_compiler.passes.compress import SHAPE_ONLY
from lrp_compiler.passes.deferral import REPLAY, either
from lrp_compiler.passes.optable import schema_name
from lrp_compiler.passes.pipeline import Stage
from lrp_compiler.passes.program import Program, facts, graph_inputs, value_of
from lrp_compiler.passes.sizes import Sizes

aten = torch.ops.aten
MASK, POSITIVE, NOT_ZERO = bits.pack_bits, bits.is_positive, bits.is_not_zero
SIGN, WINNERS = bits.pack_sign, pooling.window_offsets
PACKERS = (MASK, POSITIVE, NOT_ZERO, SIGN, WINNERS)
Op = Callable[[Tensor], Tensor]
FORMS: dict[str, tuple[Op, str, list[Any]]] = {
    "relu": (F.relu, "attnlrp", [NOT_ZERO, MASK]),
    "two relus": (lambda h: F.relu(F.relu(h) - 1), "attnlrp", [NOT_ZERO, NOT_ZERO, MASK, MASK]),
    "relu of what relevance reads": (lambda h: F.relu(h).exp(), "gradient", [NOT_ZERO, MASK]),
    "guided": (F.relu, "guided_backprop", [MASK]),
    "leaky_relu": (lambda h: F.leaky_relu(h, 0.2), "attnlrp", [MASK]),
    "relu6": (F.relu6, "gradient", []),
    "abs": (torch.abs, "attnlrp", [SIGN]),
    "where": (lambda h: torch.where((h > 0) & (h < 1), h, h.flip(-1)), "attnlrp", [MASK]),
    "max_pool1d": (lambda h: F.max_pool1d(h, 3, 2, 1), "attnlrp", [WINNERS]),
    "max_pool2d": (lambda h: F.max_pool2d(h, (2, 3), dilation=(1, 2)), "attnlrp", [WINNERS]),
    "max_pool3d": (lambda h: F.max_pool3d(h.unflatten(1, (1, 3, 3)), 2, 1), "gradient", [WINNERS]),
    "max_pool2d of large windows": (lambda h: F.max_pool2d(h.repeat(1, 1, 4), (3, 100)), "attnlrp", []),
    "tanh": (torch.tanh, "attnlrp", [MASK]),
    "mean": (lambda h: h.mean(-1), "attnlrp", []),
}
"""An op between two linear maps, a composite, and the functions that make the small forms of what relevance reads."""


class Between(nn.Module):
    """An op between two linear maps."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.first, self.op, self.weight = nn.Linear(30, 30), op, nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.first(x)).flatten(1).sum(1, keepdim=True) * self.weight


def stages(model: nn.Module, composite: str, x: Tensor) -> tuple[dict[str, Stage], list[Any]]:
    """The stages of a call by name, and its graph inputs."""
    explained = compile_for_lrp(model, composite)
    found = {stage.name: stage for stage in explained.stages(x)}
    return found, graph_inputs(found["compress"].program, model, (x,), {})


def evaluated(program: Program, inputs: list[Any], seed: Tensor) -> dict[fx.Node, Any]:
    """The value of every node of a joint graph, the same random numbers drawn every time."""
    torch.manual_seed(5)
    named = dict(zip((spec.node for spec in program.inputs), inputs, strict=True))
    with torch.no_grad():
        return Whole(program, Sizes()).values(named, (seed,))


@pytest.mark.parametrize("name", FORMS)
def test_what_is_read_has_the_small_form_it_can_have(name: str) -> None:
    """And both forms are equal, bit by bit, where relevance reads them."""
    op, composite, expected = FORMS[name]
    x = torch.randn(2, 9, 30)
    found, inputs = stages(Between(op).eval(), composite, x)
    program = found["compress"].program
    packings = [node.target for node in program.graph.nodes if node.target in PACKERS]
    assert sorted(packings, key=str) == sorted(expected, key=str)
    forms = [node for node in program.graph.nodes if node.target is either]
    assert len(forms) == len(expected)
    values = evaluated(program, inputs, torch.randn(2, 3))
    for node in forms:
        direct, unpacked = (values[form] for form in node.args)
        if node.args[1].target is bits.of_positive:
            # What threshold_backward asks of it.
            direct, unpacked = ~(direct <= 0), ~(unpacked <= 0)
        assert direct.dtype == unpacked.dtype
        assert torch.equal(direct, unpacked)
        packed, fake = values[node.args[1].args[0]], value_of(node.args[1].args[0])
        assert (packed.shape, packed.dtype) == (fake.shape, fake.dtype)


def test_a_value_read_by_two_has_one_small_form() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(30, 30), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            mask = h > 0
            h = torch.where(mask, h, 2 * h) + h.masked_fill(mask, 0.0)
            return h.sum((1, 2)).unsqueeze(1) * self.weight

    found, _ = stages(Twice(), "attnlrp", torch.randn(2, 9, 30))
    graph = found["compress"].program.graph
    assert [node.target for node in graph.nodes if node.target in PACKERS] == [MASK]


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_a_draw_can_be_made_a_second_time(p: float) -> None:
    model = Between(lambda h: F.dropout(F.dropout(h, p), 0.1)).train()
    found, inputs = stages(model, "attnlrp", torch.randn(2, 9, 30))
    program = found["compress"].program
    values = evaluated(program, inputs, torch.randn(2, 3))
    draws = [node for node in values if REPLAY in node.meta]
    assert [node.target for node in draws] == [aten.bernoulli.p] * 2
    nodes = program.nodes_by_name()
    for node in draws:
        function, names, arguments = node.meta[REPLAY]
        assert torch.equal(function(*(values[nodes[name]] for name in names), *arguments), values[node])


X = torch.randn(2, 3, 6, 7)
X3 = torch.randn(2, 3, 4, 6, 5)
POOLED, POOLED3 = F.max_pool2d(X, 2, return_indices=True), F.max_pool3d(X3, 2, return_indices=True)
READS_A_SHAPE: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "zeros_like": (lambda x: aten.zeros_like(x), X),
    "ones_like": (lambda x: aten.ones_like(x), X),
    "empty_like": (lambda x: aten.empty_like(x).zero_(), X),
    "full_like": (lambda x: aten.full_like(x, 3.0), X),
    "new_zeros": (lambda x: aten.new_zeros(x, [2, 4]), X),
    "new_ones": (lambda x: aten.new_ones(x, [2, 4]), X),
    "new_empty": (lambda x: aten.new_empty(x, [2, 4]).zero_(), X),
    "new_full": (lambda x: aten.new_full(x, [2, 4], 3.0), X),
    "avg_pool2d_backward": (
        lambda x: aten.avg_pool2d_backward(torch.ones(2, 3, 3, 4), x, [2, 2], [2, 2], [0, 1], False, False, None),
        X,
    ),
    "avg_pool3d_backward": (
        lambda x: aten.avg_pool3d_backward(torch.ones(2, 3, 2, 3, 2), x, [2] * 3, [2] * 3, [0] * 3, False, True, None),
        X3,
    ),
    "_adaptive_avg_pool2d_backward": (lambda x: aten._adaptive_avg_pool2d_backward(torch.ones(2, 3, 4, 5), x), X),
    "_adaptive_avg_pool3d_backward": (lambda x: aten._adaptive_avg_pool3d_backward(torch.ones(2, 3, 2, 4, 3), x), X3),
    "reflection_pad1d_backward": (lambda x: aten.reflection_pad1d_backward(torch.ones(2, 6, 9), x, [1, 1]), X[:, 0]),
    "reflection_pad2d_backward": (lambda x: aten.reflection_pad2d_backward(torch.ones(2, 3, 8, 9), x, [1] * 4), X),
    "reflection_pad3d_backward": (lambda x: aten.reflection_pad3d_backward(torch.ones(2, 3, 6, 8, 7), x, [1] * 6), X3),
    "replication_pad1d_backward": (lambda x: aten.replication_pad1d_backward(torch.ones(2, 6, 9), x, [1, 1]), X[:, 0]),
    "replication_pad2d_backward": (lambda x: aten.replication_pad2d_backward(torch.ones(2, 3, 8, 9), x, [1] * 4), X),
    "replication_pad3d_backward": (
        lambda x: aten.replication_pad3d_backward(torch.ones(2, 3, 6, 8, 7), x, [1] * 6),
        X3,
    ),
    "max_pool2d_with_indices_backward": (
        lambda x: aten.max_pool2d_with_indices_backward(
            torch.ones_like(POOLED[0]), x, [2, 2], [2, 2], [0, 0], [1, 1], False, POOLED[1]
        ),
        X,
    ),
    "max_pool3d_with_indices_backward": (
        lambda x: aten.max_pool3d_with_indices_backward(
            torch.ones_like(POOLED3[0]), x, [2] * 3, [2] * 3, [0] * 3, [1] * 3, False, POOLED3[1]
        ),
        X3,
    ),
}
"""Every op of the table, as a function of the argument that it is said to read no value of."""


def test_every_op_that_reads_a_shape_is_tried() -> None:
    assert {f"aten::{name}" for name in READS_A_SHAPE} == set(SHAPE_ONLY)


@pytest.mark.parametrize("name", READS_A_SHAPE)
def test_an_expanded_zero_does_where_no_value_is_read(name: str) -> None:
    op, x = READS_A_SHAPE[name]
    expected = op(x)
    for found in (op(torch.zeros([]).expand(x.shape)), op(torch.full_like(x, torch.nan))):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_backward_of_a_convolution_reads_no_input(dims: int, transposed: bool) -> None:
    shape = (7, 6, 5)[:dims]
    x, weight = torch.randn(2, 4, *shape), torch.randn(4, 4, *([3] * dims))
    options: tuple[Any, ...] = (None, [2] * dims, [1] * dims, [1] * dims, transposed, [0] * dims, 1)
    y = aten.convolution(x, weight, *options)
    c = torch.randn_like(y)
    expected = aten.convolution_backward(c, x, weight, *options, [True, False, False])[0]
    zero = torch.zeros([]).expand(x.shape)
    assert torch.equal(aten.convolution_backward(c, zero, weight, *options, [True, False, False])[0], expected)


@pytest.mark.parametrize(
    ("composite", "backward"), [("gradient", "reflection_pad1d_backward"), ("epsilon_plus", "convolution_backward")]
)
def test_arguments_read_for_their_shape_are_no_forward_values(composite: str, backward: str) -> None:
    """Of a network of such ops none reads what the forward pass made."""

    class Shapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.weight = nn.Conv1d(4, 4, 3), nn.Conv2d(1, 4, 3), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            h = F.pad(F.avg_pool1d(self.first(x), 2), (1, 1), "reflect").unsqueeze(1)
            h = F.adaptive_avg_pool2d(F.avg_pool2d(self.second(h), 2, 1), 3) + torch.zeros_like(h[..., :3, :3])
            return h.flatten(1).sum(1, keepdim=True) * self.weight

    found, _ = stages(Shapes(), composite, torch.randn(2, 4, 30))
    reading = [node for node in found["compress"].program.graph.nodes if facts(node).part == "relevance"]
    seen = set()
    for node in reading:
        place = SHAPE_ONLY.get(schema_name(node.target), (1,) if "convolution_backward" in str(node.target) else ())
        for operand in (node.args[at] for at in place):
            seen.add(schema_name(node.target))
            assert facts(operand).part != "promise"
    assert {"aten::avg_pool2d_backward", f"aten::{backward}"} <= seen
