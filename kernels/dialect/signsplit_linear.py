"""signsplit_linear_fwd, signsplit_linear_bwd: z+, alpha-beta and gamma through linear layers of signed inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lrp_compiler.kernels.dialect.layers import LAYERS, columns_first, fits_linear, linear_operands
from lrp_compiler.kernels.dialect.shares import (
    METHODS,
    known_method,
    packed,
    packed_size,
    right_hand_sides,
    rounded,
    stored_shares,
    unpacked,
    widened,
)
from lrp_compiler.kernels.spec import (
    KernelSpec,
    Refusal,
    Sample,
    Supported,
    all_supported,
    contiguous_like,
    known_dtypes,
    same_device,
)

SOURCE = "Montavon et al. 2019, gamma; Bach et al. 2015, eq. 60, alpha-beta; RULES.md 3"
PARAMETERS = {"z_plus": (0.0, 0.0), "alpha_beta": (2.0, 1.0), "gamma": (0.25, 0.0)}
"""What samples and workloads give each method."""


def signsplit_linear_fwd(
    c: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    method: str,
    first: float,
    second: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """(ratio, aside) of z = W x + b under a sign-split rule, from z0 = W x and u = |W| |x| in float32.

    ``c`` (..., N), ``x`` (..., K), ``weight`` (N, K), ``bias`` (N,) have one dtype; ``z`` (..., N) is the model's own
    output where that is in float32. ``method`` is z_plus, alpha_beta (``first`` alpha, ``second`` beta) or gamma
    (``first`` gamma). dialect/shares.py says what the results hold: ``ratio`` is of the shape and dtype of ``c``;
    ``aside`` is empty, another ``ratio``, or (..., ceil(N / 8)) bytes, whose bit n % 8 of byte n // 8 is z_n < 0.
    """
    wide, w = widened(x), widened(weight)
    z0, u = F.linear(wide, w), F.linear(wide.abs(), w.abs())
    added = w.new_zeros(()) if bias is None else widened(bias)
    z, z0 = (z0 + added, z0) if z is None else (z, z - added)
    ratio, aside = stored_shares(method, widened(c), z, z0, u, added, (first, second, epsilon))
    kept = packed(aside) if method == "gamma" else rounded(aside, c.dtype)
    return rounded(ratio, c.dtype).contiguous(), kept.contiguous()


def signsplit_linear_bwd(
    ratio: Tensor,
    aside: Tensor,
    x: Tensor,
    weight: Tensor,
    method: str,
    first: float,
    second: float,
    as_relevance: bool,
) -> Tensor:
    """c_x = W^T v1 + sign(x) |W|^T v2 (times x ``as_relevance``) in float32, of the shape and dtype of ``x``.

    ``ratio`` and ``aside`` are the results of ``signsplit_linear_fwd``, which say what (v1, v2) are; of the parameters
    only gamma is read, ``first``.
    """
    wide, w = widened(x), widened(weight)
    kept = unpacked(aside, ratio.shape[-1]) if method == "gamma" else widened(aside)
    v1, v2 = right_hand_sides(method, widened(ratio), kept, first)
    made = v1 @ w + torch.sign(wide) * (v2 @ w.abs())
    return (made * wide if as_relevance else made).to(x.dtype).contiguous()


def empty_aside(c: Tensor, method: str) -> Tensor:
    """What ``aside`` is for coefficients ``c``, unwritten."""
    if method == "gamma":
        return c.new_empty((*c.shape[:-1], packed_size(c.shape[-1])), dtype=torch.uint8)
    return contiguous_like(c) if method == "alpha_beta" else c.new_empty(0)


def _fake_fwd(
    c: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, method: str, *parameters: float
) -> tuple[Tensor, Tensor]:
    return contiguous_like(c), empty_aside(c, method)


def _fake_bwd(ratio: Tensor, aside: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return contiguous_like(x)


def _supports_fwd(
    c: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    method: str,
    first: float,
    second: float,
    epsilon: float,
) -> Supported:
    bias_fits = bias is None or bias.shape == weight.shape[:1]
    return all_supported(
        (
            same_device(c, x, weight, bias, z),
            known_dtypes(c, x, weight, bias),
            known_method(method),
            fits_linear(c, x, weight),
            bias_fits or Refusal("its bias does not have one element per output"),
            z is None or z.shape == c.shape or Refusal("its output and coefficient differ in shape"),
            z is None or z.dtype == torch.float32 or Refusal(f"its output was rounded to {z.dtype}"),
        )
    )


def _supports_bwd(
    ratio: Tensor,
    aside: Tensor,
    x: Tensor,
    weight: Tensor,
    method: str,
    first: float,
    second: float,
    as_relevance: bool,
) -> Supported:
    known = all_supported(
        (
            same_device(ratio, aside, x, weight),
            known_dtypes(ratio, x, weight),
            known_method(method),
            fits_linear(ratio, x, weight),
        )
    )
    if not known:
        return known
    wanted = empty_aside(ratio.to("meta"), method)
    fits = (aside.shape, aside.dtype) == (wanted.shape, wanted.dtype)
    return fits or Refusal(f"{method} stores {tuple(wanted.shape)} of {wanted.dtype} beside the ratio")


def _rule(method: str) -> tuple[str, float, float, float]:
    return method, *PARAMETERS[method], 1e-6


def _samples_fwd(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for method in METHODS:
        rule = _rule(method)
        c, x, weight, bias = linear_operands(dtype, device, (3, 11), 70, 35)
        yield Sample(f"{method} 3x11x70->35", (c, x, weight, bias, None, *rule))
        c, x, weight, bias = linear_operands(dtype, device, (2, 3), 40, 17)
        z = F.linear(x.float(), weight.float(), bias.float())
        yield Sample(f"{method} with its output", (c, x, weight, bias, z, *rule))
        transposed = map(columns_first, linear_operands(dtype, device, (9,), 34, 37))
        yield Sample(f"{method} transposed", (*transposed, None, *rule))
    yield from _special_fwd(dtype, device)


def _special_fwd(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    c, x, weight, bias = linear_operands(dtype, device, (5,), 34, 68)
    for method in METHODS:
        rule = _rule(method)
        yield Sample(f"{method} every second output", (c[:, ::2], x, weight[::2], bias[::2], None, *rule))
        yield Sample(f"{method} no bias, one sign", (c, x.abs(), -weight.abs(), None, None, *rule))
        yield Sample(f"{method} no inputs", (c, x[:, :0], weight[:, :0], bias, None, *rule))
        yield Sample(f"{method} no rows", (c[:0], x[:0], weight, bias, None, *rule))
        yield Sample(f"{method} no outputs", (c[:, :0], x, weight[:0], bias[:0], None, *rule))
    yield Sample("one row, no leading dimension", (c[0], x[0], weight, bias, None, *_rule("gamma")))


def _stored(
    dtype: torch.dtype, device: torch.device, method: str, leading: tuple[int, ...], outputs: int, inputs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ratio, aside, x, weight) made up, some of x zero."""
    ratio, x, weight, _ = linear_operands(dtype, device, leading, inputs, outputs)
    aside = torch.randn(empty_aside(ratio, method).shape, device=device).to(dtype)
    if method == "gamma":
        aside = torch.randint(256, aside.shape, device=device, dtype=torch.uint8)
    return ratio, aside, x * (x.abs() > 0.6), weight


