"""cast_explicitly: what autocast does to the operands of an op becomes ops of the graph.

Afterwards the graph means the same with and without autocast, and its code is run without. Which operands an op casts,
and to what, is asked of torch itself, so that no table of ops is kept here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lrp_compiler.passes.decompose import has_kernel, is_composite, is_opaque
from lrp_compiler.passes.errors import AutocastError
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.program import Program, is_float, tensor_of, value_of
from lrp_compiler.passes.regions import AUTOCAST, AutocastRegion
from lrp_compiler.passes.rewriter import Replacement, Rewriter
from lrp_compiler.passes.sizes import with_numbers
from lrp_compiler.passes.source_lines import user_source
from lrp_compiler.passes.trace import fresh

aten = torch.ops.aten


@dataclass(frozen=True)
class Autocast:
    """The settings of autocast: (device type, dtype) where it is on, and whether the cast of a parameter is kept."""

    dtypes: tuple[tuple[str, torch.dtype], ...] = ()
    keeps: bool = True

    def within(self, region: AutocastRegion) -> Autocast:
        """These settings inside a region."""
        device, dtype, enabled, keeps = region
        others = tuple((kind, lower) for kind, lower in self.dtypes if kind != device)
        lower = torch.get_autocast_dtype(device) if dtype is None else dtype
        return Autocast((*others, (device, lower)) if enabled else others, bool(keeps))

    def on(self) -> contextlib.ExitStack:
        """A context with these settings in force, in which every cast shows."""
        stack = contextlib.ExitStack()
        for device, dtype in self.dtypes:
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
        return stack


OFF = Autocast()


def current_autocast(devices: Iterable[str]) -> Autocast:
    """The settings in force for these device types."""
    able = [device for device in sorted(set(devices)) if torch.amp.is_autocast_available(device)]
    on = tuple((device, torch.get_autocast_dtype(device)) for device in able if torch.is_autocast_enabled(device))
    return Autocast(on, torch.is_autocast_cache_enabled()) if on else OFF


def is_trained(value: Any) -> bool:
    """Whether gradients end at ``value``; of those autocast keeps the casts."""
    return isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf and not value._is_view()


def without_autocast() -> contextlib.AbstractContextManager[Any]:
    """Compiled code and the compiler run as they are written, whatever the caller's settings."""
    return torch._C._DisableAutocast()


def cast_explicitly(
    program: Program,
    ambient: Autocast = OFF,
    trained: frozenset[str] = frozenset(),
    kept: frozenset[str] = frozenset(),
) -> Program:
    """The same program with autocast's casts written out; ``ambient`` are the settings outside of all regions.

    ``trained`` names the inputs that are leaves of autograd: autocast keeps their casts. Raises AutocastError for an op
    that casts inside and has a rule as a whole, as those named in ``kept`` have.
    """
    if not ambient.dtypes and not any(AUTOCAST in node.meta for node in program.graph.nodes):
        return program
    return _Caster(program.fork(), ambient, trained, kept).run()


