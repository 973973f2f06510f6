"""Kernels of convolutions beyond what their specs' samples reach: every tile, odd windows, far addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, upcast
from hypothesis import given, settings
from hypothesis import strategies as st
from restatements import RESTATED
from torch import Tensor

from lrp_compiler.kernels.dialect.conv2d import Case
from lrp_compiler.kernels.dialect.epsilon_conv2d import EPSILON_CONV2D_BWD
from lrp_compiler.kernels.dialect.signsplit_conv2d import SIGNSPLIT_CONV2D_BWD, SIGNSPLIT_CONV2D_FWD
from lrp_compiler.kernels.launch import Config
from lrp_compiler.kernels.spec import KernelSpec

WIDE = Case("", 1, 70, (9, 16), 130, window=(1, 2), padding=(0, 1), layout="channels last")
Formula = Callable[..., Any]
METHODS = {"z_plus": (0.0, 0.0), "alpha_beta": (2.0, 1.0), "gamma": (0.25, 0.0)}


def _calls(
    case: Case, method: str, dtype: torch.dtype, device: torch.device
) -> list[tuple[KernelSpec, tuple[Any, ...]]]:
    """One call of every op for ``case``, both passes of the sign-split rule with each other."""
    x, weight, c, bias = case.draw(dtype, device)
    z = case.draw(dtype, device)[2]
    forward = (c, x, weight, bias, None, *case.lists, method, *METHODS[method], 1e-6)
    shares = SIGNSPLIT_CONV2D_FWD.reference(*forward)
    return [
        (SIGNSPLIT_CONV2D_FWD, forward),
        (SIGNSPLIT_CONV2D_BWD, (*shares, x, weight, *case.lists, method, *METHODS[method], True)),
        (EPSILON_CONV2D_BWD, (c, z, weight, list(x.shape), *case.lists, 0.25, x)),
    ]


def _run(spec: KernelSpec, arguments: tuple[Any, ...], config: Config | None = None) -> list[Tensor]:
    results, launches = spec.plan(*arguments, config=config)
    for launch in launches:
        launch.run()
    return list(results) if isinstance(results, tuple) else [results]


def _assert_right(spec: KernelSpec, arguments: tuple[Any, ...], found: list[Tensor], formula: Formula) -> None:
    eager, exact = spec.reference(*arguments), formula(*upcast(arguments))
    eager, exact = ([value] if isinstance(value, Tensor) else list(value) for value in (eager, exact))
    for one, reference, truth in zip(found, eager, exact, strict=True):
        if one.is_floating_point():
            assert_as_accurate(one.cpu(), reference.cpu(), truth.double(), spec.tolerance)
        else:
            assert torch.equal(one.cpu(), truth)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("index", range(3), ids=["fwd", "bwd", "epsilon"])
def test_every_configuration_is_right(index: int, device: torch.device) -> None:
    torch.manual_seed(0)
    spec, arguments = _calls(WIDE, "gamma", torch.float16, device)[index]
    for config in spec.configs:
        # The explicit matrix of the restatement would not fit; the samples hold the reference against it.
        _assert_right(spec, arguments, _run(spec, arguments, config), spec.reference)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 2),
    method=st.sampled_from(list(METHODS)),
)
def test_any_window_is_right(
    window: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    method: str,
) -> None:
    """Also where taps reach no pixel of some phase, or lie in the padding alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    case = Case("", 1, 2 * groups, (7, 8), 3 * groups, window, stride, padding, dilation, groups)
    for spec, arguments in _calls(case, method, torch.float16, device):
        assert spec.supports(*arguments)
        _assert_right(spec, arguments, _run(spec, arguments), RESTATED[spec.name])


def test_relevance_is_conserved_by_z_plus(device: torch.device) -> None:
    """Without bias all relevance of outputs with a raising part reaches the input (Bach et al. 2015, eq. 2)."""
    torch.manual_seed(0)
    case = Case("", 1, 3, (6, 5), 4, padding=(1, 1), stride=(2, 1))
    x, weight, c, _ = case.draw(torch.float32, device)
    rest = (*case.lists, "z_plus", 0.0, 0.0)
    ratio, aside = _run(SIGNSPLIT_CONV2D_FWD, (c, x, weight, None, None, *rest, 1e-9))
    (relevance,) = _run(SIGNSPLIT_CONV2D_BWD, (ratio, aside, x, weight, *rest, True))
    z = torch.nn.functional.conv2d(x, weight, None, case.stride, case.padding)
    assert relevance.sum().item() == pytest.approx((z * c).sum().item(), rel=1e-4)


def test_images_lie_more_than_2_to_the_31_elements_apart(device: torch.device) -> None:
    """Addresses have 64 bits: an image far behind the first gets what it gets next to it."""
    torch.manual_seed(0)
    case = Case("", 2, 2, (3, 3), 2, window=(2, 2))
    x, weight, c, _ = case.draw(torch.float16, device)
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    far = memory.as_strided(x.shape, (2**31 + 8, *x.stride()[1:])).copy_(x)
    rest = (*case.lists, "z_plus", 0.0, 0.0)
    shares = _run(SIGNSPLIT_CONV2D_FWD, (c, x, weight, None, None, *rest, 1e-6))
    again = _run(SIGNSPLIT_CONV2D_FWD, (c, far, weight, None, None, *rest, 1e-6))
    assert torch.equal(shares[0], again[0])
    near = _run(SIGNSPLIT_CONV2D_BWD, (*shares, x, weight, *rest, True))
    # Written where the input lies near, read where it lies far.
    (behind,) = _run(SIGNSPLIT_CONV2D_BWD, (*shares, far, weight, *rest, True))
    assert torch.equal(near[0], behind)
