"""Calls of the relevance dialect to measure: their inputs, whether a kernel is right on them, and how long all take."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from ceilings import is_gpu, times
from harness import short
from torch import Tensor
from torch.utils import _pytree as pytree

from lrp_compiler.kernels.autotune import CACHE, UnfitError, cache_bytes
from lrp_compiler.kernels.registry import DIALECT
from lrp_compiler.kernels.spec import KernelSpec, Work

KERNEL, EAGER, INDUCTOR, STOCK, CUBLAS = "kernel", "eager", "inductor", "torch's own", "torch.mm, same flops"
"""Providers of a call, as they are named in tables."""

MOST_SETS = 16
"""Of inputs that the timed calls rotate among."""

SHARE_OF_MEMORY = 8
"""The sets of inputs take at most this part of a device's memory."""

FEW_ROUNDINGS = 1e-6
"""An error in norm that is always allowed: a reference may compute in float32 whatever it is given."""

FEW_FLIPS = 1e-5
"""The share of packed bits and indices that may differ: those of numbers that rounding moves across a boundary."""


@dataclass(frozen=True)
class Case:
    """One call of an op in a dtype: one of its ``workloads``, or of the small ``samples`` of its tests."""

    spec: KernelSpec
    kind: str
    index: int
    label: str
    dtype: torch.dtype

    def draw(self, device: torch.device, seed: int = 0) -> tuple[Any, ...]:
        """Fresh random arguments."""
        torch.manual_seed(seed)
        drawn: Iterator[Any] = getattr(self.spec, self.kind)(self.dtype, device)
        arguments: tuple[Any, ...] = next(itertools.islice(drawn, self.index, None)).arguments
        return arguments

    def work(self) -> Work:
        """Its bytes and operations, from metadata."""
        return self.spec.work(*self.draw(torch.device("meta")))

    def __str__(self) -> str:
        return f"{self.spec.name}, {self.label}, {short(self.dtype)}"


@dataclass(frozen=True)
class Timing:
    """What one provider took of one case: microseconds per repeat, which way the kernel was run, and what was done."""

    case: Case
    provider: str
    way: str
    work: Work
    microseconds: tuple[float, ...]


def cases(kind: str, ops: Sequence[str], dtypes: Sequence[torch.dtype]) -> list[Case]:
    """Every call of the named ops (all for none), the first workload of all ops in the first dtype before others."""
    found = []
    for dtype, spec in itertools.product(dtypes, DIALECT):
        if (ops and spec.name not in ops) or dtype not in spec.dtypes:
            continue
        labels = [sample.label for sample in getattr(spec, kind)(dtype, torch.device("meta"))]
        found += [Case(spec, kind, index, label, dtype) for index, label in enumerate(labels)]
    return sorted(found, key=lambda case: (case.index, dtypes.index(case.dtype)))


def checked(case: Case, device: torch.device) -> dict[str, str]:
    """``failures``, or what kept the case from being checked; it leaves no memory in use."""
    try:
        return failures(case, device)
    except Exception as error:
        return {KERNEL: in_words(error)}
    finally:
        torch.cuda.empty_cache()


def in_words(error: Exception) -> str:
    """An error's kind and the first line of its message."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def failures(case: Case, device: torch.device) -> dict[str, str]:
    """Way of running the kernel -> what is wrong with what it gives; empty where nothing is.

    All memory that a way does not write holds nan. The error against the reference in float64, on the same numbers,
    may be ``tolerance`` times that of the reference in the case's own dtype, of rounding once, or of a few roundings.
    """
    arguments = case.draw(device)
    if not (taken := case.spec.supports(*arguments)):
        return {KERNEL: f"refused: {taken}"}
    exact = _exact(case.spec, arguments)
    eager = _tensors(case.spec.reference(*arguments))
    found: dict[str, str] = {}
    for name, way in case.spec.ways(*arguments).items():
        with _poisoned(), contextlib.suppress(UnfitError):
            wrong = _difference(_tensors(way()), eager, exact, case.spec.tolerance)
            found |= {name: wrong} if wrong else {}
    return found


def _exact(spec: KernelSpec, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The reference on the same numbers in float64; in float32 where that takes more memory than there is."""
    for wide in (torch.float64, torch.float32):
        with contextlib.suppress(torch.OutOfMemoryError):
            return _tensors(spec.reference(*pytree.tree_map_only(Tensor, partial(_widened, wide), arguments)))
    raise RuntimeError(f"{spec.name} could not be checked: its reference takes more memory than there is")


