"""What a kernel of the relevance dialect declares: one KernelSpec drives tests, benchmarks, docs and reports."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrp_compiler.kernels.autotune import Autotuner, UnfitError, call_key

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


class NotSupportedError(Exception):
    """No kernel takes this call; its text is the reason."""


Samples = Callable[[torch.dtype, torch.device], Iterator[Sample]]
Mapping = Callable[[Any, int, tuple[Any, ...], tuple[Any, ...]], tuple[Any, Any]]


def one_by_one(op: Any, batch: int, dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """Call ``op`` once per mapped element and stack the results."""
    made = []
    for index in range(batch):
        made.append(op(*_elements(arguments, dims, index)))
    stacked = pytree.tree_map(lambda *parts: torch.stack(parts), *made)
    return stacked, pytree.tree_map(lambda _: 0, stacked)


def _elements(arguments: Sequence[Any], dims: Sequence[Any], index: int) -> list[Any]:
    """What one call of several is given, in lists of tensors too."""
    return [
        _elements(argument, dim, index)
        if isinstance(dim, (list, tuple))
        else argument.select(dim, index)
        if isinstance(argument, Tensor) and dim is not None
        else argument
        for argument, dim in zip(arguments, dims, strict=True)
    ]


@dataclass(frozen=True)
class KernelSpec:
    """One op of the dialect, ``torch.ops.lrp.<name>``.

    ``reference`` is the eager form in plain torch ops, which differentiable relevance and devices without the kernel
    run; ``fake`` gives results of the right shapes, dtypes and strides. ``supports`` looks at shapes, dtypes and
    devices alone. ``samples`` are small calls for tests (odd sizes, strides, nothing at all), ``refused`` calls that
    ``supports`` must refuse, ``workloads`` calls of the size of real models, for benchmarks and ahead-of-time
    compilation: on the meta device they take no memory. ``flops`` counts a call's arithmetic; ``traffic`` its bytes
    where that is not every operand and result once. ``tolerance``: how many times the eager reference's error against
    float64 the kernel may make. ``bound`` is what limits it on a GPU. ``source`` cites paper and equation. ``stock``
    gives the results by torch's own fused op, or None for calls that this cannot do: another way to run the call, and
    the bar for benchmarks. ``vmap`` takes (op, mapped size, mapped dimensions, arguments) to (results, their mapped
    dimensions), by default one call after the other. ``tuner`` remembers which way is the fastest.
    ``unread`` are positions of arguments that the reference computes anew, so that they may be constants to autograd.
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
    stock: Callable[..., Any] | None = None
    vmap: Mapping = one_by_one
    unread: tuple[int, ...] = ()
    tuner: Autotuner = field(default_factory=Autotuner, compare=False, repr=False)

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
        """Run the kernel, on CUDA tensors or on CPU tensors in the Triton interpreter, the way that is the fastest."""
        ways = self.ways(*arguments)
        return ways[self._fastest(ways, arguments)]()

    def way(self, *arguments: Any) -> str:
        """The name of the way that ``launch`` runs a call."""
        return self._fastest(self.ways(*arguments), arguments)

    def ways(self, *arguments: Any) -> dict[str, Callable[[], Any]]:
        """How a call can be run, by name: as its plan chooses, in each of several configurations, and by ``stock``."""
        others = self.configs if len(self.configs) > 1 else ()
        ways: dict[str, Callable[[], Any]] = {"default": partial(self.run, arguments)}
        ways |= {str(config): partial(self.run, arguments, config) for config in others}
        return ways if self.stock is None else {**ways, "stock": partial(self._run_stock, arguments)}

    def run(self, arguments: tuple[Any, ...], config: Any = None) -> Any:
        """Run the kernel under a configuration, for None the one that its plan chooses."""
        results, launches = self.plan(*arguments, config=config)
        for one in launches:
            one.run()
        return results

    def __call__(self, *arguments: Any) -> Any:
        """The op itself, for code that is traced; raises NotSupportedError when no kernel takes the call."""
        allowed = self.supports(*arguments)
        if not allowed:
            raise NotSupportedError(str(allowed))
        return self.op(*arguments)

    def _run_stock(self, arguments: tuple[Any, ...]) -> Any:
        results = None if self.stock is None else self.stock(*arguments)
        if results is None:
            raise UnfitError(f"torch has no op of its own for this call of {self.name}")
        return results

    def _fastest(self, ways: dict[str, Callable[[], Any]], arguments: tuple[Any, ...]) -> str:
        return self.tuner.fastest(call_key(arguments), ways, first_tensor(arguments).device)

    def work(self, *arguments: Any) -> Work:
        """Bytes and operations of one call."""
        moved = self.traffic or every_operand_once
        return Work(moved(self, *arguments), self.flops(*arguments))


def every_operand_once(spec: KernelSpec, *arguments: Any) -> int:
    """The bytes of all tensors given and made."""
    results = spec.fake(*arguments)
    tensors = [leaf for leaf in pytree.tree_leaves((arguments, results)) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def first_tensor(arguments: tuple[Any, ...]) -> Tensor:
    """The first tensor among the arguments of a call, in lists too."""
    return next(leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor))


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
        taken = runs_kernels(first_tensor(arguments).device) and spec.supports(*arguments)
        return spec.launch(*arguments) if taken else spec.reference(*arguments)

    op = torch.library.custom_op(f"lrp::{spec.name}", run, mutates_args=(), schema=schema)
    op.register_fake(spec.fake)
    op.register_vmap(lambda info, dims, *arguments: spec.vmap(op, info.batch_size, dims, arguments))
    return getattr(torch.ops.lrp, spec.name).default


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