class _Caster(Rewriter):
    """Gives every op that autocast changes operands that are cast already."""

    def __init__(self, program: Program, ambient: Autocast, trained: frozenset[str], kept: frozenset[str]) -> None:
        super().__init__(program)
        self.ambient = ambient
        self.kept = kept
        self.leaves = {spec.node for spec in program.inputs if spec.target in trained}
        self.casts: dict[tuple[str, torch.dtype], fx.Node] = {}

    def replacement(self, node: fx.Node) -> Replacement:
        if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
            return None
        settings = self.ambient
        for region in node.meta.get(AUTOCAST, ()):
            settings = settings.within(region)
        leaves, tree = pytree.tree_flatten((node.args, node.kwargs))
        if not settings.dtypes or not any(isinstance(leaf, fx.Node) for leaf in leaves):
            return None
        casts = _casts(node, settings, self.program.fake_mode)
        if casts is None:
            return self.opened(node, settings)
        if not casts:
            return None
        for place, dtype in casts.items():
            leaves[place] = self.cast(leaves[place], dtype, settings)
        args, kwargs = pytree.tree_unflatten(leaves, tree)
        with without_autocast():
            made = self.emitter.call(node.target, *args, **kwargs)
        outputs = value_of(made)
        if isinstance(outputs, torch.Tensor):
            return made
        return tuple(self.output(made, index) for index in range(len(outputs)))

    def cast(self, operand: fx.Node, dtype: torch.dtype, settings: Autocast) -> fx.Node:
        """``operand`` cast for one use; where autocast keeps the cast, so that gradients add up in it, for all uses."""
        key = (operand.name, dtype)
        lower = dict(settings.dtypes).get(tensor_of(operand).device.type)
        keeps = settings.keeps and operand.name in self.leaves and dtype == lower
        if keeps and key in self.casts:
            return self.casts[key]
        with without_autocast():
            made = self.emitter.call(aten.to.dtype, operand, dtype)
        if keeps:
            self.casts[key] = made
        return made

    def opened(self, node: fx.Node, settings: Autocast) -> Replacement:
        """The ops that a composite op calls, with casts of their own."""
        if not is_opaque(node, self.kept):
            raise AutocastError(op=op_name(node), device=settings.dtypes[0][0], source=user_source(node))
        self.emitter.provenance |= {AUTOCAST: node.meta.get(AUTOCAST, ())}
        with settings.on():
            return self.expand(node, node.target, call_with, settings, node.target, tuple(node.args), dict(node.kwargs))


def call_with(settings: Autocast, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``target(*args, **kwargs)``; it is traced with ``settings`` in force, and for each anew."""
    return target(*args, **kwargs)


def _casts(node: fx.Node, settings: Autocast, mode: FakeTensorMode) -> dict[int, torch.dtype] | None:
    """What autocast casts the operands of a call to, by place among the leaves; None if it does more than that."""
    if any(has_kernel(node, f"Autocast{torch._C._dispatch_key_for_device(device)}") for device, _ in settings.dtypes):
        changed = _Watch(node, mode, settings)
        given = _Watch(node, mode, OFF, changed.casts)
        return changed.casts if given.calls == changed.calls else None
    if not is_composite(node):
        return {}
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    floats = [place for place, leaf in enumerate(leaves) if isinstance(leaf, fx.Node) and is_float(value_of(leaf))]
    for dtype in (torch.float32, *(lower for _, lower in settings.dtypes)):
        # Of one dtype, so that what fails without autocast for operands that differ is no obstacle.
        alike = dict.fromkeys(floats, dtype)
        if _Watch(node, mode, settings, alike).calls != _Watch(node, mode, OFF, alike).calls:
            return None
    return {}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """One call of a node's op on fake tensors under some settings: what it casts of its operands, and what it calls.

    ``given`` are casts of operands that are made beforehand; then all others count as calls.
    """

    def __init__(
        self, node: fx.Node, mode: FakeTensorMode, settings: Autocast, given: dict[int, torch.dtype] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        leaves, tree = pytree.tree_flatten(with_numbers((node.args, node.kwargs)))
        self.casts: dict[int, torch.dtype] = {}
        self.calls: list[Any] = []
        with mode, without_autocast(), torch.no_grad():
            values = [fresh(value_of(leaf)) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
            for place, dtype in (given or {}).items():
                values[place] = values[place].to(dtype)
            self.places = {} if given is not None else {id(v): p for p, v in enumerate(values) if is_float(v)}
            args, kwargs = pytree.tree_unflatten(values, tree)
            with settings.on(), self:
                node.target(*args, **kwargs)  # type: ignore[operator]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = self.places.get(id(args[0])) if args else None
        if func is aten._to_copy.default and place is not None and "dtype" in kwargs and not self.calls:
            self.casts[place] = kwargs["dtype"]
        elif func is not torch.ops.prim.device.default:
            self.calls.append((func, *(leaf.dtype for leaf in pytree.tree_leaves((args, kwargs)) if is_float(leaf))))
        return func(*args, **kwargs)