def _samples_bwd(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for method in METHODS:
        rule = (method, *PARAMETERS[method])
        yield Sample(f"{method} 3x11x43->70", (*_stored(dtype, device, method, (3, 11), 43, 70), *rule, False))
        yield Sample(f"{method} as relevance", (*_stored(dtype, device, method, (2, 3), 17, 40), *rule, True))
        yield from _special_bwd(dtype, device, method)


def _special_bwd(dtype: torch.dtype, device: torch.device, method: str) -> Iterator[Sample]:
    stored = _stored(dtype, device, method, (5,), 34, 21)
    ratio, aside, x, weight = stored
    rest = (method, *PARAMETERS[method], False)
    yield Sample(f"{method} transposed", (*map(columns_first, stored), *rest))
    yield Sample(f"{method} every second input", (ratio, aside, x[:, ::2], weight[:, ::2], *rest))
    yield Sample(f"{method} no inputs", (ratio, aside, x[:, :0], weight[:, :0], *rest))
    empty = method == "z_plus"
    yield Sample(f"{method} no rows", (ratio[:0], aside if empty else aside[:0], x[:0], weight, *rest))
    yield Sample(f"{method} no outputs", (ratio[:, :0], aside if empty else aside[:, :0], x, weight[:0], *rest))
    yield Sample(f"{method} no leading dimension", (ratio[0], aside if empty else aside[0], x[0], weight, *rest))


def _refused_fwd(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    c, x, weight, bias = linear_operands(dtype, device, (3,), 4, 5)
    rule = _rule("gamma")
    wide = tuple(value.double() for value in (c, x, weight, bias))
    yield Sample("float64", (*wide, None, *rule))
    yield Sample("several dtypes", (c, x.half(), weight, bias, None, *rule))
    yield Sample("a vector for a weight", (c[0], x, weight[0], bias, None, *rule))
    yield Sample("sizes that do not fit", (c, x[:, 1:], weight, bias, None, *rule))
    yield Sample("a bias that does not fit", (c, x, weight, bias[1:], None, *rule))
    yield Sample("a rounded output", (c, x, weight, bias, c.half(), *rule))
    yield Sample("another row's output", (c, x, weight, bias, c[:2].float(), *rule))
    yield Sample("an unknown method", (c, x, weight, bias, None, "w_plus", 0.0, 0.0, 1e-6))


def _refused_bwd(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    ratio, aside, x, weight = _stored(dtype, device, "gamma", (3,), 5, 4)
    rest = ("gamma", 0.25, 0.0, False)
    yield Sample("float64", (ratio.double(), aside, x.double(), weight.double(), *rest))
    yield Sample("a vector for a weight", (ratio, aside, x, weight[0], *rest))
    yield Sample("sizes that do not fit", (ratio, aside, x[:2], weight, *rest))
    yield Sample("another method's shares", (ratio, ratio, x, weight, *rest))
    yield Sample("an unknown method", (ratio, aside, x, weight, "w_plus", 0.0, 0.0, False))


def _workloads_fwd(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for method, layer in zip(("gamma", "z_plus", "alpha_beta"), LAYERS, strict=True):
        given = linear_operands(dtype, device, layer.leading, layer.inputs, layer.outputs)
        yield Sample(f"{method} {layer}", (*given, None, *_rule(method)))
        z = given[0].float()
        yield Sample(f"{method} with its output {layer}", (*given, z, *_rule(method)))


def _workloads_bwd(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for method, layer in zip(("gamma", "z_plus", "alpha_beta"), LAYERS, strict=True):
        stored = _stored(dtype, device, method, layer.leading, layer.outputs, layer.inputs)
        yield Sample(f"{method} {layer}", (*stored, method, *PARAMETERS[method], False))


def _flops_fwd(c: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, *rest: Any) -> int:
    return 2 * (1 if z is not None else 2) * c.numel() * x.shape[-1]


def _flops_bwd(ratio: Tensor, aside: Tensor, x: Tensor, *rest: Any) -> int:
    return 2 * 2 * ratio.numel() * x.shape[-1]


SIGNSPLIT_LINEAR_FWD = KernelSpec(
    name="signsplit_linear_fwd",
    summary="the shares of a sign-split rule, from W x and |W| |x| at one read of each tile",
    source=SOURCE,
    reference=signsplit_linear_fwd,
    fake=_fake_fwd,
    supports=_supports_fwd,
    samples=_samples_fwd,
    refused=_refused_fwd,
    workloads=_workloads_fwd,
    flops=_flops_fwd,
    bound="compute",
)

SIGNSPLIT_LINEAR_BWD = KernelSpec(
    name="signsplit_linear_bwd",
    summary="W^T v1 + sign(x) |W|^T v2 at one read of W: the transpose of a sign-split rule",
    source=SOURCE,
    reference=signsplit_linear_bwd,
    fake=_fake_bwd,
    supports=_supports_bwd,
    samples=_samples_bwd,
    refused=_refused_bwd,
    workloads=_workloads_bwd,
    flops=_flops_bwd,
    bound="compute",
)
