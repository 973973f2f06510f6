"""Compiled calls: what is built once per kind of call and cached, below the module that users see."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrp_compiler.composites import AUTO, choose_composite, composite_named
from lrp_compiler.options import Options
from lrp_compiler.passes.codegen import Executable
from lrp_compiler.passes.errors import DeviceMismatchError, OptionValueError, OutputError
from lrp_compiler.passes.pipeline import (
    Stage,
    capture_call,
    compile_forward,
    depends_on_grad_mode,
    emit,
    explain,
)
from lrp_compiler.passes.program import Constant, InputKind, InputSpec, Program, Request, facts, is_float
from lrp_compiler.passes.rules.base import Composite
from lrp_compiler.registry import with_rules


@dataclass
class ExplainedCall:
    """One kind of call with its composite and attributed inputs; code is made per request."""

    stages: tuple[Stage, ...]
    executables: dict[Request, tuple[tuple[Stage, ...], Executable]] = field(default_factory=dict)

    @property
    def program(self) -> Program:
        return self.stages[-1].program

    @cached_property
    def is_random(self) -> bool:
        """Whether the forward pass draws random numbers."""
        seeded = torch.Tag.nondeterministic_seeded
        return any(seeded in getattr(node.target, "tags", ()) for node in self.program.graph.nodes)

    def emitted(self, request: Request) -> tuple[tuple[Stage, ...], Executable]:
        """All stages and the code for ``request``, made at its first use."""
        if request not in self.executables:
            self.executables[request] = emit(self.stages, request)
        return self.executables[request]

    def explainable_outputs(self) -> dict[str, int]:
        """The outputs that relevance can start from: name -> leaf index."""
        program = self.program
        nodes = program.nodes_by_name()
        found = {}
        for index, (name, leaf) in enumerate(zip(output_names(program), program.outputs, strict=True)):
            if not isinstance(leaf, Constant) and facts(nodes[leaf]).flows and is_float(nodes[leaf].meta["val"]):
                found[name] = index
        return found

    def chosen_output(self, name: str | None) -> int:
        """The output to explain: the one asked for, else ``logits``, else the first; raises OutputError."""
        outputs = self.explainable_outputs()
        known = ", ".join(outputs) or "none"
        if name is not None:
            if name not in outputs:
                raise OutputError(name=name, cause="it does not depend on an attributed input", known=known)
            return outputs[name]
        if not outputs:
            raise OutputError(name="(any)", cause="no output depends on an attributed input", known=known)
        return next((index for found, index in outputs.items() if "logits" in found), next(iter(outputs.values())))


@dataclass
class CompiledCall:
    """One kind of call: its captured graph, its forward code, and what was explained of it so far."""

    captured: tuple[Stage, ...]
    forward: Executable
    explained: dict[tuple[tuple[str, ...] | None, tuple[str, ...]], ExplainedCall] = field(default_factory=dict)


class Compiler:
    """Compiles calls of one model for one composite, and keeps what it compiled; safe to share between threads."""

    def __init__(self, composite: str | Composite, options: Options) -> None:
        self.composite = composite_named(composite) if isinstance(composite, str) and composite != AUTO else composite
        self.options = options
        if isinstance(self.composite, Composite) and self.composite.against_reference and options.reference:
            cause = f"the interpreter has no formulas for the differences that '{self.composite.name}' explains"
            raise OptionValueError(name="reference", value=True, cause=cause)
        self._calls: dict[Any, CompiledCall] = {}
        self._lock = threading.RLock()

    def call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CompiledCall:
        """The compiled form of this kind of call."""
        key = call_key(model, args, kwargs)
        grad_enabled = torch.is_grad_enabled()
        found = self._calls.get((key, grad_enabled))
        if found is not None:
            return found
        with self._lock:
            if (key, grad_enabled) not in self._calls:
                self._compile(key, grad_enabled, model, args, kwargs)
            return self._calls[key, grad_enabled]

    def _compile(
        self, key: Any, grad_enabled: bool, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Compile a call; the result serves both grad modes unless the model's attention tells them apart."""
        _check_devices(model, args, kwargs)
        captured = capture_call(model, args, kwargs, frozenset(self.options.rules), grad_enabled)
        compiled = CompiledCall(captured, compile_forward(captured))
        modes = (grad_enabled,) if depends_on_grad_mode(captured) else (False, True)
        self._calls.update({(key, mode): compiled for mode in modes})

    def explain(
        self, call: CompiledCall, attributed: tuple[str, ...] | None, varied: tuple[str, ...] = ()
    ) -> ExplainedCall:
        """``call`` with rules assigned for these attributed inputs (None: every input that can be).

        ``varied`` names the inputs that a reference run changes beside them.
        """
        key = (attributed, tuple(name for name in varied if name not in (attributed or ())))
        with self._lock:
            if key not in call.explained:
                call.explained[key] = ExplainedCall(explain(call.captured, *key, self._choose))
            return call.explained[key]

    def emitted(self, explained: ExplainedCall, request: Request) -> tuple[tuple[Stage, ...], Executable]:
        """Stages and code for one request."""
        with self._lock:
            return explained.emitted(request)

    def _choose(self, program: Program) -> Composite:
        chosen = choose_composite(program) if isinstance(self.composite, str) else self.composite
        return with_rules(chosen, self.options.rules)


