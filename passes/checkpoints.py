"""Where a forward pass can be cut: narrow places, and the modules that a user wants computed again."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from lrp_compiler.passes.errors import RecomputeError
from lrp_compiler.passes.prices import is_repeatable
from lrp_compiler.passes.program import Program, facts, forward_nodes, value_of
from lrp_compiler.passes.storage import base_of, bytes_of

ALIVE_BESIDE = 1.25
"""How many times its own bytes may be alive with a value that counts as a narrow place, itself included."""


def narrow_places(program: Program) -> list[fx.Node]:
    """The forward values beside which hardly anything is read later on, in order: the ends of residual blocks."""
    nodes = list(forward_nodes(program))
    last = _last_forward_reads(nodes)
    found, alive = [], 0
    ending: dict[int, int] = {}
    for place, node in enumerate(nodes):
        size = 0
        if node in last and node.op == "call_function" and not isinstance(value_of(node), (tuple, list)):
            size = bytes_of(value_of(node))
            alive += size
            ending[last[node]] = ending.get(last[node], 0) + size
        alive -= ending.pop(place, 0)
        if facts(node).live and size and last[node] > place and alive <= ALIVE_BESIDE * size:
            found.append(node)
    return found


def _last_forward_reads(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """Per forward value with memory of its own, the place of the last forward op that reads it, also through views."""
    found: dict[fx.Node, int] = {}
    for place, node in enumerate(nodes):
        for value in (node, *node.all_input_nodes):
            found[base_of(value)] = place
    return found


@dataclass(frozen=True)
class Regions:
    """The forward values inside of modules that are to be computed again, and those that such modules hand on."""

    inside: frozenset[fx.Node]
    ends: tuple[fx.Node, ...]


def regions_of(program: Program, globs: Iterable[str]) -> Regions:
    """The values of the modules whose paths match ``globs``, the outermost match counting; raises RecomputeError.

    What cannot be computed a second time is taken to be handed on.
    """
    owner: dict[fx.Node, str] = {}
    unmatched = set(globs)
    paths: set[str] = set()
    for node in forward_nodes(program):
        stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        paths.update(path for path in stack if path)
        for path in stack:
            matching = {glob for glob in globs if fnmatch.fnmatch(path, glob)} if path else set()
            unmatched -= matching
            if matching:
                owner.setdefault(node, path)
    if unmatched:
        raise RecomputeError(name=min(unmatched), known=", ".join(sorted(paths)) or "none")
    outputs = set(program.outputs) | {mutation.value for mutation in program.mutations}
    ends = [node for node, path in owner.items() if node.name in outputs or _leaves(node, path, owner)]
    bases = dict.fromkeys(base_of(node) for node in ends)
    return Regions(frozenset(owner) - bases.keys(), tuple(node for node in bases if node in owner))


def _leaves(node: fx.Node, path: str, owner: dict[fx.Node, str]) -> bool:
    """Whether a value is read outside of the module it was made in, or has to be kept wherever it is read."""
    outside = any(
        owner.get(user) != path for user in node.users if facts(user).part == "forward" and user.op != "output"
    )
    return outside or not (is_repeatable(node) or node.op != "call_function")
