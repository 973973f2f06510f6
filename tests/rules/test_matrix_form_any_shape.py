"""Rules in matrix form on odd sizes, batches of one, strides and dimensions of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from functions import Op
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_form import REAL_EPSILON, check, check_conservation, halves, proportional
from matrix_form_attention import AttentionCase, FusedAttention, attention_restatement
from matrix_form_norms import layer_norm_restatement, random_affine
from torch import Tensor, nn

from lrp_compiler import composites

pytestmark = pytest.mark.usefixtures("float64")

LAYOUTS = ("contiguous", "transposed", "sliced")
SIZES = st.integers(1, 4)
SEED = 0
"""Set in every example, so that Hypothesis can repeat and shrink it."""

PROPERTY = settings(max_examples=15, deadline=None, derandomize=True)


def laid_out(shape: tuple[int, ...], layout: str) -> Tensor:
    """A random tensor of this shape with the named strides."""
    if layout == "transposed":
        return torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    if layout == "sliced":
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    return torch.randn(shape)


@PROPERTY
@given(st.lists(SIZES, min_size=0, max_size=2), SIZES, SIZES, st.booleans(), st.sampled_from(LAYOUTS))
def test_linear_of_any_shape(leading: list[int], size: int, out: int, bias: bool, layout: str) -> None:
    torch.manual_seed(SEED)
    model = nn.Linear(size, out, bias=bias)
    inputs = (laid_out((*leading, size), layout),)
    check(model, inputs, proportional(model), "epsilon")
    check(model, inputs, proportional(model, REAL_EPSILON), composites.epsilon(REAL_EPSILON))
    check_conservation(model, inputs, composites.epsilon(REAL_EPSILON))


@PROPERTY
@given(
    st.tuples(SIZES, st.integers(3, 6), st.integers(3, 6)),
    st.sampled_from([1, 2]),
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(0, 2)),
    st.sampled_from(LAYOUTS),
)
def test_conv2d_of_any_shape(
    sizes: tuple[int, int, int], groups: int, kernel: tuple[int, int, int], layout: str
) -> None:
    torch.manual_seed(SEED)
    batch, height, width = sizes
    model = nn.Conv2d(2, 2 * groups, *kernel, groups=groups)
    inputs = (laid_out((batch, 2, height, width), layout),)
    check(model, inputs, proportional(model), "epsilon")
    check_conservation(model, inputs)


@PROPERTY
@given(
    st.sampled_from([torch.add, torch.sub, torch.mul]),
    st.lists(st.tuples(SIZES, st.booleans(), st.booleans()), min_size=1, max_size=3),
    st.integers(0, 2),
    st.sampled_from(LAYOUTS),
)
def test_broadcasting_sums_and_products(
    fn: Callable[..., Tensor], dims: list[tuple[int, bool, bool]], dropped: int, layout: str
) -> None:
    """Two operands whose dimensions are each kept or one, the second lacking some leading dimensions."""
    torch.manual_seed(SEED)
    first = tuple(size if kept else 1 for size, kept, _ in dims)
    second = tuple(size if kept else 1 for size, _, kept in dims)[min(dropped, len(dims) - 1) :]
    model = Op(fn)
    inputs = laid_out(first, layout), laid_out(second, layout)
    check(model, inputs, halves if fn is torch.mul else proportional(model))
    check_conservation(model, inputs)


@PROPERTY
@given(st.lists(SIZES, max_size=2), st.integers(2, 7), st.booleans(), st.sampled_from(LAYOUTS))
def test_layer_norm_of_any_shape(leading: list[int], size: int, affine: bool, layout: str) -> None:
    torch.manual_seed(SEED)
    norm = random_affine(nn.LayerNorm(size, elementwise_affine=affine))
    assert isinstance(norm, nn.LayerNorm)
    inputs = (laid_out((*leading, size), layout),)
    check(norm, inputs, layer_norm_restatement(norm))
    check_conservation(norm, inputs)


@PROPERTY
@given(
    st.builds(
        AttentionCase,
        heads=st.sampled_from([2, 4]),
        shared_heads=st.sampled_from([1, 2]),
        queries=SIZES,
        keys=SIZES,
        dim=st.integers(1, 5),
        mask=st.sampled_from(["none", "causal", "bool", "float"]),
    ),
    st.integers(1, 2),
    st.sampled_from(["attnlrp", "cp_lrp"]),
    st.sampled_from(LAYOUTS),
)
def test_attention_of_any_shape(case: AttentionCase, batch: int, composite: str, layout: str) -> None:
    torch.manual_seed(SEED)
    mask = case.mask_tensor()
    model = FusedAttention(case, mask)
    inputs = tuple(laid_out(tuple(x.shape), layout) for x in case.inputs(batch))
    check(model, inputs, attention_restatement(case, mask, value_only=composite == "cp_lrp"), composite)
    check_conservation(model, inputs, composite)
