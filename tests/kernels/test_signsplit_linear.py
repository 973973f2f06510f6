"""The sign-split and epsilon kernels of linear layers: every configuration, and what follows from the rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, upcast
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from lrp_compiler.kernels import signsplit
from lrp_compiler.kernels.dialect.epsilon_linear import EPSILON_LINEAR_BWD
from lrp_compiler.kernels.dialect.layers import linear_operands
from lrp_compiler.kernels.dialect.shares import METHODS, packed, right_hand_sides, stored_shares, unpacked
from lrp_compiler.kernels.dialect.signsplit_linear import PARAMETERS, SIGNSPLIT_LINEAR_BWD, SIGNSPLIT_LINEAR_FWD
from lrp_compiler.kernels.spec import FLOATS, KernelSpec

CONFIGURATIONS = range(5)


def _through(c: Tensor, x: Tensor, weight: Tensor, method: str, first: float, second: float, epsilon: float) -> Tensor:
    """The relevance of ``x`` by both kernels."""
    shares = SIGNSPLIT_LINEAR_FWD.launch(c, x, weight, None, None, method, first, second, epsilon)
    made: Tensor = SIGNSPLIT_LINEAR_BWD.launch(*shares, x, weight, method, first, second, True)
    return made


def _run(spec: KernelSpec, which: int, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The results under configuration ``which``."""
    results, launches = spec.plan(*arguments, config=spec.configs[which])
    for launch in launches:
        launch.run()
    return [leaf for leaf in pytree.tree_leaves(results) if leaf.numel()]


