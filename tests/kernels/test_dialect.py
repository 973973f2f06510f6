"""Every op of the dialect, from its KernelSpec: the kernel against a restatement in float64 and against eager torch."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, upcast
from restatements import RESTATED
from torch import Tensor
from torch.utils import _pytree as pytree

from lrp_compiler.kernels.registry import DIALECT
from lrp_compiler.kernels.spec import KernelSpec, Sample

META = torch.device("meta")


def _labels(spec: KernelSpec, kind: str) -> list[str]:
    """The labels of a spec's samples, drawn where they take no memory."""
    return [sample.label for sample in getattr(spec, kind)(torch.float32, META)]


def _calls(kind: str) -> list[Any]:
    return [
        pytest.param(spec, index, id=f"{spec.name}-{label}")
        for spec in DIALECT
        for index, label in enumerate(_labels(spec, kind))
    ]


def _in_every_dtype() -> list[Any]:
    """Every sample in every dtype; of float16, which differs from bfloat16 in little, by default the first of an op."""
    return [
        pytest.param(
            spec,
            index,
            dtype,
            id=f"{spec.name}-{label}-{str(dtype)[6:]}",
            marks=pytest.mark.slow if dtype is torch.float16 and index else (),
        )
        for spec in DIALECT
        for index, label in enumerate(_labels(spec, "samples"))
        for dtype in spec.dtypes
    ]


def _drawn(spec: KernelSpec, kind: str, index: int, dtype: torch.dtype, device: torch.device) -> Sample:
    torch.manual_seed(index)
    return list(getattr(spec, kind)(dtype, device))[index]


def _tensors(results: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


def _same_layout(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("spec", "index", "dtype"), _in_every_dtype())
def test_a_kernel_is_as_accurate_as_eager(
    spec: KernelSpec, index: int, dtype: torch.dtype, device: torch.device
) -> None:
    """At most ``tolerance`` times eager's error, all memory written, the same bits twice, operands left alone."""
    arguments = _drawn(spec, "samples", index, dtype, device).arguments
    assert spec.supports(*arguments)
    before = pytree.tree_map_only(Tensor, torch.clone, arguments)
    found = _tensors(spec.launch(*arguments))
    again = _tensors(spec.launch(*arguments))
    eager = _tensors(spec.reference(*arguments))
    exact = _tensors(RESTATED[spec.name](*pytree.tree_map_only(Tensor, Tensor.cpu, upcast(before))))
    made_up = _tensors(spec.fake(*arguments))
    assert len(found) == len(eager) == len(exact) == len(made_up)
    for one, two, reference, truth, fake in zip(found, again, eager, exact, made_up, strict=True):
        assert _same_layout(one, fake)
        assert (reference.shape, reference.dtype) == (one.shape, one.dtype)
        assert torch.equal(one.nan_to_num(), two.nan_to_num()), "two runs differ"
        if one.is_floating_point():
            assert_as_accurate(one.cpu(), reference.cpu(), truth.double(), spec.tolerance)
        else:
            assert torch.equal(one.cpu(), truth.to(one.dtype))
    for given, kept in zip(_tensors(arguments), _tensors(before), strict=True):
        assert torch.equal(given.nan_to_num(), kept.nan_to_num()), "an operand was changed"


@pytest.mark.parametrize(("spec", "index"), _calls("refused"))
def test_a_kernel_refuses_what_it_cannot_do(spec: KernelSpec, index: int, device: torch.device) -> None:
    refusal = spec.supports(*_drawn(spec, "refused", index, torch.float32, device).arguments)
    assert not refusal and len(str(refusal)) > 10


@pytest.mark.parametrize("spec", DIALECT, ids=lambda spec: spec.name)
def test_an_op_is_well_formed(spec: KernelSpec, device: torch.device) -> None:
    """torch's own checks of schema, fake form and dispatch."""
    arguments = _drawn(spec, "samples", 0, torch.float32, device).arguments
    torch.library.opcheck(spec.op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("spec", DIALECT, ids=lambda spec: spec.name)
def test_an_op_maps_over_its_first_operand(spec: KernelSpec, device: torch.device) -> None:
    """vmap over coefficients, as several seeds at once ask for, is one call after the other."""
    first, *rest = _drawn(spec, "samples", 0, torch.float32, device).arguments
    several = pytree.tree_map_only(Tensor, lambda value: torch.stack([value, 2 * value]), first)
    mapped = _tensors(torch.vmap(lambda one: spec.op(one, *rest))(several))
    for index in range(2):
        alone = _tensors(spec.op(pytree.tree_map_only(Tensor, itemgetter(index), several), *rest))
        assert all(torch.equal(all_of[index], one) for all_of, one in zip(mapped, alone, strict=True))


@pytest.mark.parametrize(("spec", "index"), _calls("workloads"))
def test_a_workload_is_supported_and_counted(spec: KernelSpec, index: int) -> None:
    """Calls of the size of real models are taken, and their bytes and operations are known."""
    arguments = _drawn(spec, "workloads", index, spec.dtypes[0], META).arguments
    assert spec.supports(*arguments)
    work = spec.work(*arguments)
    results = sum(value.numel() * value.element_size() for value in _tensors(spec.fake(*arguments)))
    assert work.bytes >= results > 0
    assert work.flops > 0
    assert spec.bound in ("memory", "compute")


def test_every_op_has_a_restatement_of_its_own() -> None:
    assert set(RESTATED) == {spec.name for spec in DIALECT}
    assert not [fn for fn in RESTATED.values() if fn.__module__.startswith("lrp_compiler")]
