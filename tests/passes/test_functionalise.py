"""In-place programs keep their meaning without in-place ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import compile_for_lrp, errors


class Program(nn.Module):
    """A function as a module."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


def chained_views(x: Tensor) -> Tensor:
    y = x * 2
    y.view(6, 4)[1:3].transpose(0, 1)[0].mul_(3).add_(1)
    return y.sum(1)


def view_taken_before_the_write(x: Tensor) -> Tensor:
    y = x.clone()
    row = y[1]
    y.mul_(5)
    return row * y.sum(0)


def write_seen_through_another_view(x: Tensor) -> Tensor:
    y = x.clone()
    columns = y.t()
    y[0] = 7.0
    return columns.permute(1, 0) * y


def masked_and_filled(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, ::2] = 0
    y.masked_fill_(y > 1, 0.5)
    return y.relu_()


def copied_with_broadcast(x: Tensor) -> Tensor:
    y = torch.zeros(4, 6)
    y.copy_(x[0])
    y[:, 1:3].copy_(x[1, :2])
    return y * x


def accumulated(x: Tensor) -> Tensor:
    total = torch.zeros(3, 6)
    total.index_add_(0, torch.tensor([0, 2, 2, 1]), x)
    total.index_put_((torch.tensor([1]),), x[3], accumulate=True)
    return total


def diagonal_written(x: Tensor) -> Tensor:
    y = x[:, :4].clone()
    y.diagonal().zero_()
    return y


def integer_counter(x: Tensor) -> Tensor:
    steps = torch.zeros(4, dtype=torch.long)
    steps += torch.arange(4)
    return x * steps.unsqueeze(1)


def decomposition_that_writes(x: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(x, x.flip(0))


def complex_spectrum_filled(x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x)
    kept = torch.zeros(4, 4, dtype=torch.cfloat)
    kept[:, 1:4:2] = spectrum[:, 1:4:2] * 2j
    kept[-1] = spectrum[0].conj()
    kept[:2].diagonal(0, -1, -2).copy_(spectrum[2, :2])
    kept[:, -1:].mul_(1 + 1j)
    kept.t()[0, 1:] = x[:3, 0]
    return torch.fft.irfft(kept, n=6)


def written_as_pairs(x: Tensor) -> Tensor:
    z = torch.view_as_complex(x.clone().view(4, 3, 2))
    torch.view_as_real(z)[..., 1].mul_(3)
    pairs = x.clone().view(4, 3, 2)
    torch.view_as_complex(pairs)[1:3] *= 2 + 1j
    return torch.view_as_real(z * z.conj() + z).flatten(1) + pairs.flatten(1)


def reshaped_in_place(x: Tensor) -> Tensor:
    y = x * 2
    y.t_()
    y.unsqueeze_(0).squeeze_()
    return y.transpose_(0, 1).sum(1) * x[:, 0]


PROGRAMS = [
    complex_spectrum_filled,
    written_as_pairs,
    reshaped_in_place,
    decomposition_that_writes,
    chained_views,
    view_taken_before_the_write,
    write_seen_through_another_view,
    masked_and_filled,
    copied_with_broadcast,
    accumulated,
    diagonal_written,
    integer_counter,
]


@pytest.mark.parametrize("fn", PROGRAMS, ids=lambda fn: fn.__name__)
def test_in_place_programs_compute_the_same(fn: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 6)
    explained = compile_for_lrp(Program(fn), "gradient")
    expected = fn(x)
    assert torch.equal(explained(x), expected)
    leaf = x.clone().requires_grad_()
    seed = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(fn(leaf), leaf, seed)
    _, tape = explained.run(x)
    torch.testing.assert_close(tape.relevance(seed), gradient)


def overwritten(x: Tensor) -> Tensor:
    kept = torch.zeros(2, 3, 4)
    kept[:, :3] = x.transpose(1, 2)
    return kept


def test_what_is_overwritten_keeps_its_strides() -> None:
    """Kernels that read it may round differently on others."""
    x = torch.randn(2, 4, 3)
    ours, theirs = compile_for_lrp(Program(overwritten))(x), overwritten(x)
    assert torch.equal(ours, theirs) and ours.stride() == theirs.stride() == (12, 4, 1)


def test_tensors_made_of_numbers_are_not_written_back() -> None:
    """A write to what autograd saved would refuse the derivative of relevance."""
    model = Program(lambda x: F.prelu(x, torch.tensor([0.3])))
    x = torch.randn(4, 6, requires_grad=True)
    _, tape = compile_for_lrp(model, "deep_lift").run(x)
    assert tape.program.mutations == ()
    relevance = tape.relevance(1, create_graph=True)
    (found,) = torch.autograd.grad(relevance.sum(), x)
    # From a baseline of zero relevance is the output itself.
    (expected,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    torch.testing.assert_close(found, expected)


def test_a_write_after_reshaping_in_place_is_refused() -> None:
    def written_late(x: Tensor) -> Tensor:
        y = x.clone()
        y.t_()
        return y.mul_(2)

    with pytest.raises(errors.UnsupportedMutationError, match="after its shape was changed in place"):
        compile_for_lrp(Program(written_late))(torch.randn(4, 6))


def test_an_input_reshaped_in_place_is_refused() -> None:
    with pytest.raises(errors.UnsupportedMutationError, match="the shape of an input"):
        compile_for_lrp(Program(lambda x: x.t_() * 2))(torch.randn(4, 6))


def test_a_write_that_cannot_be_followed_is_refused() -> None:
    def piecewise(x: Tensor) -> Tensor:
        y = x.clone()
        y.unbind(0)[0].mul_(2)
        return y

    with pytest.raises(errors.UnsupportedMutationError, match="one piece of unbind") as caught:
        compile_for_lrp(Program(piecewise))(torch.randn(4, 6))
    assert "x.mul(" in str(caught.value) and "test_functionalise.py" in str(caught.value)


def test_one_value_may_be_written_more_often_than_python_recurses() -> None:
    def accumulated(x: Tensor) -> Tensor:
        y = x.clone()
        for _ in range(1100):
            y += 0.5
        return y * x

    x = torch.randn(2, 3)
    torch.testing.assert_close(compile_for_lrp(Program(accumulated), "gradient")(x), accumulated(x), rtol=0, atol=0)
