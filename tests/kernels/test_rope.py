"""rope_bwd where its samples do not go: every configuration, tokens far apart, transpose and inverse of rotation."""

from __future__ import annotations

import pytest
import torch
from configured import assert_accurate_under, far_rows, launched
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrp_compiler.kernels.dialect.rope import ROPE_BWD
from lrp_compiler.kernels.launch import Config


def _angles(tokens: int, turned: int, interleaved: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """As models make them: a pair's columns share their angle."""
    angle = torch.rand(tokens, turned // 2, device=device) * 6
    spread = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
    return spread.cos(), spread.sin()


def _rotated(x: Tensor, interleaved: bool) -> Tensor:
    """As Hugging Face's rotate_half and rotate_every_two."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("chosen", ROPE_BWD.configs, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_configuration(chosen: Config, interleaved: bool, device: torch.device) -> None:
    c = torch.randn(1, 2, 35, 150, device=device)
    cos, sin = torch.randn(2, 35, 130, device=device)
    assert_accurate_under(ROPE_BWD, chosen, (c, cos, sin, interleaved))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 20), st.booleans(), st.integers(0, 2**31))
def test_it_is_the_transpose_and_the_inverse(tokens: int, pairs: int, rest: int, swaps: bool, seed: int) -> None:
    """<rope(x), c> = <x, rope_bwd(c)>, and rotations are orthogonal: rope_bwd(rope(x)) = x."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, c = torch.randn(2, 1, 2, tokens, 2 * pairs + rest, device=device)
    cos, sin = _angles(tokens, 2 * pairs, swaps, device)
    head = x[..., : 2 * pairs]
    y = torch.cat([head * cos + _rotated(head, swaps) * sin, x[..., 2 * pairs :]], -1)
    made = launched(ROPE_BWD, None, (c, cos, sin, swaps))
    assert torch.isclose((y * c).sum(), (x * made).sum(), rtol=1e-4, atol=1e-3)
    assert torch.allclose(launched(ROPE_BWD, None, (y, cos, sin, swaps)), x, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_tokens_far_apart(interleaved: bool, device: torch.device) -> None:
    c = torch.randn(3, 40, dtype=torch.float16, device=device)
    cos, sin = _angles(3, 24, interleaved, device)
    near = launched(ROPE_BWD, None, (c[None, None], cos, sin, interleaved))
    far = launched(ROPE_BWD, None, (far_rows(c)[None, :, None].transpose(1, 2), cos, sin, interleaved))
    assert torch.equal(near, far)


def test_results_lie_as_the_coefficients_do(device: torch.device) -> None:
    """What comes back by token goes into the projection without a copy."""
    cos, sin = _angles(5, 8, False, device)
    by_token = torch.randn(2, 5, 3, 8, device=device).transpose(1, 2)
    for made in (launched(ROPE_BWD, None, (by_token, cos, sin, False)), ROPE_BWD.reference(by_token, cos, sin, False)):
        assert made.transpose(1, 2).is_contiguous()
