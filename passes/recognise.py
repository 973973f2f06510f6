"""recognise: groups of ops that are one op to relevance (RMSNorm, tanh GELU) get a pattern; the graph stays as it is.

Replacing the ops would change the forward's rounding, so the last op of a group is marked with what it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.utils.matcher_utils import InternalMatch, SubgraphMatcher

from lrp_compiler.passes.program import Pattern, Program, facts, learn
from lrp_compiler.passes.recognise_scan import recognise_scans
from lrp_compiler.passes.recognise_state_products import recognise_state_products

ANY_NUMBER = 0.8125
"""A literal in a template that stands for any number (a norm's epsilon)."""


@dataclass(frozen=True)
class Template:
    """One spelling of a pattern as a torch function of its input; ``saved`` names ops whose values rules read."""

    kind: str
    spelling: Callable[[Tensor], Tensor]
    saved: tuple[Any, ...] = ()


def _rms_norm_pow(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + ANY_NUMBER)


def _rms_norm_square(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + ANY_NUMBER)


def _rms_norm_product(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + ANY_NUMBER)


def _rms_norm_of_torch(x: Tensor) -> Tensor:
    return x * torch.rsqrt(torch.ops.aten.add.Scalar(x.pow(2).mean(-1, keepdim=True), ANY_NUMBER))


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


RSQRT = torch.ops.aten.rsqrt.default
TEMPLATES = (
    Template("rms_norm", _rms_norm_pow, (RSQRT,)),
    Template("rms_norm", _rms_norm_square, (RSQRT,)),
    Template("rms_norm", _rms_norm_product, (RSQRT,)),
    Template("rms_norm", _rms_norm_of_torch, (RSQRT,)),
    Template("gelu_tanh", _gelu_new),
    Template("gelu_tanh", _gelu_fast),
)


def recognise(program: Program) -> Program:
    """The same graph; the last node of each recognised group carries its Pattern."""
    program = program.fork()
    present = {node.target for node in program.graph.nodes}
    for template in TEMPLATES:
        spelled = _template_graph(template.spelling)
        if all(node.target in present for node in spelled.nodes if node.op == "call_function"):
            for match in SubgraphMatcher(spelled, ignore_literals=True).match(program.graph):
                _mark(template, match)
    recognise_scans(program)
    recognise_state_products(program)
    return program


@cache
def _template_graph(spelling: Callable[[Tensor], Tensor]) -> fx.Graph:
    traced = make_fx(spelling, pre_dispatch=True)(torch.ones(2, 3))
    traced.graph.eliminate_dead_code()
    return traced.graph


def _mark(template: Template, match: InternalMatch) -> None:
    pairs = [(pattern, node) for pattern, node in match.nodes_map.items() if pattern.op == "call_function"]
    if not all(_literals_agree(pattern, node) for pattern, node in pairs):
        return
    (root,) = match.returning_nodes
    members = tuple(sorted(node.name for _, node in pairs if node is not root))
    saved = tuple(node.name for target in template.saved for _, node in pairs if node.target is target)
    inputs = tuple(node.name for node in match.placeholder_nodes)
    if facts(root).pattern is None:
        learn(root, pattern=Pattern(template.kind, inputs, saved, members))


def _literals_agree(pattern: fx.Node, node: fx.Node) -> bool:
    """Whether the constant arguments of ``node`` are the template's, numbers to seven digits."""
    if len(pattern.args) != len(node.args):
        return False
    return all(_agree(expected, found) for expected, found in zip(pattern.args, node.args, strict=True))


def _agree(expected: Any, found: Any) -> bool:
    if isinstance(expected, fx.Node):
        return isinstance(found, fx.Node)
    if isinstance(expected, float) and expected == ANY_NUMBER:
        return isinstance(found, (int, float))
    if isinstance(expected, list):
        # Over which dimensions a norm takes its mean does not change its rule.
        return isinstance(found, list)
    if isinstance(expected, (int, float)) and isinstance(found, (int, float)):
        return math.isclose(expected, found, rel_tol=1e-7)
    return bool(expected == found)
