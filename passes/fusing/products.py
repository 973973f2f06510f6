"""Kernel forms of linear maps and 2-D convolutions under sign-split rules and the epsilon rule."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from lrp_compiler.kernels import signsplit
from lrp_compiler.kernels.dialect.epsilon_conv2d import EPSILON_CONV2D_BWD
from lrp_compiler.kernels.dialect.epsilon_linear import EPSILON_LINEAR_BWD
from lrp_compiler.kernels.dialect.signsplit_conv2d import SIGNSPLIT_CONV2D_BWD, SIGNSPLIT_CONV2D_FWD
from lrp_compiler.kernels.dialect.signsplit_linear import SIGNSPLIT_LINEAR_BWD, SIGNSPLIT_LINEAR_FWD
from lrp_compiler.kernels.linear import epsilon_ratio
from lrp_compiler.kernels.spec import NotSupportedError
from lrp_compiler.passes.fusing.replacement import Replacement, check_whole, replacement_of
from lrp_compiler.passes.linear_map import HALF, LinearMap
from lrp_compiler.passes.matching import Match, match_of
from lrp_compiler.passes.optable import schema_name
from lrp_compiler.passes.rules.signsplit import Shares

Split = tuple[str, float, float, float]
"""(method, first, second, epsilon) as the kernels take them."""


def sign_split_form(
    method: Shares, parameters: tuple[float, ...], lin: LinearMap, operands: Any, fold: list[Any], c: Tensor, z: Tensor
) -> Tensor:
    """As split_transpose."""
    x, weight, bias = lin.parts(operands, fold)
    if fold and x.dtype in HALF:
        raise NotSupportedError("batch normalisation folded into 16-bit weights would be rounded")
    flat_bias = bias.flatten() if bias.dim() else None
    # The model's own output saves the plain product, unless it was rounded to 16 bits.
    known = z if x.dtype not in HALF and z.dtype == x.dtype else None
    split = _split(method, parameters)
    name = schema_name(lin.target)
    if name in ("aten::linear", "aten::mm", "aten::matmul", "aten::addmm") and weight.dim() == 2:
        if lin.x > lin.weight:
            raise NotSupportedError("the kernel is for rows times a matrix, and the matrix stands on the left")
        rows = weight if name == "aten::linear" else weight.t()
        return _linear(c, x, rows, flat_bias, known, split)
    if name == "aten::conv2d" and x.dim() == 4:
        return _convolution(c, x, weight, flat_bias, known, _options(operands), split)
    raise NotSupportedError(f"no sign-split kernel for {name} with these shapes")


def _split(method: Shares, parameters: tuple[float, ...]) -> Split:
    *shares, epsilon = parameters
    first, second = (*shares, 0.0, 0.0)[:2]
    names = {signsplit.z_plus: "z_plus", signsplit.alpha_beta: "alpha_beta", signsplit.gamma: "gamma"}
    return names[method], first, second, epsilon


def _linear(c: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, split: Split) -> Tensor:
    method, first, second, _ = split
    ratio, aside = SIGNSPLIT_LINEAR_FWD(c, x, weight, bias, z, *split)
    made: Tensor = SIGNSPLIT_LINEAR_BWD(ratio, aside, x, weight, method, first, second, False)
    return made


def _convolution(
    c: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, options: list[Any], split: Split
) -> Tensor:
    method, first, second, _ = split
    ratio, aside = SIGNSPLIT_CONV2D_FWD(c, x, weight, bias, z, *options, *split)
    made: Tensor = SIGNSPLIT_CONV2D_BWD(ratio, aside, x, weight, *options, method, first, second, False)
    return made


def _options(operands: Any) -> list[Any]:
    """Stride, padding, dilation and groups of a conv2d call."""
    args, kwargs = operands
    given = [*args[3:], *([None] * 4)][:4]
    names = ("stride", "padding", "dilation", "groups")
    stride, padding, dilation, groups = (kwargs.get(name, one) for name, one in zip(names, given, strict=True))
    if isinstance(padding, str):
        raise NotSupportedError("padding given by name is not known in numbers")
    return [_pair(stride, 1), _pair(padding, 0), _pair(dilation, 1), 1 if groups is None else groups]


def _pair(value: Any, default: int) -> list[int]:
    if value is None:
        return [default] * 2
    sizes = [value] if isinstance(value, int) else list(value)
    return sizes * 2 if len(sizes) == 1 else sizes


def epsilon_linear(match: Match) -> Replacement | None:
    """W^T (c z / stab(z)) in one kernel; plain transposes are cuBLAS's."""
    ratio = _ratio(match)
    if ratio is None:
        return None
    c, z, epsilon = ratio.arguments
    weight = match.arguments[1]
    return _with(ratio, replacement_of(match, epsilon_linear_form, (c, z, weight, epsilon)))


def epsilon_convolution(match: Match) -> Replacement | None:
    """The same for conv2d."""
    ratio = _ratio(match)
    if ratio is None:
        return None
    _, weight, input_shape, *options = match.arguments
    stride, padding, dilation, transposed, _, groups = options
    if transposed or len(stride) != 2:
        raise NotSupportedError("no epsilon kernel but for conv2d")
    c, z, epsilon = ratio.arguments
    given = (c, z, weight, list(input_shape), list(stride), list(padding), list(dilation), groups, epsilon)
    return _with(ratio, replacement_of(match, epsilon_conv2d_form, given))


def epsilon_linear_form(c: Tensor, z: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """linear_transpose of epsilon_ratio."""
    made: Tensor = EPSILON_LINEAR_BWD(c, z, weight, epsilon, None, None)
    return made


def epsilon_conv2d_form(
    c: Tensor,
    z: Tensor,
    weight: Tensor,
    input_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    epsilon: float,
) -> Tensor:
    """convolution_transpose of epsilon_ratio."""
    made: Tensor = EPSILON_CONV2D_BWD(c, z, weight, input_shape, stride, padding, dilation, groups, epsilon, None)
    return made


def _ratio(match: Match) -> Match | None:
    """The epsilon ratio that a transpose is applied to."""
    check_whole(match)
    c = match.arguments[0]
    found = match_of(c) if isinstance(c, fx.Node) else None
    if found is None or found.emission.function is not epsilon_ratio:
        return None
    check_whole(found)
    return found


def _with(inner: Match, outer: Replacement) -> Replacement:
    return Replacement(outer.form, outer.arguments, outer.replaced, outer.inside | frozenset(inner.members))