def _widened(dtype: torch.dtype, value: Tensor) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _tensors(results: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Memory that nobody wrote holds nan."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _difference(found: list[Tensor], eager: list[Tensor], exact: list[Tensor], tolerance: float) -> str:
    """What is wrong with ``found``, in words; nothing for nothing."""
    for one, reference, truth in zip(found, eager, exact, strict=True):
        if (one.shape, one.dtype) != (reference.shape, reference.dtype):
            return f"shape or dtype is {tuple(one.shape)} {one.dtype}, not {tuple(reference.shape)} {reference.dtype}"
        once = truth.to(one.dtype)
        least = _error(once, truth) if one.is_floating_point() else FEW_FLIPS
        losses = [loss for loss in (_error(reference, truth), least, FEW_ROUNDINGS) if math.isfinite(loss)]
        made, allowed = _error(one, truth), tolerance * max(losses)
        if not made <= allowed:
            return f"error {made:.3g}, allowed {allowed:.3g} ({tolerance:g} times eager's)"
    return ""


def _error(found: Tensor, exact: Tensor) -> float:
    """The relative error in norm; infinite where nan or inf stand elsewhere. Of integers the share that differs."""
    if not exact.numel():
        return 0.0
    if not found.is_floating_point():
        return float((found != exact).double().mean())
    # What the dtype has no number for is inf in the rounded result too.
    kept = exact.to(found.dtype).isfinite()
    if not torch.equal(kept, found.isfinite()):
        return math.inf
    truth = torch.where(kept, exact, 0).double()
    lost = torch.where(kept, found.double() - truth, 0).norm()
    return float(lost / truth.norm()) if truth.any() else float(lost)


def timings(case: Case, device: torch.device, repeats: int, inductor: bool) -> list[Timing]:
    """Microseconds per call of every provider that there is on ``device``, which take turns; after ``failures``."""
    work = case.work()
    sets = [case.draw(device, seed) for seed in range(_rotation(work, device))]
    way = case.spec.way(*sets[0]) if is_gpu(device) else ""
    calls = {name: partial(_all_of, call, sets) for name, call in _providers(case, sets[0], device, inductor).items()}
    done = {CUBLAS: Work(work.bytes, 2 * _side(work.flops) ** 3)}
    return [
        Timing(
            case, name, way if name == KERNEL else "", done.get(name, work), tuple(1e3 * t / len(sets) for t in taken)
        )
        for name, taken in times(calls, repeats, device).items()
    ]


def _rotation(work: Work, device: torch.device) -> int:
    """How many sets of inputs are needed for a call to find none of its own in the cache."""
    if not is_gpu(device):
        return min(math.ceil(CACHE / max(work.bytes, 1)), 2)
    most = torch.cuda.get_device_properties(device).total_memory // SHARE_OF_MEMORY // max(work.bytes, 1)
    return max(1, min(math.ceil(3 * cache_bytes(device) / max(work.bytes, 1)), MOST_SETS, most))


def _all_of(call: Callable[..., Any], sets: list[tuple[Any, ...]]) -> list[Any]:
    """All results at once, so that each call also writes memory of its own."""
    return [call(*arguments) for arguments in sets]


def _providers(
    case: Case, arguments: tuple[Any, ...], device: torch.device, inductor: bool
) -> Mapping[str, Callable[..., Any]]:
    """What is timed, by name: eager alone on the CPU."""
    spec = case.spec
    if not is_gpu(device):
        return {EAGER: spec.reference}
    providers: dict[str, Callable[..., Any]] = {KERNEL: spec.launch, EAGER: spec.reference}
    if inductor:
        torch._dynamo.reset()
        providers[INDUCTOR] = torch.compile(spec.reference, dynamic=False)
    if spec.stock is not None and spec.stock(*arguments) is not None:
        providers[STOCK] = spec.stock
    elif spec.bound == "compute":
        one, other = (torch.randn(2 * [_side(case.work().flops)], device=device).to(case.dtype) for _ in range(2))
        providers[CUBLAS] = lambda *arguments: torch.mm(one, other)
    return {name: call for name, call in providers.items() if name != INDUCTOR or _compiles(call, arguments)}


def _compiles(call: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
    """Whether inductor takes the reference; not everything that eager runs is compiled."""
    try:
        call(*arguments)
    except Exception as error:
        print(f"inductor: {in_words(error)}", flush=True)
        return False
    return True


def _side(flops: int) -> int:
    """Of square matrices whose product is about so many operations: a multiple of 64, cuBLAS at its best."""
    return int(max(64, round((flops / 2) ** (1 / 3) / 64) * 64))
