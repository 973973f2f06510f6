"""attention_lrp_bwd where the generic tests do not reach: every configuration, long tensors, torch's own backward."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, upcast
from hypothesis import given, settings
from hypothesis import strategies as st
from restated_attention import attention_lrp_bwd as restated
from torch.utils import _pytree as pytree

from lrp_compiler.kernels.dialect import attention
from lrp_compiler.kernels.dialect.attention import ATTENTION_LRP_BWD, stock_attention_bwd
from lrp_compiler.kernels.dialect.attention_map import ATTENTION_LRP_HEADS, ATTENTION_LRP_MAP
from lrp_compiler.kernels.dialect.attention_samples import ATTNLRP, CP, Shape, kept_call
from lrp_compiler.kernels.spec import KernelSpec

HALVES = (0.5, 0.5, 0.5)


def _run(spec: KernelSpec, arguments: tuple[Any, ...], config: Any) -> Any:
    made, launches = spec.plan(*arguments, config=config)
    for one in launches:
        one.run()
    return made


def _configured(spec: KernelSpec) -> list[Any]:
    """Every configuration in 16 bits; float32 has tiles of its own under all of them."""
    cases = [(config, torch.bfloat16) for config in spec.configs] + [(spec.configs[0], torch.float32)]
    return [pytest.param(spec, *case, id=f"{spec.name}-{case[0]}-{case[1]}") for case in cases]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("spec", "config", "dtype"), [*_configured(ATTENTION_LRP_BWD), *_configured(ATTENTION_LRP_MAP)]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_configuration_agrees_with_eager(
    spec: KernelSpec, config: Any, dtype: torch.dtype, is_causal: bool, device: torch.device
) -> None:
    """On sizes that its largest tile does not divide; eager in float64 stands in for the slower restatement."""
    shape = Shape(1, 1, 1, 131, 140, 16, 16)
    masks = shape.masks(is_causal=is_causal, window=100 if is_causal else 0)
    operands = shape.operands(dtype, device)
    arguments = (
        (*operands, None, *masks, 0.5) if spec is ATTENTION_LRP_MAP else (*operands, None, None, *masks, *HALVES)
    )
    results = [_run(spec, arguments, config), spec.reference(*arguments), spec.reference(*upcast(arguments))]
    for found, eager, exact in zip(*map(pytree.tree_leaves, results), strict=True):
        assert_as_accurate(found.cpu(), eager.cpu(), exact.cpu(), 2.0)


@pytest.mark.parametrize(("kibibytes", "width", "place"), [(227, 256, 0), (163, 128, 1), (99, 64, 2), (64, 256, 3)])
def test_the_default_configuration_fits_the_gpu(
    kibibytes: int, width: int, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs on smaller GPUs have less shared memory."""
    properties = SimpleNamespace(shared_memory_per_block_optin=kibibytes * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    operand: Any = SimpleNamespace(device=torch.device("cuda"), shape=(1, 1, 1, width))
    module = importlib.import_module("lrp_compiler.kernels.triton_dialect.attention_calls")
    assert module.default(operand, operand) is ATTENTION_LRP_BWD.configs[place]


@pytest.mark.parametrize("width", [40, 80, 96, 160, 256])
def test_heads_of_any_width(width: int, device: torch.device) -> None:
    arguments = Shape(1, 1, 1, 20, 17, width, 8).call(torch.float32, device)
    found, eager = ATTENTION_LRP_BWD.launch(*arguments), attention.attention_lrp_bwd(*arguments)
    for one, reference, truth in zip(found, eager, restated(*upcast(arguments)), strict=True):
        assert_as_accurate(one.cpu(), reference.cpu(), truth, 2.0)


@settings(max_examples=4, deadline=None)
@given(
    st.integers(1, 24), st.integers(1, 24), st.integers(0, 12), st.booleans(), st.sampled_from([0.0, 3.0]), st.data()
)
def test_relevance_of_values_is_their_share(
    length: int, keys: int, window: int, is_causal: bool, softcap: float, data: st.DataObject
) -> None:
    """V's part is linear: sum(V c_V) is its share of sum(c out) over the rows; conservation of CP-LRP."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(data.draw(st.integers(0, 99)))
    shape = Shape(1, 2, 1, length, keys, 6, 6)
    arguments = shape.call(torch.float32, device, shares=CP, is_causal=is_causal, window=window, softcap=softcap)
    _, _, on_value = ATTENTION_LRP_BWD.launch(*arguments)
    c, query, key, value = arguments[:4]
    weights, _ = attention.attention_map(query, key, *arguments[6:12])
    reaching = ATTENTION_LRP_HEADS.launch(c, weights @ value, 1.0)
    torch.testing.assert_close((value * on_value).sum(), reaching.sum(), atol=1e-4, rtol=1e-4)
    on_map = ATTENTION_LRP_MAP.launch(*arguments[:4], None, *arguments[6:12], 1.0)
    torch.testing.assert_close(on_map.sum(-1), reaching, atol=1e-4, rtol=1e-4)


def test_a_share_of_nothing_is_not_computed(device: torch.device) -> None:
    """CP-LRP runs the statistics of rows and one kernel with two products; the others have no result."""
    arguments = Shape(1, 1, 1, 5, 5, 4, 4).call(torch.float32, device, shares=CP)
    made, launches = ATTENTION_LRP_BWD.plan(*arguments)
    assert [result.shape for result in made] == [(0,), (0,), (1, 1, 5, 4)]
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert names == ["attention_rows_kernel", "attention_keys_kernel"]
    assert not launches[0].arguments["WITH_DELTA"] and not launches[1].arguments["TO_KEYS"]


def test_what_is_kept_is_not_computed_again(device: torch.device) -> None:
    kept = kept_call(Shape(1, 1, 1, 5, 5, 4, 4), torch.float32, device)
    names = [launch.kernel.fn.__name__ for launch in ATTENTION_LRP_BWD.plan(*kept)[1]]
    assert names == ["row_products_kernel", "attention_keys_kernel", "attention_queries_kernel"]


def test_heads_past_2_31_elements(device: torch.device) -> None:
    """The second head of every operand begins 2^31 elements after the first; only what is touched takes memory."""
    step, length, width = 2**31 + 64, 18, 4
    flat = torch.empty(step + length * width, dtype=torch.bfloat16, device=device)
    far = flat.as_strided((1, 2, length, width), (0, step, width, 1))
    near = torch.randn(1, 2, length, width, device=device).bfloat16()
    far.copy_(near)
    masks = Shape(1, 2, 2, length, length, width, width).masks(is_causal=True)
    found = ATTENTION_LRP_BWD.launch(near, far, far, far, None, None, *masks, *ATTNLRP)
    wanted = ATTENTION_LRP_BWD.launch(near, near, near, near, None, None, *masks, *ATTNLRP)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_rows_past_2_31_elements(device: torch.device) -> None:
    """Rows lie so far apart that the last one begins past 2^31 elements."""
    length, width = 18, 4
    step = 2**31 // (length - 1) + 16
    flat = torch.empty(step * length, dtype=torch.bfloat16, device=device)
    far = flat.as_strided((1, 1, length, width), (0, 0, step, 1))
    near = torch.randn(1, 1, length, width, device=device).bfloat16()
    far.copy_(near)
    masks = Shape(1, 1, 1, length, length, width, width).masks()
    found = ATTENTION_LRP_BWD.launch(far, far, far, far, None, None, *masks, *ATTNLRP)
    wanted = ATTENTION_LRP_BWD.launch(near, near, near, near, None, None, *masks, *ATTNLRP)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("shares", [ATTNLRP, CP, HALVES], ids=str)
@pytest.mark.parametrize("kept", [False, True])
def test_torchs_fused_backward_gives_the_same(shares: tuple[float, float, float], kept: bool) -> None:
    """The other candidate: torch's backward for the CPU and three scalings."""
    shape, cpu = Shape(2, 2, 2, 9, 9, 8, 8), torch.device("cpu")
    arguments = kept_call(shape, torch.float32, cpu, shares)
    if not kept:
        arguments = (*arguments[:4], None, None, *shape.masks(is_causal=True), *shares)
    found, wanted = stock_attention_bwd(*arguments), attention.attention_lrp_bwd(*arguments)
    assert found is not None
    for one, other in zip(found, wanted, strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other)


def test_torchs_fused_backward_is_not_asked_for_what_it_does_not_know() -> None:
    shape, cpu = Shape(1, 2, 2, 6, 6, 8, 8), torch.device("cpu")
    uneven = Shape(1, 2, 2, 6, 7, 8, 8).call(torch.float32, cpu, is_causal=True)
    widths = Shape(1, 2, 2, 6, 6, 8, 4).call(torch.float32, cpu)
    masks: list[dict[str, Any]] = [
        {"bias": torch.zeros(6, 6)},
        {"sink": torch.zeros(2)},
        {"window": 3},
        {"softcap": 2.0},
    ]
    calls = [uneven, widths, *(shape.call(torch.float32, cpu, **one) for one in masks)]
    assert [stock_attention_bwd(*call) for call in calls] == [None] * len(calls)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("fused", [attention._flash, attention._efficient], ids=lambda fused: fused.__name__)
def test_torchs_ops_for_gpus_take_these_arguments(fused: Any, kept: bool) -> None:
    """Without a GPU their arguments are checked by torch's forms for the meta device."""
    shape, meta = Shape(1, 4, 4, 40, 40, 16, 16), torch.device("meta")
    arguments = kept_call(shape, torch.bfloat16, meta)
    rows = arguments[4:6] if kept else (None, None)
    found = fused(*arguments[:4], *rows, True, 0.25)
    assert [one.shape for one in found] == [operand.shape for operand in arguments[1:4]]


@pytest.mark.parametrize("kept", [False, True], ids=["nothing kept", "output and log-sum-exp kept"])
def test_rows_masked_by_the_least_number_attend_evenly(kept: bool, device: torch.device) -> None:
    """As the forward pass does: beside -3e38 a log-sum-exp has lost the sum of its row, so it is not relied on."""
    query, key, value, c = (torch.randn(2, 2, 5, 4, device=device) for _ in range(4))
    mask = torch.zeros(2, 1, 5, 5, device=device)
    mask[1, :, 3:] = mask[..., 4] = torch.finfo(torch.float32).min
    wide = [one.double().requires_grad_() for one in (query, key, value)]
    logits = wide[0] @ wide[1].mT * 0.5 + mask.double()
    output = logits.softmax(-1) @ wide[2]
    saved = (output.float().detach(), logits.logsumexp(-1).float().detach()) if kept else (None, None)
    found = ATTENTION_LRP_BWD.launch(c, query, key, value, *saved, mask, None, False, 0.5, 0, 0.0, 1.0, 1.0, 1.0)
    for one, exact in zip(found, torch.autograd.grad(output, wide, c.double()), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-5)
