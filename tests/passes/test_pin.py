"""Sizes and places read out of integer inputs are part of the code, and never outlive the values they came from."""

from __future__ import annotations

from collections.abc import Callable

import gallery
import gallery_vision
import pytest
import torch
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp, errors


class Program(nn.Module):
    """A function of floats and integers as a module, with a buffer that counts."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6))
        self.count: Tensor
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        return self.fn(self, x, n)


def prefix(model: Program, x: Tensor, n: Tensor) -> Tensor:
    return (x * model.weight)[:, : n[0].item()].sum(1)


def largest(model: Program, x: Tensor, n: Tensor) -> Tensor:
    return (x * model.weight)[:, : n.max().item()].mean(1)


def place(model: Program, x: Tensor, n: Tensor) -> Tensor:
    return x[:, n[0].item()] * model.weight[n[1].item()]


def pieces(model: Program, x: Tensor, n: Tensor) -> Tensor:
    first, second = x.split(n.tolist(), 1)
    return first.sum(1) - 2 * second.sum(1)


def resized(model: Program, x: Tensor, n: Tensor) -> Tensor:
    small = nn.functional.interpolate(x[:, None], size=n[0].item() + 1, mode="linear")
    return (small[:, 0] * model.weight[: n[0].item() + 1]).sum(1)


def written(model: Program, x: Tensor, n: Tensor) -> Tensor:
    """NaFlex's way: an empty tensor filled up to a size and beyond it."""
    y = torch.empty(2, 6)
    y[:, : n[0].item()] = x[:, : n[0].item()]
    y[:, n[0].item() :] = 0.5
    return (y * model.weight).sum(1)


def counted(model: Program, x: Tensor, n: Tensor) -> Tensor:
    return (x * model.weight * torch.arange(n[0].item(), n[0].item() + 6)).sum(1)


PROGRAMS = (prefix, largest, place, pieces, resized, written, counted)
X = torch.linspace(-2, 2, 12).reshape(2, 6)
FIRST, SECOND = torch.tensor([2, 4]), torch.tensor([5, 1])


def gradient_times_input(model: nn.Module, x: Tensor, n: Tensor) -> Tensor:
    """What LRP-0 is for a model that is linear in x."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, n).sum(), x)
    return (x * gradient).detach()


@pytest.mark.parametrize("fn", PROGRAMS)
def test_other_values_are_never_answered_with_old_code(fn: Callable[..., Tensor]) -> None:
    model = Program(fn)
    explained = compile_for_lrp(model, "epsilon")
    for n in (FIRST, SECOND, FIRST, SECOND.clone(), torch.tensor([3, 3])):
        with torch.no_grad():
            assert torch.equal(explained(X, n), model(X, n))
        _, tape = explained.run(X, n)
        torch.testing.assert_close(tape.relevance(), gradient_times_input(model, X, n))
        assert explained.report(X, n).specialised == ("n",)
    before = explained.compiler.call(model, (X, FIRST), {})
    assert explained.compiler.call(model, (X, FIRST.clone()), {}) is before
    assert explained.compiler.call(model, (X, SECOND), {}) is not before


def test_a_tape_keeps_the_code_of_its_own_values() -> None:
    model = Program(prefix)
    explained = compile_for_lrp(model, "epsilon")
    _, first = explained.run(X, FIRST)
    _, second = explained.run(X, SECOND)
    for tape, n in ((first, FIRST), (second, SECOND)):
        torch.testing.assert_close(tape.relevance(), gradient_times_input(model, X, n))


def test_a_size_from_a_buffer_follows_the_buffer() -> None:
    model = Program(lambda self, x, n: x[:, : self.count.item()].sum(1))
    explained = compile_for_lrp(model, "epsilon")
    for count in (3, 5, 3):
        model.count.fill_(count)
        assert torch.equal(explained(X, FIRST), X[:, :count].sum(1))


def test_numbers_that_are_returned_are_those_of_the_call() -> None:
    model = Program(lambda self, x, n: (x[:, : n[0].item()].sum(1), n[0].item() + 1))  # type: ignore[arg-type]
    explained = compile_for_lrp(model, "epsilon")
    for n in (FIRST, SECOND, FIRST):
        (ours, number), (theirs, expected) = explained(X, n), model(X, n)
        assert torch.equal(ours, theirs) and number == expected


def test_values_that_do_not_fit_are_refused_with_their_line() -> None:
    explained = compile_for_lrp(Program(pieces))
    with pytest.raises(errors.CaptureError, match="split_sizes to sum exactly to 6"):
        explained(X, torch.tensor([2, 3]))


def test_values_that_shape_nothing_are_not_pinned() -> None:
    """Positions that index by tensor are data: one graph serves all."""
    model = Program(lambda self, x, n: x[torch.arange(2), n])
    explained = compile_for_lrp(model, "epsilon")
    assert explained.report(X, FIRST).specialised == ()
    for n in (FIRST, SECOND):
        assert torch.equal(explained(X, n), X[torch.arange(2), n])
    assert explained.compiler.call(model, (X, FIRST), {}) is explained.compiler.call(model, (X, SECOND), {})


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "float": (lambda self, x, n: x[:, : x.sum().long().clamp(1, 5).item()], "it depends on the floats of 'x'"),
    "in place": (lambda self, x, n: x[:, : n.clone().add_(1)[0].item()], "changed in place"),
    "random": (lambda self, x, n: x[:, : torch.randint(1, 5, ()).item()], "it is random"),
    "condition": (lambda self, x, n: x[x > 0], "aten::"),
    "repeats": (lambda self, x, n: x[0, :2].repeat_interleave(n), "aten::repeat_interleave"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_shapes_that_depend_on_data_are_refused_with_their_line(name: str) -> None:
    fn, cause = REFUSED[name]
    with pytest.raises(errors.DataDependentError) as caught:
        compile_for_lrp(Program(fn)).run(X, FIRST)
    assert cause in str(caught.value) and "test_pin.py" in str(caught.value)


def test_a_reference_run_cannot_change_what_the_code_holds() -> None:
    explained = compile_for_lrp(Program(prefix), "deep_lift")
    explained.run(X, FIRST, baselines={"x": 0.0, "n": FIRST})
    with pytest.raises(errors.BaselineError, match="have to be the same in both runs"):
        explained.run(X, FIRST, baselines={"x": 0.0, "n": SECOND})


def test_image_sizes_of_a_batch_are_part_of_the_code() -> None:
    """Patch grids of 2 x 4 and 4 x 2 have the same shapes everywhere, and other position embeddings."""
    call = gallery.made(gallery_vision.ENTRIES["naflex"])
    explained = compile_for_lrp(call.model, "attnlrp")
    shapes = (call.kwargs["spatial_shapes"], torch.tensor([[4, 2], [3, 2]]))
    outputs = []
    for spatial_shapes in (*shapes, *shapes):
        call.kwargs["spatial_shapes"] = spatial_shapes
        with torch.no_grad():
            ours, theirs = explained(**call.kwargs).pooler_output, call().pooler_output
        assert torch.equal(ours, theirs)
        outputs.append(ours)
    assert not torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
