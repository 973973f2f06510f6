"""Forward values that are overwritten: those that nothing else reads, keeps or differentiates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import compile_for_lrp
from lrp_compiler.kernels.bits import of_positive, through, through_

aten = torch.ops.aten
Read = Callable[[Tensor], Tensor]
READ: dict[str, tuple[Read, bool]] = {
    "a linear map": (lambda h: torch.relu(h), True),
    "a sum": (lambda h: torch.relu(h + 1), True),
    "a linear map that is read again": (lambda h: torch.relu(h) + h, False),
    "a view of a linear map that is read again": (lambda h: torch.relu(h) + h.transpose(0, 1).sum(1), False),
    "what its own derivative reads": (lambda h: torch.relu(h.tanh()), False),
}
"""What a ReLU reads, and whether it may overwrite it."""


class Reading(nn.Module):
    """An op between two linear maps."""

    def __init__(self, op: Read) -> None:
        super().__init__()
        self.first, self.op, self.second = nn.Linear(5, 6), op, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.op(self.first(x)))


@pytest.mark.parametrize("name", READ)
def test_a_relu_overwrites_what_ends_with_it(name: str) -> None:
    op, overwrites = READ[name]
    model, x = Reading(op), torch.randn(4, 5, requires_grad=True)
    explained = compile_for_lrp(model, "gradient")
    stage = next(stage for stage in explained.stages(x) if stage.name == "share_memory")
    targets = [node.target for node in stage.program.graph.nodes]
    assert (aten.relu_.default in targets) == overwrites
    output, tape = explained.run(x)
    expected = model(x)
    assert torch.equal(output, expected)
    (gradient,) = torch.autograd.grad(expected[:, 1].sum(), x, create_graph=True)
    found = tape.coefficients(1, create_graph=True)
    torch.testing.assert_close(found, gradient)
    weight = model.first.weight
    twice = [torch.autograd.grad(value.square().sum(), weight, retain_graph=True)[0] for value in (found, gradient)]
    torch.testing.assert_close(*twice)
    ours, theirs = (torch.autograd.grad(value.square().sum(), weight)[0] for value in (output, expected))
    torch.testing.assert_close(ours, theirs)


def test_what_another_op_keeps_for_its_derivative_is_not_overwritten() -> None:
    """In bfloat16 gates are made by the forward pass, so that a GELU's argument is not read by relevance."""
    model, x = Reading(lambda h: F.gelu(h) + torch.relu(h)), torch.randn(4, 5, requires_grad=True)
    output, tape = compile_for_lrp(model, "epsilon", relevance_dtype=torch.bfloat16).run(x)
    tape.relevance(1)
    (found,) = torch.autograd.grad(output.square().sum(), x)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    assert torch.equal(found, expected)


def test_gates_that_the_forward_pass_makes_take_one_buffer() -> None:
    model, x = Reading(F.gelu), torch.randn(4, 5, requires_grad=True)
    explained = compile_for_lrp(model, "attnlrp", relevance_dtype=torch.bfloat16)
    stage = next(stage for stage in explained.stages(x) if stage.name == "share_memory")
    made = [node.target for node in stage.program.graph.nodes if node.name.startswith("gelu_")]
    assert made == [aten.mul.Tensor, aten.erfc_.default, aten.mul_.Tensor, aten._to_copy.default]
    output, _ = explained.run(x)
    assert torch.equal(output, model(x))
    ours, theirs = (torch.autograd.grad(value.square().sum(), x)[0] for value in (output, model(x)))
    assert torch.equal(ours, theirs)


def test_a_model_that_computes_in_place_can_be_mapped_over() -> None:
    model, x = Reading(lambda h: torch.sigmoid(h * 0.5)), torch.randn(3, 4, 5)
    explained = compile_for_lrp(model, "epsilon")
    stage = next(stage for stage in explained.stages(x[0]) if stage.name == "share_memory")
    assert aten.mul_.Tensor in {node.target for node in stage.program.graph.nodes}
    torch.testing.assert_close(torch.func.vmap(explained)(x), torch.func.vmap(model)(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_masks_and_winners_are_applied_in_place(layout: torch.memory_format) -> None:
    """With the results of autograd: of one target, of several, and of what is to be differentiated again."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 13 * 13, 3)),
    )
    model, x = model.double().to(memory_format=layout), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    x = x.to(memory_format=layout)
    # Of others, autograd would keep what their layers read, and masks with it.
    weight = model.requires_grad_(False)[0].weight.requires_grad_()
    explained = compile_for_lrp(model, "gradient")
    relevance = next(stage for stage in explained.stages(x) if stage.name == "share_memory").program.relevance_graph
    assert relevance is not None
    targets = [node.target for node in relevance.nodes]
    # What comes from the head lies plainly, the mask in the second layout as the channels do.
    assert targets.count(through_) == (2 if layout is torch.contiguous_format else 1)
    assert targets.count(through_) + targets.count(through) == 2 and of_positive not in targets
    assert aten.scatter_add_.default in targets
    leaf = x.clone().requires_grad_()
    outputs = model(leaf)
    expected = [torch.autograd.grad(outputs[:, target].sum(), leaf, create_graph=True)[0] for target in range(3)]
    for target, gradient in enumerate(expected):
        torch.testing.assert_close(explained.attribute(x, target), gradient)
    _, tape = explained.run(x)
    torch.testing.assert_close(torch.stack(list(tape.relevance_of_each(range(3)))), torch.stack(expected))
    found = explained.run(leaf)[1].coefficients(1, create_graph=True)
    twice = [torch.autograd.grad(value.square().sum(), weight, retain_graph=True)[0] for value in (found, expected[1])]
    torch.testing.assert_close(*twice)
