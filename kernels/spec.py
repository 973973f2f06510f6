"""What a kernel of the relevance dialect declares: one KernelSpec drives tests, benchmarks, docs and reports."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that kernels take; all of them accumulate in float32."""


@dataclass(frozen=True)
class Refusal:
    """Why a kernel does not take a call; falsy, so that ``supports`` may be tested."""

    reason: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.reason


Supported = bool | Refusal


@dataclass(frozen=True)
class Sample:
    """Arguments of one call, and a few words on what is special about them."""

    label: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: bytes of device memory read and written once, and floating-point operations."""

    bytes: int
    flops: int


Samples = Callable[[torch.dtype, torch.device], Iterator[Sample]]


@dataclass(frozen=True)
class KernelSpec:
    """One op of the dialect, ``torch.ops.lrp.<name>``.

    ``reference`` is the eager form in plain torch ops, which differentiable relevance and devices without the kernel
    run; ``fake`` gives results of the right shapes, dtypes and strides. ``supports`` looks at shapes, dtypes and
    devices alone. ``samples`` are small calls for tests (odd sizes, strides, nothing at all), ``refused`` calls that
    ``supports`` must refuse, ``workloads`` calls of the size of real models, for benchmarks and ahead-of-time
    compilation: on the meta device they take no memory. ``flops`` counts a call's arithmetic; ``traffic`` its bytes
    where that is not every operand and result once. ``tolerance``: how many times the eager reference's error against
    float64 the kernel may make. ``bound`` is what limits it on a GPU. ``source`` cites paper and equation.
    """

    name: str
    summary: str
    source: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    supports: Callable[..., Supported]
    samples: Samples
    refused: Samples
    workloads: Samples
    flops: Callable[..., int]
    bound: str
    traffic: Callable[..., int] | None = None
    tolerance: float = 2.0
    dtypes: tuple[torch.dtype, ...] = FLOATS

    @cached_property
    def op(self) -> Any:
        """The torch.library op; runs the kernel on CUDA and in the interpreter, else the reference."""
        return define(self)

    @property
    def triton_module(self) -> Any:
        """The module with the Triton kernel, imported at its first use."""
        return importlib.import_module(f"lrp_compiler.kernels.triton_dialect.{self.stem}")

    @property
    def stem(self) -> str:
        """The file name under dialect/ and triton_dialect/."""
        return str(self.reference.__module__).rsplit(".", 1)[-1]

    @property
    def plan(self) -> Callable[..., Any]:
        """The Triton module's ``plan_<name>(*arguments, config=None) -> (results, launches)``."""
        found: Callable[..., Any] = getattr(self.triton_module, f"plan_{self.name}")
        return found

    @property
    def configs(self) -> tuple[Any, ...]:
        """The shipped configurations, the default first."""
        found: tuple[Any, ...] = getattr(self.triton_module, f"CONFIGS_{self.name.upper()}", (None,))
        return found

    def launch(self, *arguments: Any) -> Any:
        """Run the kernel: on CUDA tensors, or on CPU tensors in the Triton interpreter."""
        results, launches = self.plan(*arguments)
        for one in launches:
            one.run()
        return results

    def work(self, *arguments: Any) -> Work:
        """Bytes and operations of one call."""
        moved = self.traffic or every_operand_once
        return Work(moved(self, *arguments), self.flops(*arguments))


def every_operand_once(spec: KernelSpec, *arguments: Any) -> int:
    """The bytes of all tensors given and made."""
    results = spec.fake(*arguments)
    tensors = [leaf for leaf in pytree.tree_leaves((arguments, results)) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_kernels(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of ``device`` here."""
    return device.type == "cuda" or (device.type == "cpu" and interpreting())


def define(spec: KernelSpec) -> Any:
    """Register ``spec`` as an op of torch.library, with its fake form and a rule for vmap."""
    schema = torch.library.infer_schema(spec.reference, mutates_args=())

    def run(*arguments: Any) -> Any:
        first = next(leaf for leaf in arguments if isinstance(leaf, Tensor))
        taken = runs_kernels(first.device) and spec.supports(*arguments)
        return spec.launch(*arguments) if taken else spec.reference(*arguments)

    op = torch.library.custom_op(f"lrp::{spec.name}", run, mutates_args=(), schema=schema)
    op.register_fake(spec.fake)
    op.register_vmap(lambda info, dims, *arguments: _one_by_one(op, info.batch_size, dims, arguments))
    return getattr(torch.ops.lrp, spec.name).default


def _one_by_one(op: Any, batch: int, dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """Call ``op`` once per mapped element and stack the results."""
    made = []
    for index in range(batch):
        chosen = [
            argument.select(dim, index) if isinstance(dim, int) else argument
            for argument, dim in zip(arguments, dims, strict=True)
        ]
        made.append(op(*chosen))
    stacked = pytree.tree_map(lambda *parts: torch.stack(parts), *made)
    return stacked, pytree.tree_map(lambda _: 0, stacked)


def contiguous_like(value: Tensor) -> Tensor:
    """A new contiguous tensor of the shape and dtype of ``value``: what most kernels write."""
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def same_device(*values: Tensor | None) -> Supported:
    """All tensors are on one device."""
    devices = {value.device for value in values if value is not None}
    return True if len(devices) == 1 else Refusal(f"its operands are on several devices: {sorted(map(str, devices))}")


def known_dtypes(*values: Tensor | None) -> Supported:
    """All tensors have one dtype, a float of 16 or 32 bits."""
    dtypes = {value.dtype for value in values if value is not None}
    if len(dtypes) != 1:
        return Refusal(f"its operands have several dtypes: {sorted(map(str, dtypes))}")
    (dtype,) = dtypes
    return True if dtype in FLOATS else Refusal(f"no kernel for {dtype}: kernels accumulate in float32")


def all_supported(checks: Iterable[Supported]) -> Supported:
    """True, or the first refusal."""
    return next((check for check in checks if not check), True)
