"""Baselines: what users give for the reference run, as one tensor per input that differs in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrp_compiler.passes.errors import BaselineError
from lrp_compiler.passes.program import InputKind, InputSpec, Program, is_float

Baseline = Tensor | float | None
"""A tensor that broadcasts to its input, a number for every entry, or None for zeros."""

Baselines = Baseline | dict[str, Baseline]
"""One baseline for every attributed input, or baselines by input name."""


def named_inputs(baselines: Baselines) -> tuple[str, ...]:
    """The inputs whose baselines are given by name."""
    return tuple(baselines) if isinstance(baselines, dict) else ()


def by_input_name(baselines: Any, names: list[str]) -> Baselines:
    """Baselines as ``attribute`` takes them, by input name; raises BaselineError."""
    if not isinstance(baselines, (tuple, list)):
        return baselines  # type: ignore[no-any-return]
    if len(baselines) != len(names):
        cause = f"{len(baselines)} for {len(names)} input(s)"
        raise BaselineError(name="baselines", cause=cause, remedy="Give one baseline for each input.")
    return dict(zip(names, baselines, strict=True))


def reference_inputs(program: Program, inputs: list[Any], baselines: Baselines) -> dict[str, Tensor]:
    """By node name, what the inputs that differ in the reference run are there, in the form of this run's ``inputs``.

    Empty for composites without a reference run. Raises BaselineError.
    """
    composite = program.composite
    if composite is None or not composite.against_reference:
        if baselines is not None:
            name = "chosen" if composite is None else composite.name
            cause = f"the composite '{name}' has no reference run"
            raise BaselineError(
                name="baselines", cause=cause, remedy="Use composite 'deep_lift', or give no baselines."
            )
        return {}
    if isinstance(baselines, Tensor) and len(program.varied) > 1:
        cause = f"one tensor for {len(program.varied)} attributed inputs ({', '.join(program.varied)})"
        raise BaselineError(name="baselines", cause=cause, remedy="Give a dict from input names to baselines.")
    specs = {spec.target: (spec, value) for spec, value in zip(program.inputs, inputs, strict=True) if _is_user(spec)}
    found = {}
    for name in program.varied:
        spec, value = specs[name]
        given = baselines.get(name) if isinstance(baselines, dict) else baselines
        found[spec.node] = _like(name, value, given)
    _check_pins(program, {spec.node: name for name, (spec, _) in specs.items()}, found)
    return found


def _check_pins(program: Program, names: dict[str, str], found: dict[str, Tensor]) -> None:
    """Values that the compiled code holds as constants are the same in both runs; raises BaselineError."""
    for pin in program.pins:
        if pin.input in found and not torch.equal(found[pin.input], pin.value):
            raise BaselineError(
                name=names[pin.input],
                cause="the model reads sizes or places from it, which have to be the same in both runs",
                remedy="Leave it out of the baselines and of wrt.",
            )


def _is_user(spec: InputSpec) -> bool:
    return spec.kind is InputKind.USER


def _like(name: str, value: Tensor, baseline: Any) -> Tensor:
    """``baseline`` with the shape, dtype and strides of the input ``value``."""
    if isinstance(baseline, Tensor):
        _check_tensor(name, value, baseline)
    elif baseline is None and not is_float(value):
        remedy = f"Give ids for every token, such as those of padding: baselines={{'{name}': ids}}."
        raise BaselineError(name=name, cause=f"{value.dtype} ids have no natural zero", remedy=remedy)
    elif baseline is not None and (isinstance(baseline, bool) or not isinstance(baseline, (int, float))):
        raise BaselineError(name=name, cause=f"a {type(baseline).__name__}", remedy="Give a tensor or a number.")
    elif isinstance(baseline, float) and not is_float(value):
        raise BaselineError(name=name, cause=f"a float for ids of {value.dtype}", remedy="Give an integer.")
    # The compiled code may rely on the input's strides.
    made = torch.empty_like(value, requires_grad=False)
    with torch.no_grad():
        return made.copy_(baseline) if isinstance(baseline, Tensor) else made.fill_(baseline or 0)


def _check_tensor(name: str, value: Tensor, baseline: Tensor) -> None:
    """A baseline has its input's dtype and device and broadcasts to its shape; raises BaselineError."""
    for kind, got, expected in (
        ("dtype", baseline.dtype, value.dtype),
        ("device", baseline.device, value.device),
    ):
        if got != expected:
            remedy = f"Convert it: baseline.to(device='{value.device}', dtype={value.dtype})."
            raise BaselineError(name=name, cause=f"its {kind} is {got}, the input's is {expected}", remedy=remedy)
    try:
        baseline.expand(value.shape)
    except RuntimeError:
        cause = f"shape {tuple(baseline.shape)} does not broadcast to {tuple(value.shape)}"
        remedy = "Give one baseline for each sample, or one with a batch of 1 for all."
        raise BaselineError(name=name, cause=cause, remedy=remedy) from None
