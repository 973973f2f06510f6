"""Draws made a second time from the generator's state: the same bits, and no other generator notices."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lrp_compiler.kernels.randomness import (
    DrawNotRepeatedError,
    bernoulli_again,
    bytes_of_state,
    checksum_of_generator,
    generator_state,
)

CPU = torch.device("cpu")
DRAWN: dict[str, Tensor] = {
    "scalar": torch.ones(()),
    "vector": torch.ones(7),
    "nothing": torch.ones(0, 3),
    "large": torch.ones(3, 333, 17),
    "transposed": torch.ones(65, 33).t(),
    "channels last": torch.ones(2, 5, 7, 3).contiguous(memory_format=torch.channels_last),
    "permuted": torch.ones(9, 4, 11).permute(2, 0, 1),
}


Noted = tuple[Tensor, Tensor]
"""The generator's state in front of a draw, and its checksum behind."""


def noted(draw: Callable[[], Tensor], device: torch.device = CPU) -> tuple[Noted, Tensor]:
    """What is noted of a draw, and the draw."""
    state = generator_state(device)
    drawn = draw()
    return (state, checksum_of_generator(device)), drawn


def again(note: Noted, mask: Tensor, p: float) -> Tensor:
    return bernoulli_again(*note, p, mask.shape, mask.stride(), mask.dtype, mask.device)


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_mask_of_dropout_is_drawn_again(name: str, p: float) -> None:
    """Torch's own dropout, whose mask is what is left of ones, draws as its input lies in memory."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        ones = DRAWN[name].to(dtype)
        torch.rand(5)
        # Where all or nothing is dropped, it draws nothing.
        draw = F.dropout if 0 < p < 1 else lambda ones, p: torch.empty_like(ones).bernoulli_(1 - p)
        note, dropped = noted(lambda ones=ones, draw=draw: draw(ones, p))  # type: ignore[misc]
        expected = dropped != 0
        found = again(note, torch.empty_like(ones), 1 - p)
        assert found.dtype is dtype
        assert found.stride() == ones.stride()
        assert torch.equal(found != 0, expected)


@pytest.mark.parametrize("name", DRAWN)
def test_the_draw_of_the_captured_op_is_repeated(name: str) -> None:
    """The functional op draws row by row, whatever its input looks like."""
    note, mask = noted(lambda: torch.ops.aten.bernoulli.p(DRAWN[name], 0.3))
    found = again(note, mask, 0.3)
    assert found.stride() == mask.stride()
    assert torch.equal(found, mask)


def test_no_generator_is_disturbed() -> None:
    """What is drawn next by torch's own generator is what would have been drawn anyway; a state serves any number."""
    note, mask = noted(lambda: torch.empty(40).bernoulli_(0.3))
    before = torch.get_rng_state()
    kept = note[0].clone()
    found = [again(note, mask, 0.3) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(note[0], kept)
    assert all(torch.equal(one, mask) for one in found)


def test_draws_are_repeated_in_other_threads() -> None:
    drawn = [noted(lambda size=size: torch.empty(size, 31).bernoulli_(0.5)) for size in range(100, 108)]  # type: ignore[misc]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda given: again(*given, 0.5), drawn))
    assert all(torch.equal(one, mask) for one, (_, mask) in zip(found, drawn, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_draw_between_is_noticed() -> None:
    """As another thread may make it, in front of the draw that is to be repeated or behind."""
    state = generator_state(CPU)
    torch.rand(1)
    mask = torch.empty(40).bernoulli_(0.3)
    with pytest.raises(DrawNotRepeatedError):
        again((state, checksum_of_generator(CPU)), mask, 0.3)
    state = generator_state(CPU)
    mask = torch.empty(40).bernoulli_(0.3)
    torch.rand(1)
    with pytest.raises(DrawNotRepeatedError):
        again((state, checksum_of_generator(CPU)), mask, 0.3)


def test_a_state_takes_what_is_said() -> None:
    state = generator_state(CPU)
    assert state.dtype is torch.uint8
    assert state.shape == (bytes_of_state(CPU),) == (5056,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", DRAWN)
def test_the_mask_of_dropout_is_drawn_again_on_cuda(name: str) -> None:
    device = torch.device("cuda")
    ones = DRAWN[name].to(device)
    note, mask = noted(lambda: torch.ops.aten.bernoulli.p(ones, 0.3), device)
    assert note[0].shape == (bytes_of_state(device),) == (16,)
    before = torch.cuda.get_rng_state(device)
    assert torch.equal(again(note, mask, 0.3), mask)
    assert torch.equal(torch.cuda.get_rng_state(device), before)
