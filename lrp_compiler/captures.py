"""Captured calls: a model's graphs, traced once per kind of call and shared by every composite that explains it.

The first shape is traced as it is. From the second distinct shape on, the sizes that differed are left open, so that
one graph serves them all; a model whose forward depends on a size gets a graph for each of its values.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrp_compiler.captured_call import BoundCall, CapturedCall, RecentCall
from lrp_compiler.given_call import GivenCall
from lrp_compiler.heap import keep_freed_memory
from lrp_compiler.live_model import LiveModel
from lrp_compiler.passes.eager_failure import unsupported_argument
from lrp_compiler.passes.errors import DeviceMismatchError, TransformError
from lrp_compiler.passes.pipeline import capture_call, depends_on_grad_mode
from lrp_compiler.passes.program import COMPILING
from lrp_compiler.passes.transforms import is_transforming
from lrp_compiler.prepared_weights import PreparedWeights

GRAPHS = 8
"""How many graphs are kept for calls that differ in sizes alone; the oldest goes first."""

ATTEMPTS = 8
"""How often it is tried to leave sizes open for calls that differ in sizes alone."""


class RecompileWarning(UserWarning):
    """A model is traced again and again, since its forward depends on sizes that keep changing."""


@dataclass(frozen=True)
class Compilation:
    """One tracing of the model: for which shapes, in which form and why, in how many milliseconds."""

    shapes: tuple[tuple[int, ...], ...]
    form: Literal["static", "symbolic"]
    reason: str
    milliseconds: float

    def __str__(self) -> str:
        shapes = ", ".join(str(list(shape)) for shape in self.shapes)
        return f"{shapes}: {self.form} ({self.reason}), {self.milliseconds:.0f} ms"


Shapes = tuple[tuple[int, ...], ...]


@dataclass
class _Family:
    """Calls that differ in sizes alone: shapes seen, graphs kept, the sizes that cannot be left open and why."""

    shapes: list[Shapes] = field(default_factory=list)
    kept: list[CapturedCall] = field(default_factory=list)
    closed: frozenset[tuple[int, int]] = frozenset()
    attempts: int = 0
    refusal: str = ""
    warned: bool = False

    def fitting(self, given: GivenCall) -> BoundCall | None:
        """The call by a kept graph that holds for it."""
        grad_enabled = torch.is_grad_enabled()
        for captured in reversed(self.kept):
            if grad_enabled in captured.grad_modes and (bound := captured.bound(given)) is not None:
                return bound
        return None

    def varying(self, shapes: Shapes) -> frozenset[tuple[int, int]]:
        """The (leaf, dimension) pairs whose size has differed so far; sizes 0 and 1 are never left open."""
        differing = frozenset(
            (leaf, dim)
            for known in self.shapes
            for leaf, (before, now) in enumerate(zip(known, shapes, strict=True))
            for dim, (old, new) in enumerate(zip(before, now, strict=True))
            if old != new and new > 1
        )
        return differing - self.closed


class Captures:
    """The captured calls of one model; safe to share between threads and between composites."""

    def __init__(self) -> None:
        self.lock = COMPILING
        self.history: deque[Compilation] = deque(maxlen=100)
        self._families: dict[Any, _Family] = {}
        self.weights = PreparedWeights()
        self._known = LiveModel()
        self._recent: RecentCall | None = None

    def call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], kept: frozenset[str], dynamic: bool
    ) -> CapturedCall:
        """This kind of call, as ``bound`` finds or captures it."""
        return self.bound(model, args, kwargs, kept, dynamic).captured

    def bound(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], kept: frozenset[str], dynamic: bool
    ) -> BoundCall:
        """This call with a program, captured at the first call of its kind; ops named in ``kept`` stay whole.

        With ``dynamic`` sizes that have differed are left open where the model allows it.
        """
        given = GivenCall.of(self._known, model, args, kwargs)
        recent = self._recent
        if recent is not None and recent.is_like(given, (kept, dynamic)):
            return BoundCall(recent.captured, given, recent.sizes)
        # It would keep alive what the model held then.
        self._recent = None
        found = self._found(given, kept, dynamic)
        self._recent = RecentCall.of(found, (kept, dynamic))
        return found

    def _found(self, given: GivenCall, kept: frozenset[str], dynamic: bool) -> BoundCall:
        """A given call with its program, by all that decides what it compiles to."""
        model, args, kwargs = given.model, given.args, given.kwargs
        key = (given.key(), kept, dynamic)
        try:
            family = self._families.get(key)
        except TypeError:
            # Only what can be hashed can be told apart from other calls.
            raise (unsupported_argument(args, kwargs) or TypeError(f"{type(model).__name__}: no key")) from None
        found = family.fitting(given) if family is not None else None
        if found is not None:
            return found
        with self.lock:
            family = self._families.setdefault(key, _Family())
            found = family.fitting(given)
            if found is None:
                if is_transforming():
                    raise TransformError(model=type(model).__name__)
                _check_devices(model, args, kwargs)
                captured = self._captured(family, model, args, kwargs, kept, dynamic)
                self._keep(family, captured, model, dynamic)
                # Tracing runs the model, which may make parameters or buffers anew.
                given = GivenCall.of(self._known, model, args, kwargs)
                found = BoundCall(captured, given, captured.sizes(args, kwargs))
            return found

    @property
    def kept(self) -> int:
        """How many graphs are kept."""
        return sum(len(family.kept) for family in self._families.values())

    def close(self, captured: CapturedCall, reason: str) -> None:
        """Drop a graph with open sizes that no code can be made for; its shapes are traced one by one instead."""
        with self.lock:
            for family in self._families.values():
                if captured in family.kept:
                    family.kept.remove(captured)
                    family.closed |= captured.binder.open
                    family.refusal = reason

    def _captured(
        self,
        family: _Family,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kept: frozenset[str],
        dynamic: bool,
    ) -> CapturedCall:
        """Trace a call, with the sizes open that have differed so far if that has not failed before."""
        shapes = tuple(_shape(leaf) for leaf in pytree.tree_leaves((args, kwargs)))
        start = time.perf_counter()
        varying = family.varying(shapes)
        captured = None
        if varying and dynamic and family.attempts < ATTEMPTS:
            family.attempts += 1
            captured = _with_open_sizes(family, model, args, kwargs, kept, varying)
        if captured is None:
            captured = _capture(model, args, kwargs, kept)
        reason = _reason(family, varying, dynamic, captured)
        if shapes not in family.shapes:
            family.shapes.append(shapes)
        form: Literal["static", "symbolic"] = "symbolic" if captured.is_symbolic else "static"
        milliseconds = (time.perf_counter() - start) * 1e3
        self.history.append(Compilation(tuple(filter(None, shapes)), form, reason, milliseconds))
        return captured

    def _keep(self, family: _Family, captured: CapturedCall, model: nn.Module, dynamic: bool) -> None:
        """Keep a graph, forget the oldest beyond GRAPHS, and say once why there are so many."""
        family.kept.append(captured)
        del family.shapes[:-GRAPHS]
        if len(family.kept) <= GRAPHS:
            return
        del family.kept[0]
        if not family.warned:
            family.warned = True
            why = family.refusal or "sizes keep differing in new ways" if dynamic else "dynamic=False was asked for"
            warnings.warn(
                f"{type(model).__name__} has been traced for more than {GRAPHS} shapes: {why}. Pad inputs to a few"
                " sizes, or take the sizes out of forward.",
                RecompileWarning,
                stacklevel=2,
            )


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else ()


def _reason(family: _Family, varying: frozenset[tuple[int, int]], dynamic: bool, captured: CapturedCall) -> str:
    if not family.shapes:
        return "first call of its kind"
    if not dynamic:
        return "another shape, and dynamic=False"
    differ = (
        f"sizes differ: {captured.describe(varying)}" if varying else "other sizes, strides, values or gradient mode"
    )
    return f"{differ}; {family.refusal}" if family.refusal else differ


def _with_open_sizes(
    family: _Family,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kept: frozenset[str],
    varying: frozenset[tuple[int, int]],
) -> CapturedCall | None:
    """The call with open sizes, or None where the model does not allow it; the family remembers why."""
    try:
        captured = _capture(model, args, kwargs, kept, varying)
    except Exception as error:
        # Whatever goes wrong with open sizes, the call can still be traced as it is; if not, that error is raised.
        family.closed |= varying
        family.refusal = f"sizes cannot be left open: {str(error).splitlines()[0]}"
        return None
    closed = varying - captured.binder.open
    if not closed:
        return captured
    family.closed |= closed
    family.refusal = f"the forward depends on the size of {captured.describe(closed)}"
    # What was traced before a size turned out to be fixed holds it as open: the others are traced anew without it.
    remaining = varying - closed
    return _with_open_sizes(family, model, args, kwargs, kept, remaining) if remaining else None


def _capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kept: frozenset[str],
    dynamic: frozenset[tuple[int, int]] = frozenset(),
) -> CapturedCall:
    """Trace a call; the result serves both grad modes unless the model's attention tells them apart."""
    keep_freed_memory()
    grad_enabled = torch.is_grad_enabled()
    stages = capture_call(model, args, kwargs, kept, grad_enabled, dynamic)
    modes = {grad_enabled} if depends_on_grad_mode(stages) else {False, True}
    captured = CapturedCall(stages, frozenset(modes))
    if captured.is_symbolic:
        # What cannot do with open sizes has to say so before the graph is kept.
        _ = captured.forward
    return captured


def _check_devices(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse inputs that lie on another device than the parameters."""
    parameter = next(iter([*model.parameters(), *model.buffers()]), None)
    if parameter is None:
        return
    for path, leaf in pytree.tree_flatten_with_path((args, kwargs))[0]:
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.device.type != parameter.device.type:
            name = pytree.keystr(path[1:]).strip(".[]'\"")
            raise DeviceMismatchError(name=name, input_device=leaf.device, model_device=parameter.device)