def call_key(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Everything that decides what a call compiles to: arguments, parameters, training flags and autocast."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    owners: dict[int, int] = {}
    weights = []
    for name, value in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        owner = owners.setdefault(id(value), len(owners))
        weights.append((name, owner, value.shape, value.dtype, value.device, value.requires_grad))
    training = tuple(module.training for module in model.modules())
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
    autocast = tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in sorted(devices)
        if torch.amp.is_autocast_available(kind)
    )
    return tuple(map(_leaf_key, leaves)), tree, tuple(weights), training, autocast


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return ("tensor", leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    return (type(leaf), leaf)


def _check_devices(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse inputs that lie on another device than the parameters."""
    parameter = next(iter([*model.parameters(), *model.buffers()]), None)
    if parameter is None:
        return
    for path, leaf in pytree.tree_flatten_with_path((args, kwargs))[0]:
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.device.type != parameter.device.type:
            name = pytree.keystr(path[1:]).strip(".[]'\"")
            raise DeviceMismatchError(name=name, input_device=leaf.device, model_device=parameter.device)


def live_value(model: nn.Module, spec: InputSpec) -> Tensor:
    """The current value of a parameter, buffer or constant of the graph."""
    if spec.kind is InputKind.CONSTANT:
        assert spec.constant is not None
        return spec.constant
    owner, _, name = spec.target.rpartition(".")
    value: Tensor = getattr(model.get_submodule(owner), name)
    return value


def graph_inputs(program: Program, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The values of the graph's placeholders for one call."""
    leaves = iter(pytree.tree_leaves((args, kwargs)))
    return [next(leaves) if spec.kind is InputKind.USER else live_value(model, spec) for spec in program.inputs]


def output_names(program: Program) -> list[str]:
    """A name per output leaf: its path in the output tree (``logits``, ``0``, ``hidden.1``), or ``output``."""
    leaves = pytree.tree_unflatten(list(range(program.out_spec.num_leaves)), program.out_spec)
    names = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(leaves)[0]]
    cleaned = [
        name.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "").strip(".") for name in names
    ]
    return [name or "output" for name in cleaned]


def rebuild_output(program: Program, leaves: list[Any]) -> Any:
    """The model's output from its tensor leaves, in order."""
    supplied = iter(leaves)
    filled = [leaf.value if isinstance(leaf, Constant) else next(supplied) for leaf in program.outputs]
    return pytree.tree_unflatten(filled, program.out_spec)