def _calls(
    method: str, dtype: torch.dtype, which: int, device: torch.device
) -> list[tuple[KernelSpec, tuple[Any, ...]]]:
    """A call of every op, with more than one tile of configuration ``which`` in every dimension."""
    rows, columns, _ = (size for _, size in SIGNSPLIT_LINEAR_FWD.configs[which].blocks)
    c, x, weight, bias = linear_operands(dtype, device, (rows + 5,), columns + 3, columns + 9)
    rule = (method, *PARAMETERS[method])
    forward = (c, x, weight, bias, None, *rule, 1e-6)
    shares = SIGNSPLIT_LINEAR_FWD.reference(*forward)
    return [
        (SIGNSPLIT_LINEAR_FWD, forward),
        (SIGNSPLIT_LINEAR_BWD, (*shares, x, weight, *rule, True)),
        (EPSILON_LINEAR_BWD, (c, torch.randn_like(c), weight, 0.25, x, torch.randn_like(x))),
    ]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("which", CONFIGURATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_every_configuration_is_as_accurate_as_eager(method: str, which: int, device: torch.device) -> None:
    # Every dtype meets every method and every configuration.
    dtype = FLOATS[(METHODS.index(method) + which) % 3]
    torch.manual_seed(0)
    for spec, arguments in _calls(method, dtype, which, device):
        if which >= len(spec.configs):
            continue
        exact = pytree.tree_leaves(spec.reference(*upcast(arguments)))  # type: ignore[misc]
        eager = pytree.tree_leaves(spec.reference(*arguments))
        for found, reference, truth in zip(_run(spec, which, arguments), eager, exact, strict=False):
            if found.is_floating_point():
                assert_as_accurate(found, reference, truth, spec.tolerance)
            else:
                assert torch.equal(found, truth)


def test_all_configurations_are_tried() -> None:
    specs = (SIGNSPLIT_LINEAR_FWD, SIGNSPLIT_LINEAR_BWD, EPSILON_LINEAR_BWD)
    assert max(len(spec.configs) for spec in specs) == len(CONFIGURATIONS)


@pytest.mark.parametrize(("rows", "tile"), [(1, 32), (60, 64), (2048, 128)])
def test_few_rows_take_small_tiles(rows: int, tile: int) -> None:
    c, x, weight, _ = linear_operands(torch.bfloat16, torch.device("meta"), (rows,), 4096, 14336)
    _, (launch,) = SIGNSPLIT_LINEAR_FWD.plan(c, x, weight, None, None, "z_plus", 0.0, 0.0, 1e-6)
    assert launch.arguments["BLOCK_ROW"] == tile


@pytest.mark.parametrize("method", METHODS)
def test_what_is_stored_makes_the_right_hand_sides_of_the_rules(method: str) -> None:
    z0, bias, relevance = (torch.randn(3, 9, dtype=torch.float64) for _ in range(3))
    first, second = PARAMETERS[method]
    u, z = z0.abs() + torch.rand(3, 9, dtype=torch.float64), z0 + bias
    given_to_rule = {"z_plus": (), "alpha_beta": (first, second), "gamma": (first,)}[method]
    leading = (z,) if method == "gamma" else ()
    expected = getattr(signsplit, method)(relevance, *leading, z0, u, bias, *given_to_rule, 1e-6)
    stored = stored_shares(method, relevance / z, z, z0, u, bias, (first, second, 1e-6))
    for found, right in zip(right_hand_sides(method, *stored, first), expected, strict=True):
        torch.testing.assert_close(found, right)


@given(st.integers(0, 40), st.integers(1, 3))
@settings(max_examples=8, deadline=None)
def test_packed_flags_come_back(size: int, rows: int) -> None:
    flags = torch.rand(rows, size) < 0.5
    assert torch.equal(unpacked(packed(flags), size), flags)


@given(st.sampled_from(METHODS), st.integers(8, 40), st.integers(1, 40), st.integers(0, 3))
@settings(max_examples=8, deadline=None)
def test_relevance_is_conserved_without_a_bias(method: str, inputs: int, outputs: int, seed: int) -> None:
    """alpha - beta = 1, so whatever has terms of either sign gives away all it has."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    c, x, weight, _ = linear_operands(torch.float32, device, (2,), inputs, outputs)
    # One term of either sign in every output.
    x[:, :2], weight[:, 0], weight[:, 1] = 1, 1, -1
    made = _through(c, x, weight, method, *PARAMETERS[method], 1e-9)
    torch.testing.assert_close(made.sum(-1), (c * (x @ weight.t())).sum(-1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_sixteen_bits_leave_nothing_where_all_terms_cancel(dtype: torch.dtype, device: torch.device) -> None:
    """z+ gives an input that lowers every output exactly nothing: both products read the same rounded ratio."""
    c, x, weight, _ = linear_operands(dtype, device, (5,), 40, 70)
    x[:, 7], weight[:, 7] = 1, -weight[:, 7].abs()
    made = _through(c, x, weight, "z_plus", 0.0, 0.0, 1e-6)
    assert not made[:, 7].any() and made[:, :7].all()


def test_a_ratio_past_float16_stays_finite(device: torch.device) -> None:
    """An output of nearly no positive terms: c z / P is 2e5, and inf - inf would blot out its whole row."""
    x, c = torch.tensor([[1.0, 1.0]], device=device), torch.tensor([[1.0]], device=device)
    weight = torch.tensor([[2.5e-6, -1.0]], device=device)
    ratio, _ = SIGNSPLIT_LINEAR_FWD.launch(*(value.half() for value in (c, x, weight)), None, None, "z_plus", 0, 0, 0.0)
    assert ratio.item() == -torch.finfo(torch.float16).max


def test_an_infinite_coefficient_stays_infinite(device: torch.device) -> None:
    c, x, weight, _ = linear_operands(torch.float16, device, (1,), 40, 3)
    c[0, 1] = float("inf")
    ratio, _ = SIGNSPLIT_LINEAR_FWD.launch(c, x, weight, None, None, "gamma", 0.25, 0.0, 1e-6)
    assert ratio.isinf().tolist() == [[False, True, False]]


@pytest.fixture
def tf32() -> Iterator[None]:
    """The user allows TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
def test_under_tf32_both_products_are_made_anew(device: torch.device) -> None:
    """The output that is given was cut to TF32 by another kernel, if at all, and u + z0 would be noise."""
    c, x, weight, bias = linear_operands(torch.float32, device, (3,), 8, 9)
    _, (launch,) = SIGNSPLIT_LINEAR_FWD.plan(c, x, weight, bias, c, "gamma", 0.25, 0.0, 1e-6)
    assert (launch.arguments["z"], launch.arguments["PRECISION"]) == (None, "tf32")
    _, (launch,) = SIGNSPLIT_LINEAR_BWD.plan(c, c, x, weight, "alpha_beta", 2.0, 1.0, False)
    assert not launch.arguments["ADDS_FIRST"]


def _far_apart(rows: int, columns: int, device: torch.device) -> Tensor:
    """A small matrix whose last row begins 2^31 elements after its first."""
    made = torch.empty(2**31 + columns, dtype=torch.float16, device=device)
    return made.as_strided((rows, columns), (2**31 // (rows - 1), 1)).copy_(torch.randn(rows, columns))


def test_elements_past_two_to_the_thirty_one_are_reached(device: torch.device) -> None:
    # Memory that nobody touches is not there.
    c, x, weight = _far_apart(3, 5, device), _far_apart(3, 4, device), _far_apart(5, 4, device)
    rule = ("gamma", 0.25, 0.0)
    for spec, arguments in (
        (SIGNSPLIT_LINEAR_FWD, (c, x, weight, None, None, *rule, 1e-6)),
        (EPSILON_LINEAR_BWD, (c, c, weight, 0.25, x, x)),
    ):
        near = pytree.tree_map_only(Tensor, Tensor.contiguous, arguments)
        found, expected = (pytree.tree_leaves(spec.launch(*operands)) for operands in (arguments, near))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    shares = SIGNSPLIT_LINEAR_FWD.launch(c, x, weight, None, None, *rule, 1e-6)
    found = SIGNSPLIT_LINEAR_BWD.launch(*shares, x, weight, *rule, False)
    assert torch.equal(found, SIGNSPLIT_LINEAR_BWD.launch(*shares, x.contiguous(), weight.contiguous(), *rule, False))
