"""A zennit Composite as one of ours: each module's hook becomes our rule for the ops that module calls.

Where zennit has no hook it lets the plain gradient through; there we keep our own rules (sums, norms, attention). Hooks
hold their parameters in closures, so those are read from the hook's functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lrp_compiler.composites import BASE
from lrp_compiler.passes.errors import CompositeError
from lrp_compiler.passes.optable import OpClass
from lrp_compiler.passes.rules.absolute import NormIdentity
from lrp_compiler.passes.rules.base import Composite, Matcher, Rule, on
from lrp_compiler.passes.rules.elementwise import BetaSmooth, DeconvNet, GuidedBackprop, Identity
from lrp_compiler.passes.rules.gradient import Gradient
from lrp_compiler.passes.rules.norm import BatchNorm
from lrp_compiler.passes.rules.plain import Epsilon, Plain
from lrp_compiler.passes.rules.signsplit import AlphaBeta, Gamma, ZPlus
from lrp_compiler.passes.rules.terminal import Bound, Flat, WSquare, ZBox

Line = tuple[Matcher, Rule]
GRADIENT_HOOKS = frozenset({"ReLUDeconvNet", "ReLUGuidedBackprop", "ReLUBetaSmooth"})


def is_zennit_composite(given: object) -> bool:
    """Whether ``given`` looks like a zennit.core.Composite."""
    return type(given).__module__.startswith("zennit.") and callable(getattr(given, "module_map", None))


def translate(composite: Any, model: nn.Module) -> Composite:
    """Our composite for ``model`` from a zennit composite; raises CompositeError for a hook it has no rule for."""
    context: dict[str, Any] = {}
    lines: list[Line] = []
    folded = any("MergeBatchNorm" in type(part).__name__ for part in composite.canonizers)
    hooks = [(name, composite.module_map(context, name, module)) for name, module in model.named_modules()]
    for name, hook in hooks:
        if hook is not None:
            lines += _lines(name, hook, folded)
    name = type(composite).__name__
    if any(type(hook).__name__ in GRADIENT_HOOKS for _, hook in hooks):
        return Composite(name, (*lines, (on(), Gradient())), readout="coefficient", conserves=False, patterns=False)
    return Composite(name, (*lines, *BASE))


def _lines(path: str, hook: Any, folded: bool) -> list[Line]:
    """The lines for one module."""
    kind = type(hook).__name__
    if kind == "Pass":
        norm: Rule = BatchNorm() if folded else NormIdentity()
        return [(on(OpClass.ACTIVATION, path=path), Identity()), (on(OpClass.BATCH_NORM, path=path), norm)]
    if kind == "Norm":
        return [(on(OpClass.REDUCTION, OpClass.ADD, OpClass.MOVEMENT, path=path), Plain())]
    if kind in GRADIENT_HOOKS:
        return [(on(OpClass.ACTIVATION, path=path), RULES[kind](hook))]
    if kind not in RULES:
        raise CompositeError(composite=kind, cause=f"the zennit hook of '{path}' has no rule of ours")
    return [(on(OpClass.LINEAR, path=path), RULES[kind](hook))]


def _held(hook: Any, name: str) -> Any:
    """A parameter by name from the closures of a hook's functions and parameter modifiers."""
    modifiers = [getattr(modifier, "modifier", modifier) for modifier in hook.param_modifiers]
    for function in (hook.gradient_mapper, hook.reducer, *hook.input_modifiers, *modifiers):
        found = inspect.getclosurevars(inspect.unwrap(function)).nonlocals
        if name in found:
            return found[name]
    raise CompositeError(composite=type(hook).__name__, cause=f"it holds no {name}")


def _epsilon(hook: Any) -> float:
    """The stabiliser's epsilon; a stabiliser that clips or scales is another rule."""
    stabiliser = _held(hook, "stabilizer_fn")
    if getattr(stabiliser, "clip", False) or getattr(stabiliser, "norm_scale", False):
        raise CompositeError(composite=type(hook).__name__, cause="its stabiliser clips or scales")
    return float(stabiliser.epsilon)


def _bound(hook: Any, name: str) -> Bound:
    """A z-box bound: a number, or a tensor that broadcasts to the input."""
    bound = _held(hook, name)
    return bound if isinstance(bound, Tensor) else float(bound)


RULES: dict[str, Callable[[Any], Rule]] = {
    "Epsilon": lambda hook: Epsilon(epsilon=_epsilon(hook)),
    "ZPlus": lambda hook: ZPlus(epsilon=_epsilon(hook)),
    "AlphaBeta": lambda hook: AlphaBeta(epsilon=_epsilon(hook), alpha=_held(hook, "alpha"), beta=_held(hook, "beta")),
    "Gamma": lambda hook: Gamma(epsilon=_epsilon(hook), gamma=_held(hook, "gamma")),
    "ZBox": lambda hook: ZBox(low=_bound(hook, "low"), high=_bound(hook, "high")),
    "Flat": lambda hook: Flat(),
    "WSquare": lambda hook: WSquare(),
    "ReLUDeconvNet": lambda hook: DeconvNet(),
    "ReLUGuidedBackprop": lambda hook: GuidedBackprop(),
    "ReLUBetaSmooth": lambda hook: BetaSmooth(beta=hook.beta_smooth),
}
"""zennit hook class -> our rule with its parameters."""
