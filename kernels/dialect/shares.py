"""What sign-split ops store between their forward product and their transpose, for linear maps of every shape.

``ratio`` and ``aside`` make both right-hand sides (v1, v2) of c_x = W^T v1 + sign(x) |W|^T v2 (kernels/signsplit.py) by
changes of sign and sums alone:

    method      ratio                    aside                     v1                       v2
    z_plus      R / (2 stab(P + b+))     nothing                   ratio                    ratio
    alpha_beta  alpha R / (2 stab(P+b+)) beta R / (2 stab(N + b-)) ratio - aside            ratio + aside
    gamma       R / stab(D)              whether z < 0             (1 + gamma / 2) ratio    sign(z) (gamma / 2) ratio
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lrp_compiler.kernels import signsplit
from lrp_compiler.kernels.spec import Refusal, Supported

METHODS = ("z_plus", "alpha_beta", "gamma")
"""The sign-split rules, as ops of the dialect name them."""

Parameters = tuple[float, float, float]
"""(first, second, epsilon): gamma or alpha, beta, and the stabiliser."""


def widened(value: Tensor) -> Tensor:
    """Numbers of 16 bits in float32; others as they are."""
    return value.float() if value.element_size() == 2 else value


def stored_shares(
    method: str, c: Tensor, z: Tensor, z0: Tensor, u: Tensor, bias: Tensor, parameters: Parameters
) -> tuple[Tensor, Tensor]:
    """(ratio, aside) in the dtype of ``z``; all of one shape, ``aside`` of nothing for z_plus and bool for gamma."""
    first, second, epsilon = parameters
    relevance = z * c
    if method == "gamma":
        return signsplit.gamma_share(relevance, z, z0, u, bias, first, epsilon), z < 0
    positive = signsplit.share(relevance, (u + z0) / 2, u, bias.clamp(min=0), epsilon) / 2
    if method == "z_plus":
        return positive, z.new_empty(0)
    negative = signsplit.share(relevance, (z0 - u) / 2, u, bias.clamp(max=0), epsilon) / 2
    return first * positive, second * negative


def right_hand_sides(method: str, ratio: Tensor, aside: Tensor, first: float) -> tuple[Tensor, Tensor]:
    """(v1, v2) of the shape and dtype of ``ratio``; ``aside`` as ``stored_shares`` gives it."""
    if method == "alpha_beta":
        return ratio - aside, ratio + aside
    if method == "gamma":
        return (1 + first / 2) * ratio, first / 2 * torch.where(aside, -ratio, ratio)
    return ratio, ratio


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in ``dtype``; finite numbers stay finite, since inf - inf would blot out what one ratio reaches."""
    largest = torch.finfo(dtype).max
    return torch.where(value.isfinite(), value.clamp(-largest, largest), value).to(dtype)


def packed(flags: Tensor) -> Tensor:
    """(..., N) bools as (..., ceil(N / 8)) bytes: bit b of byte j is flag 8 j + b, and 0 past the end."""
    padded = F.pad(flags.to(torch.uint8), (0, -flags.shape[-1] % 8))
    grouped = padded.view(*flags.shape[:-1], packed_size(flags.shape[-1]), 8)
    return torch.sum(grouped << torch.arange(8, dtype=torch.uint8, device=flags.device), -1, dtype=torch.uint8)


def unpacked(given: Tensor, size: int) -> Tensor:
    """The (..., size) flags in the (..., ceil(size / 8)) bytes of ``packed``."""
    bits = given.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=given.device) & 1
    return bits.flatten(-2)[..., :size].bool()


def packed_size(size: int) -> int:
    """How many bytes hold ``size`` bits."""
    return -(-size // 8)


def known_method(method: str) -> Supported:
    """The method is one of the sign-split rules."""
    return method in METHODS or Refusal(f"no sign-split rule is called {method!r}; there are {', '.join(METHODS)}")
