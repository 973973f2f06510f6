"""Transposes of strided convolutions against torch's own backward pass, in every geometry that a form takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lrp_compiler.kernels import strided
from lrp_compiler.kernels.linear import convolution_transpose

aten = torch.ops.aten
CASES: dict[str, tuple[int, list[int], list[int], list[int], list[int]]] = {
    "patches": (3, [4, 4], [4, 4], [0, 0], [12, 8]),
    "patches that leave a rest": (3, [4, 2], [4, 2], [0, 0], [13, 9]),
    "patches of a line": (5, [3], [3], [0], [11]),
    "patches of a volume": (2, [2, 1, 3], [2, 1, 3], [0, 0, 0], [5, 4, 6]),
    "points": (7, [1, 1], [2, 2], [0, 0], [8, 7]),
    "points of unequal strides": (7, [1, 1], [3, 1], [0, 0], [8, 7]),
    "points with a rest": (3, [1, 1], [4, 4], [0, 0], [8, 7]),
    "first layer of a ResNet": (3, [7, 7], [2, 2], [3, 3], [18, 15]),
    "first layer of an EfficientNet": (3, [3, 3], [2, 2], [1, 1], [9, 12]),
    "kernels of two sizes": (4, [2, 5], [2, 2], [0, 1], [10, 9]),
    "windows with gaps": (1, [2, 3], [4, 4], [0, 1], [12, 15]),
}
"""Input channels, kernel, stride, padding and spatial sizes of the input."""
LEFT: dict[str, tuple[int, list[int], list[int], list[int], list[int]]] = {
    "many channels": (32, [3, 3], [2, 2], [1, 1], [8, 8]),
    "padded points": (5, [1, 1], [2, 2], [1, 1], [9, 9]),
    "phases of a line": (3, [7], [2], [3], [20]),
}
"""Those left to torch."""


@pytest.mark.parametrize("name", [*CASES, *LEFT])
def test_strided_transposes_are_torchs(name: str) -> None:
    channels, kernel, stride, padding, sizes = (CASES | LEFT)[name]
    dims = len(kernel)
    x = torch.randn(2, channels, *sizes, dtype=torch.float64)
    weight = torch.randn(6, channels, *kernel, dtype=torch.float64)
    options: tuple[Any, ...] = (stride, padding, [1] * dims, False, [0] * dims, 1)
    c = torch.randn_like(aten.convolution.default(x, weight, None, *options))
    expected = aten.convolution_backward.default(c, x, weight, None, *options, [True, False, False])[0]
    made = strided.transpose(c, weight, x.shape, stride, padding)
    assert (made is None) == (name in LEFT)
    found = convolution_transpose(c, weight, list(x.shape), *options)
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    mapped = torch.vmap(lambda seed: convolution_transpose(seed, weight, list(x.shape), *options))(torch.stack([c, -c]))
    torch.testing.assert_close(mapped, torch.stack([expected, -expected]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [(1, 1, 1, 1), (3, 2, 1, 2), (2, 0, 3, 4), (1, 2, 2, 1)]
)
def test_any_transpose_is_torchs(dims: int, stride: int, padding: int, dilation: int, groups: int) -> None:
    x = torch.randn(2, 4, *(12, 11, 10)[:dims], dtype=torch.float64)
    weight = torch.randn(8, 4 // groups, *[3] * dims, dtype=torch.float64)
    options: tuple[Any, ...] = ([stride] * dims, [padding] * dims, [dilation] * dims, False, [0] * dims, groups)
    c = torch.randn_like(aten.convolution.default(x, weight, None, *options))
    expected = aten.convolution_backward.default(c, x, weight, None, *options, [True, False, False])[0]
    found = convolution_transpose(c, weight, list(x.shape), *options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
