"""Putting a kernel form in the place of ops: which nodes go, what computes them instead, and whether that may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from lrp_compiler.kernels.registry import spec_of
from lrp_compiler.kernels.spec import NotSupportedError
from lrp_compiler.passes.emitter import PROMISES
from lrp_compiler.passes.matching import Match
from lrp_compiler.passes.optable import OpClass, classify, op_name
from lrp_compiler.passes.program import FACTS, Program, facts, output_node
from lrp_compiler.passes.trace import EMISSION, Emitter

Form = Callable[..., Any]
"""Plain torch code with calls of KernelSpecs in it; raises NotSupportedError where no kernel takes the call."""


@dataclass(frozen=True)
class Replacement:
    """``form(*arguments)`` gives what the nodes ``replaced`` hold, leaf by leaf; None for what nothing reads.

    ``inside`` are all ops that are no longer needed, as far as nothing else reads them.
    """

    form: Form
    arguments: tuple[Any, ...]
    replaced: Sequence[fx.Node | None]
    inside: frozenset[fx.Node]

    @property
    def results(self) -> list[fx.Node]:
        """The nodes that are replaced."""
        return [node for node in self.replaced if node is not None]

    def apply(self, program: Program) -> tuple[str, ...]:
        """Emit the form and use its results; the names of its kernels. Raises NotSupportedError."""
        self._check_inside()
        before = min(user for node in self.results for user in node.users)
        for node in pytree.tree_leaves(self.arguments):
            if isinstance(node, fx.Node) and not node < before:
                if node.target not in PROMISES:
                    raise NotSupportedError("an operand is made only after a result is read")
                # A promise may be made as early as one likes.
                before.prepend(node)
        start = before.prev
        made = pytree.tree_leaves(emitter_like(program, self.results[0], before)(self.form, *self.arguments))
        for old, new in zip(self.replaced, made, strict=True):
            if old is not None:
                old.replace_all_uses_with(new)
        return _kernels_between(start, before)

    def _check_inside(self) -> None:
        """Products whose value something else reads are not worth computing twice."""
        for node in self.inside.difference(self.results):
            readers = sorted({facts(user).origin for user in node.users if user not in self.inside})
            if readers and _is_product(node):
                raise NotSupportedError(f"what it computes inside is read by {', '.join(readers)} as well")


def replacement_of(match: Match, form: Form, arguments: tuple[Any, ...] | None = None) -> Replacement:
    """A form in the place of all results of a match; raises NotSupportedError where the match is not whole."""
    check_whole(match)
    leaves = pytree.tree_leaves(output_node(match.emission.traced.graph).args[0])
    results = [match.results.get(leaf) for leaf in leaves]
    replaced = [node if node is not None and node.users else None for node in results]
    given = match.arguments if arguments is None else arguments
    return Replacement(form, given, replaced, frozenset(match.members))


def check_whole(match: Match) -> None:
    """Raise NotSupportedError where the ops of a match do not stand as they were emitted."""
    if not match.is_whole():
        raise NotSupportedError("other passes have rewritten its ops")


def emitter_like(program: Program, like: fx.Node, before: fx.Node) -> Emitter:
    """Emits in front of ``before`` what belongs to the op that ``like`` belongs to."""
    provenance = {key: value for key, value in like.meta.items() if key not in ("val", FACTS, EMISSION)}
    return Emitter(program.graph, program.fake_mode, before, program.traces, facts(like), provenance)


def _is_product(node: fx.Node) -> bool:
    entry = classify(node)
    return (entry is not None and entry.op_class is OpClass.LINEAR) or "convolution" in op_name(node)


def _kernels_between(start: fx.Node, end: fx.Node) -> tuple[str, ...]:
    """The dialect ops that were emitted behind ``start`` and in front of ``end``."""
    names = []
    node = start.next
    while node is not end:
        if (spec := spec_of(node.target)) is not None:
            names.append(spec.name)
        node = node.next
    return tuple(names)
