"""Rules that user code adds for ops: for one compile (``rules=``) or for the process (``@register_rule``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lrp_compiler.passes.errors import DuplicateRuleError, OptionValueError
from lrp_compiler.passes.rules.base import Composite, Matcher, Rule
from lrp_compiler.passes.rules.user import RuleFunction, UserRule

GivenRule = RuleFunction | Rule
"""What users may give for an op: a function of coefficients, or one of the library's rule objects."""


class RuleRegistry:
    """Op name -> rule function; refuses a second rule for an op unless told to replace the first."""

    def __init__(self) -> None:
        self._rules: dict[str, GivenRule] = {}

    def add(self, target: Any, fn: RuleFunction, *, replace: bool = False) -> None:
        """Register ``fn`` for an OpOverload or OpOverloadPacket (all its overloads); raises DuplicateRuleError."""
        name = target_name(target)
        if name in self._rules and not replace:
            raise DuplicateRuleError(op=name)
        self._rules[name] = fn

    def remove(self, target: Any) -> None:
        """Forget the rule of an op; KeyError when it has none."""
        del self._rules[target_name(target)]

    def snapshot(self) -> dict[str, GivenRule]:
        """The rules as they are now; what is registered later does not reach modules compiled before."""
        return dict(self._rules)


REGISTRY = RuleRegistry()
"""The rules of this process, filled by register_rule only."""


def register_rule(*targets: Any, replace: bool = False) -> Callable[[RuleFunction], RuleFunction]:
    """Give ops a rule in every composite: decorate ``(c, out, *args, **kwargs) -> coefficients of the inputs``.

    ``c`` is the coefficient of the output (R = out * c); return one coefficient per tensor argument, of its shape,
    or None where nothing flows. The body is plain torch code and is traced, so it must not branch on values.
    Raises DuplicateRuleError when an op has one already and ``replace`` is not given.
    """

    def decorate(fn: RuleFunction) -> RuleFunction:
        for target in targets:
            REGISTRY.add(target, fn, replace=replace)
        return fn

    return decorate


def target_name(target: Any) -> str:
    """``aten::sinc`` for torch.ops.aten.sinc and torch.ops.aten.sinc.default."""
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return str(schema.name)
    name = getattr(target, "_qualified_op_name", None)
    if name is None:
        raise OptionValueError(name="rules", value=target, cause="not an operator such as torch.ops.aten.sinc")
    return str(name)


def rule_of(given: GivenRule) -> Rule:
    """A rule object as it is, a function as the rule it writes."""
    return given if isinstance(given, Rule) else UserRule(given)


def with_rules(composite: Composite, rules: Mapping[str, GivenRule]) -> Composite:
    """``composite`` with user rules tried first."""
    if not rules:
        return composite
    lines = tuple((Matcher(target=name), rule_of(given)) for name, given in rules.items())
    return composite.override(*lines, name=composite.name)
