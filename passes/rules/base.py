"""What a rule and a composite are; the rules themselves lie beside this file, one family each."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, fx

from lrp_compiler.passes.errors import CompositeError, ParameterRelevanceError
from lrp_compiler.passes.optable import OpClass, op_name
from lrp_compiler.passes.program import facts, module_path

if TYPE_CHECKING:
    from lrp_compiler.passes.operation import Operand, Operation
    from lrp_compiler.passes.site import Site

EdgeKind = Literal["coefficient", "relevance"]
Edges = dict["Operand", fx.Node]
Sinks = dict[str, fx.Node]


class Rule:
    """How an op turns the edge of its output into edges of the operands that relevance can flow to.

    ``kind`` is the edge kind a rule takes and gives; ``linear_in_seed`` says whether twice the edge gives twice the
    edges, which all rules but filters do; a rule that ``folds_batch_norm`` takes a batch norm that follows
    its op as part of it; one that is ``real_only`` asks for signs, which complex values have not. One that goes
    ``by_row`` hands on the edge of each row of the output whatever the others get, so that rows without an edge can be
    left out; it is linear in the seed, since a row may be there twice. That is not inherited: what a subclass does is
    not known. Subclasses are
    frozen dataclasses, so that two rules with the same parameters are equal; those that hold tensors equal themselves
    alone.
    """

    name: ClassVar[str] = "rule"
    kind: ClassVar[EdgeKind] = "coefficient"
    folds_batch_norm: ClassVar[bool] = False
    linear_in_seed: ClassVar[bool] = True
    real_only: ClassVar[bool] = False
    by_row: ClassVar[bool] = False

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        """The operands this rule hands relevance to, among those it can flow to."""
        return op.flowing

    def tensors(self, op: Operation) -> dict[str, Tensor]:
        """The tensors this rule brings along for ``op``, by name; ``site.tensor`` reads them where relevance runs.

        Raises RuleParameterError when one does not fit the op.
        """
        return {}

    def propagate(self, site: Site, edge: Any) -> Edges:
        """Emit the edges of the receivers; ``edge`` is a node, or one per output for multi-output ops."""
        raise NotImplementedError

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        """Emit what leaves the graph here, by name, as tensors that sum to it."""
        return {}

    def parameter_edges(self, site: Site, edge: Any, parameters: tuple[Operand, ...]) -> Edges:
        """Emit the coefficients of operands that relevance does not flow to but that come from parameters.

        They give the same relevance once more, from the other factor's side. Raises ParameterRelevanceError for none.
        """
        names = ", ".join(facts(operand.node).origin or operand.node.name for operand in parameters)
        raise ParameterRelevanceError(rule=self, op=site.op, names=names)

    def map_share(self, op: Operation) -> float:
        """Of an attention op's relevance the part that reaches its map; the rest is the values'."""
        return 0.0

    def __str__(self) -> str:
        return self.name


def is_by_row(rule: Rule) -> bool:
    """Whether a rule says of itself that it goes by row."""
    return rule.linear_in_seed and bool(vars(type(rule)).get("by_row", False))


@dataclass(frozen=True)
class Matcher:
    """Which ops a composite's line is for: every condition that is given has to hold.

    ``target`` is a table name such as ``aten::relu``; ``path`` a glob over module paths; ``module_type`` the class
    name of an enclosing module; ``non_negative`` whether the first value that relevance flows to is known not to be
    negative; ``where`` any further test of the operation; ``first`` and ``last`` take only the first or last op, in
    graph order, that meets the rest and has no earlier line.
    """

    op_classes: frozenset[OpClass] | None = None
    target: str | None = None
    path: str | None = None
    module_type: str | None = None
    non_negative: bool | None = None
    where: Callable[[Operation], bool] | None = None
    first: bool = False
    last: bool = False

    def __post_init__(self) -> None:
        for op_class in self.op_classes or ():
            if not isinstance(op_class, OpClass):
                raise CompositeError(composite="a matcher", cause=f"{op_class!r} is not one of rules.OpClass")

    def matches(self, op: Operation) -> bool:
        node = op.node
        return (
            (self.op_classes is None or op.op_class in self.op_classes)
            and (self.target is None or op_name(node) == self.target)
            and (self.path is None or fnmatch.fnmatchcase(module_path(node), self.path))
            and (self.module_type is None or self.module_type in _enclosing_types(node))
            and (self.non_negative is None or self.non_negative == _reads_non_negative(op))
            and (self.where is None or self.where(op))
        )


def _reads_non_negative(op: Operation) -> bool:
    return facts(op.flowing[0].node).non_negative


def _enclosing_types(node: fx.Node) -> set[str]:
    stack = node.meta.get("nn_module_stack") or {}
    return {str(kind).rpartition(".")[2].rstrip("'>") for _, kind in stack.values()}


def on(*op_classes: OpClass, **conditions: Any) -> Matcher:
    """A matcher for ops of these classes."""
    return Matcher(op_classes=frozenset(op_classes) if op_classes else None, **conditions)


Takers = dict[Matcher, frozenset[str]]


@dataclass
class Chosen:
    """Which op each first and last matcher takes; ``last`` is known only after every op has been seen once.

    Of a torch.cond each branch may have one, since a call runs one of them. ``scope`` precedes the names of ops
    inside a branch.
    """

    first: Takers = field(default_factory=dict)
    last: Takers = field(default_factory=dict)
    seen: Takers = field(default_factory=dict)
    scope: str = ""

    def takes(self, matcher: Matcher, op: Operation) -> bool:
        """Whether ``matcher``, which matches ``op``, is the one to decide on it."""
        name = self.scope + op.name
        if matcher.first:
            return name in self.first.setdefault(matcher, frozenset({name}))
        if matcher.last:
            self.seen[matcher] = frozenset({name})
            return name in self.last.get(matcher, ())
        return True

    def inside(self, scope: str) -> Chosen:
        """The choice as one branch sees it."""
        return Chosen(dict(self.first), self.last, {}, self.scope + scope)

    def leave(self, branches: list[Chosen]) -> None:
        """Take over what the branches chose: the first of each, and as last that of each."""
        for name in ("first", "seen"):
            found: dict[Matcher, frozenset[str]] = {}
            for branch in branches:
                for matcher, taken in getattr(branch, name).items():
                    found[matcher] = found.get(matcher, frozenset()) | taken
            getattr(self, name).update(found)


@dataclass(frozen=True)
class Composite:
    """A named, ordered list of (matcher, rule): the first line that matches an op decides.

    ``readout`` says what the result is: ``relevance`` (activation times coefficient) or ``coefficient``.
    ``conserves`` says whether every sink has a name, so that the ledger can be demanded to close. With
    ``against_reference`` relevance is a share of the difference a - a0 from a reference run on baseline inputs. Without
    ``patterns`` recognised groups (RMSNorm, tanh GELU) are treated op by op. ``reason`` says why "auto" chose it.
    """

    name: str
    lines: tuple[tuple[Matcher, Rule], ...]
    readout: EdgeKind = "relevance"
    conserves: bool = True
    patterns: bool = True
    against_reference: bool = False
    reason: str = ""

    def __post_init__(self) -> None:
        lines = self.lines if isinstance(self.lines, (tuple, list)) else (self.lines,)
        for line in lines:
            pair = line if isinstance(line, (tuple, list)) and len(line) == 2 else (None, None)
            if not isinstance(pair[0], Matcher) or not isinstance(pair[1], Rule):
                raise CompositeError(
                    composite=repr(self.name), cause=f"its line {line!r} is not a pair (Matcher, Rule)"
                )

    def rule_for(self, op: Operation, chosen: Chosen) -> Rule | None:
        """The rule of the first line that matches, or None; ``chosen`` knows the ops that matchers of one op take."""
        for matcher, rule in self.lines:
            if matcher.matches(op) and chosen.takes(matcher, op):
                return rule
        return None

    def override(self, *lines: tuple[Matcher, Rule], name: str | None = None) -> Composite:
        """This composite with lines that are tried before its own."""
        return replace(self, name=name or f"{self.name}+", lines=(*lines, *self.lines))
