"""Sites: the named places whose relevance can be asked for, and how a name is resolved."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lrp_compiler.passes.branches import forward_nodes_everywhere
from lrp_compiler.passes.errors import ArgumentError, UnknownSiteError
from lrp_compiler.passes.program import Constant, Program, facts, forward_nodes, tensor_of
from lrp_compiler.passes.request import Reading

INPUT = "input"


Names = str | list[str] | tuple[str, ...] | None
"""What a user calls sites, inputs or parameters by; None means all there are."""


@dataclass(frozen=True)
class SiteRef:
    """A resolved site: its label, the nodes whose relevance it is, and whether those are embeddings of tokens."""

    label: str
    nodes: tuple[str, ...]
    is_tokens: bool = False


def site_table(program: Program) -> dict[str, SiteRef]:
    """Every site of a call: inputs, submodule outputs and ops.

    ``path`` is a submodule's output, ``path@1`` that of its second call, ``path:0`` the first of several outputs.
    """
    table: dict[str, SiteRef] = {}
    by_name = program.nodes_by_name()
    for node in forward_nodes(program):
        if node.op == "call_function" and facts(node).live and _is_single(node):
            table[node.name] = SiteRef(node.name, (node.name,))
    for label, nodes in _module_outputs(program).items():
        table[label] = SiteRef(label, nodes)
    for name, nodes in program.sources.items():
        table[name] = SiteRef(name, nodes, is_tokens=by_name[nodes[0]].op != "placeholder")
    if len(program.sources) == 1:
        (name,) = program.sources
        table[INPUT] = SiteRef(INPUT, table[name].nodes, table[name].is_tokens)
    return table


def readings_of(ref: SiteRef, kind: Reading) -> tuple[tuple[str, Reading], ...]:
    """What to read at the nodes of a site to get its ``kind``: relevance of tokens is summed over dimensions."""
    reading: Reading = "token_relevance" if ref.is_tokens and kind == "relevance" else kind
    return tuple((node, reading) for node in ref.nodes)


def value_at(parts: list[Tensor]) -> Tensor:
    """The value of one site from those of its nodes; embeddings of one token input add up."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def name_list(names: object, argument: str) -> list[str]:
    """A name, or a list or tuple of names, as a list; raises ArgumentError."""
    found = [names] if isinstance(names, str) else names
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
        function = "lrp_compiler.LRPModule.run" if argument == "wrt" else "lrp_compiler.Tape.relevance"
        raise ArgumentError(function=function, name=argument, value=names, cause="it is a name or a list of names")
    return list(found)


def resolve_sites(program: Program, names: list[str], table: dict[str, SiteRef] | None = None) -> list[SiteRef]:
    """The sites that ``names`` (exact or glob) stand for, in order; raises UnknownSiteError.

    ``table``, the program's, saves making it anew.
    """
    table = site_table(program) if table is None else table
    found: dict[str, SiteRef] = {}
    for name in names:
        if name in table:
            found[name] = table[name]
            continue
        matches = [label for label in table if is_glob(name) and fnmatch.fnmatchcase(label, name)]
        if not matches:
            raise UnknownSiteError(name=name, closest=_closest(name, program, table))
        found.update({label: table[label] for label in matches})
    return list(found.values())


def is_glob(name: str) -> bool:
    """Whether ``name`` is a pattern and may stand for several sites."""
    return any(char in name for char in "*?[")


def matching_names(known: dict[str, tuple[str, ...]], names: str | list[str] | tuple[str, ...]) -> list[str]:
    """The names that ``names`` (exact or glob) stand for; raises UnknownSiteError."""
    found: dict[str, None] = {}
    for name in name_list(names, "names"):
        matches = fnmatch.filter(known, name)
        if not matches:
            close = difflib.get_close_matches(name, known, n=3)
            raise UnknownSiteError(name=name, closest=f"Parameters alike: {', '.join(close) or ', '.join(known)}.")
        found.update(dict.fromkeys(matches))
    return list(found)


def _closest(name: str, program: Program, table: dict[str, SiteRef]) -> str:
    inside = (node.name for node in forward_nodes_everywhere(program))
    if name in inside:
        return "It lies inside a branch of torch.cond, which has sites at its operands and outputs only."
    if any(name == path for path in _all_paths(program)):
        return "That submodule has no operation of its own that depends on an attributed input."
    close = difflib.get_close_matches(name, table, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(repr(label) for label in close)}?" if close else ""


def _all_paths(program: Program) -> set[str]:
    return {path for node in forward_nodes(program) for path, _ in _calls(node).values()}


def _calls(node: fx.Node) -> dict[str, tuple[str, str]]:
    """The submodule calls a node lies in: call id -> (path, type), outermost first."""
    return {key: (path, str(kind)) for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items() if path}


def _module_outputs(program: Program) -> dict[str, tuple[str, ...]]:
    """Per submodule call, the live values that leave it."""
    returned = {leaf for leaf in program.outputs if not isinstance(leaf, Constant)}
    leaving: dict[str, list[str]] = {}
    paths: dict[str, str] = {}
    for node in forward_nodes(program):
        for call, (path, _) in _calls(node).items():
            paths.setdefault(call, path)
            outside = node.name in returned or any(call not in _calls(user) for user in node.users)
            if outside and facts(node).live and _is_single(node):
                leaving.setdefault(call, []).append(node.name)
    labels: dict[str, tuple[str, ...]] = {}
    counts: dict[str, int] = {}
    for call, path in paths.items():
        if call not in leaving:
            continue
        count = counts.get(path, 0)
        counts[path] = count + 1
        label = f"{path}@{count}" if count else path
        several = len(leaving[call]) > 1
        labels.update({f"{label}:{i}" if several else label: (name,) for i, name in enumerate(leaving[call])})
    return labels


def _is_single(node: fx.Node) -> bool:
    try:
        tensor_of(node)
    except TypeError:
        return False
    return True
