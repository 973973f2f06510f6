"""signsplit_conv2d_fwd, signsplit_conv2d_bwd: z+, alpha-beta and gamma through convolutions of signed images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lrp_compiler.kernels.dialect.conv2d import CASES, WORKLOADS, Case, channels_last, fits, product, transpose
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
from lrp_compiler.kernels.dialect.signsplit_linear import PARAMETERS, SOURCE
from lrp_compiler.kernels.spec import (
    KernelSpec,
    Refusal,
    Sample,
    Supported,
    all_supported,
    known_dtypes,
    same_device,
)


def signsplit_conv2d_fwd(
    c: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    method: str,
    first: float,
    second: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """(ratio, aside) of z = W * x + b under a sign-split rule, from z0 = W * x and u = |W| * |x| in float32.

    ``c`` (N, O, OH, OW), ``x`` (N, C, H, W), ``weight`` (O, C / groups, KH, KW) and ``bias`` (O,) have one dtype;
    ``z``, like ``c``, is the model's own output where that is in float32. ``method`` is z_plus, alpha_beta (``first``
    alpha, ``second`` beta) or gamma (``first`` gamma). dialect/shares.py says what the results hold. ``ratio`` has the
    shape and dtype of ``c`` and lies in memory with channels last, whatever ``c`` does: so the transpose reads windows
    of it in wide words. ``aside`` is empty, another ``ratio``, or (ceil(N OH OW / 8), O) bytes: bit p % 8 of byte
    (p // 8, o) is z_o < 0 at pixel p, the pixels counted over (N, OH, OW), and 0 past the last.
    """
    wide, w = widened(x), widened(weight)
    windows = (stride, padding, dilation, groups)
    u = product(wide.abs(), w.abs(), *windows)
    added = w.new_zeros(()) if bias is None else widened(bias).view(-1, 1, 1)
    z0 = product(wide, w, *windows) if z is None else z - added
    full = z0 + added if z is None else z
    ratio, aside = stored_shares(method, widened(c), full, z0, u, added, (first, second, epsilon))
    if method == "gamma":
        kept = packed(aside.movedim(1, 0).flatten(1)).t().contiguous()
    else:
        kept = _lying_last(rounded(aside, c.dtype))
    return _lying_last(rounded(ratio, c.dtype)), kept


def _lying_last(value: Tensor) -> Tensor:
    """With channels last, a tensor of nothing as it is."""
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def signsplit_conv2d_bwd(
    ratio: Tensor,
    aside: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    method: str,
    first: float,
    second: float,
    as_relevance: bool,
) -> Tensor:
    """c_x = W^T v1 + sign(x) |W|^T v2 (times x ``as_relevance``) in float32, of the shape, dtype and layout of ``x``.

    ``ratio`` and ``aside`` are the results of ``signsplit_conv2d_fwd``, which say what (v1, v2) are; of the parameters
    only gamma is read, ``first``.
    """
    wide, w = widened(x), widened(weight)
    windows = (list(x.shape), stride, padding, dilation, groups)
    kept = _signs(aside, ratio.shape) if method == "gamma" else widened(aside)
    v1, v2 = right_hand_sides(method, widened(ratio), kept, first)
    made = transpose(v1, w, *windows) + torch.sign(wide) * transpose(v2, w.abs(), *windows)
    return torch.empty_like(x).copy_(made * wide if as_relevance else made)


def _signs(aside: Tensor, shape: torch.Size) -> Tensor:
    """The signs that gamma keeps, as bools of ``shape`` (N, O, OH, OW)."""
    batch, outputs, height, width = shape
    return unpacked(aside.t(), batch * height * width).view(outputs, batch, height, width).movedim(0, 1)


def empty_shares(c: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """(ratio, aside) for coefficients ``c``, unwritten."""
    ratio = channels_last(c.shape, c.dtype, c.device)
    if method == "gamma":
        pixels = c.shape[0] * c.shape[2] * c.shape[3]
        return ratio, torch.empty(packed_size(pixels), c.shape[1], dtype=torch.uint8, device=c.device)
    return ratio, torch.empty_like(ratio) if method == "alpha_beta" else c.new_empty(0)


def _fake_fwd(
    c: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    method: str,
    *parameters: float,
) -> tuple[Tensor, Tensor]:
    return empty_shares(c, method)


def _fake_bwd(ratio: Tensor, aside: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def _supports_fwd(
    c: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    method: str,
    *parameters: float,
) -> Supported:
    bias_fits = bias is None or bias.shape == weight.shape[:1]
    return all_supported(
        (
            same_device(c, x, weight, bias, z),
            known_dtypes(c, x, weight, bias),
            known_method(method),
            fits(x.shape, weight, c.shape, stride, padding, dilation, groups),
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
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    method: str,
    *parameters: float | bool,
) -> Supported:
    known = all_supported(
        (
            same_device(ratio, aside, x, weight),
            known_dtypes(ratio, x, weight),
            known_method(method),
            fits(x.shape, weight, ratio.shape, stride, padding, dilation, groups),
        )
    )
    if not known:
        return known
    _, wanted = empty_shares(ratio.to("meta"), method)
    stored = (aside.shape, aside.dtype) == (wanted.shape, wanted.dtype)
    return stored or Refusal(f"{method} stores {tuple(wanted.shape)} of {wanted.dtype} beside the ratio")


def _rule(method: str) -> tuple[str, float, float, float]:
    return method, *PARAMETERS[method], 1e-6


def _methods_of(case: Case, index: int) -> tuple[str, ...]:
    """Every method for the first case, for the others one after the other."""
    return METHODS if index == 0 else (METHODS[index % len(METHODS)],)


def _samples_fwd(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for index, case in enumerate(CASES):
        x, weight, c, bias = case.draw(dtype, device)
        for method in _methods_of(case, index):
            yield Sample(f"{method} {case.label}", (c, x, weight, bias, None, *case.lists, *_rule(method)))
    x, weight, c, bias = CASES[1].draw(dtype, device)
    z = product(x, weight, *CASES[1].lists) + bias.float().view(-1, 1, 1)
    yield Sample("gamma with its output", (c, x, weight, bias, z, *CASES[1].lists, *_rule("gamma")))
    x, weight, c, bias = CASES[3].draw(dtype, device)
    one_sign = (c, x.abs(), -weight.abs(), None, None, *CASES[3].lists, *_rule("alpha_beta"))
    yield Sample("alpha_beta no bias, one sign", one_sign)


def _samples_bwd(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for index, case in enumerate(CASES):
        x, weight, c, bias = case.draw(dtype, device)
        x = torch.where(x.abs() < 0.6, 0, x)
        for method in _methods_of(case, index):
            shares = signsplit_conv2d_fwd(c, x, weight, bias, None, *case.lists, *_rule(method))
            rest = (x, weight, *case.lists, method, *PARAMETERS[method])
            yield Sample(f"{method} {case.label}", (*shares, *rest, index % 2 == 0))
    case = CASES[0]
    x, weight, c, bias = case.draw(dtype, device)
    for method in ("alpha_beta", "gamma"):
        ratio, aside = signsplit_conv2d_fwd(c, x, weight, bias, None, *case.lists, *_rule(method))
        planes = ratio.contiguous(), aside.t().contiguous().t() if method == "gamma" else aside.contiguous()
        yield Sample(f"{method} planes", (*planes, x, weight, *case.lists, method, *PARAMETERS[method], True))


def _refused_fwd(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    case = CASES[3]
    x, weight, c, bias = case.draw(dtype, device)
    rest = (*case.lists, *_rule("gamma"))
    yield Sample("float64", (c.double(), x.double(), weight.double(), bias.double(), None, *rest))
    yield Sample("one image without a batch", (c[0], x[0], weight, bias, None, *rest))
    yield Sample("outputs of other sizes", (c[:, :, 1:], x, weight, bias, None, *rest))
    yield Sample("a bias that does not fit", (c, x, weight, bias[1:], None, *rest))
    yield Sample("a rounded output", (c, x, weight, bias, c.half(), *rest))
    yield Sample("another image's output", (c, x, weight, bias, c[:, :, 1:].float(), *rest))
    yield Sample("groups that do not fit", (c, x, weight, bias, None, [1, 1], [0, 0], [1, 1], 2, *_rule("gamma")))
    yield Sample("one number of padding", (c, x, weight, bias, None, [1, 1], [0], [1, 1], 1, *_rule("gamma")))
    yield Sample("an unknown method", (c, x, weight, bias, None, *case.lists, "w_plus", 0.0, 0.0, 1e-6))
    many = torch.empty(2**21, 1, 32, 32, device="meta")
    one = torch.empty(1, 1, 1, 1, device="meta")
    yield Sample("too many pixels", (many, many, one, None, None, *case.lists, *_rule("gamma")))


def _refused_bwd(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    case = CASES[3]
    x, weight, c, bias = case.draw(dtype, device)
    ratio, aside = signsplit_conv2d_fwd(c, x, weight, bias, None, *case.lists, *_rule("gamma"))
    rest = (*case.lists, "gamma", 0.25, 0.0, False)
    yield Sample("float64", (ratio.double(), aside, x.double(), weight.double(), *rest))
    yield Sample("outputs of other sizes", (ratio[:, :, 1:], aside, x, weight, *rest))
    yield Sample("another method's shares", (ratio, ratio, x, weight, *rest))
    yield Sample("an unknown method", (ratio, aside, x, weight, *case.lists, "w_plus", 0.0, 0.0, False))


def _workloads_fwd(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for case, method in zip(WORKLOADS, ("gamma", "z_plus", "alpha_beta", "gamma"), strict=True):
        x, weight, c, bias = case.draw(dtype, device)
        yield Sample(f"{method} {case.label}", (c, x, weight, bias, None, *case.lists, *_rule(method)))


def _workloads_bwd(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for case, method in zip(WORKLOADS, ("gamma", "z_plus", "alpha_beta", "gamma"), strict=True):
        x, weight, c, _ = case.draw(dtype, device)
        bits = torch.randint(256, empty_shares(c, method)[1].shape, device=device, dtype=torch.uint8)
        shares = _lying_last(c), bits if method == "gamma" else _lying_last(bits.to(dtype))
        yield Sample(f"{method} {case.label}", (*shares, x, weight, *case.lists, method, *PARAMETERS[method], False))


def _flops_fwd(c: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, *rest: Any) -> int:
    return 2 * (1 if z is not None else 2) * c.numel() * weight[:1].numel()


def _flops_bwd(ratio: Tensor, aside: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    return 2 * 2 * ratio.numel() * weight[:1].numel()


SIGNSPLIT_CONV2D_FWD = KernelSpec(
    name="signsplit_conv2d_fwd",
    summary="the shares of a sign-split rule, from W * x and |W| * |x| at one read of each tile",
    source=SOURCE,
    reference=signsplit_conv2d_fwd,
    fake=_fake_fwd,
    supports=_supports_fwd,
    samples=_samples_fwd,
    refused=_refused_fwd,
    workloads=_workloads_fwd,
    flops=_flops_fwd,
    bound="compute",
)

SIGNSPLIT_CONV2D_BWD = KernelSpec(
    name="signsplit_conv2d_bwd",
    summary="W^T v1 + sign(x) |W|^T v2 at one read of W: the transpose of a sign-split rule through conv2d",
    source=SOURCE,
    reference=signsplit_conv2d_bwd,
    fake=_fake_bwd,
    supports=_supports_bwd,
    samples=_samples_bwd,
    refused=_refused_bwd,
    workloads=_workloads_bwd,
    flops=_flops_bwd,
    bound="compute",
)
