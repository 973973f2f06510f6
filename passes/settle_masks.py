"""settle_masks: attention masks that no input decides -> none at all, or "causal", where that is what they say.

Libraries build masks of all positions while they are traced, and leave them out when they run; fused attention skips
what "causal" hides, but reads every entry of a mask. On CPU outputs stay bitwise equal; on a GPU a mask that the model
itself gives may have kept torch from another kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.node import map_aggregate

from lrp_compiler.passes.canonicalise import SDPA, bound, eager_attention_is_flash
from lrp_compiler.passes.deferral import GENERATOR_READERS, drop_dead_nodes
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.program import Program, tensor_of
from lrp_compiler.passes.sizes import is_settled

NO_MASK = {"attn_mask": None}
CAUSAL = {"attn_mask": None, "is_causal": True}


def settle_masks(program: Program, kept: frozenset[str] = frozenset()) -> Program:
    """The same attention with fewer masks; ops named in ``kept`` (``aten::x``) stay as they are."""
    found = _Masks(program)
    settled = {
        node.name: options
        for node in program.graph.nodes
        if node.target is SDPA and op_name(node) not in kept and (options := found.said_by(node)) is not None
    }
    if not settled:
        return program
    program = program.fork()
    for node in program.graph.nodes:
        if node.name in settled:
            given = bound(node) | settled[node.name]
            named = {name: given.pop(name) for name in ("scale", "enable_gqa")}
            node.args, node.kwargs = tuple(given.values()), named
    drop_dead_nodes(program.graph, kept=GENERATOR_READERS)
    return program


class _Masks:
    """What the masks of a program hold, evaluated once each."""

    def __init__(self, program: Program) -> None:
        self.constants = {spec.node: spec.constant for spec in program.inputs if spec.constant is not None}
        self.values: dict[fx.Node, Any] = {}
        self.said: dict[fx.Node, dict[str, Any] | None] = {}

    def said_by(self, node: fx.Node) -> dict[str, Any] | None:
        """The options of an attention op that say the same as its mask; None where there are none, or not known."""
        given = bound(node)
        mask = given["attn_mask"]
        if mask is None or given["is_causal"] or not _fits(mask, given["query"], given["key"]):
            return None
        if mask not in self.said:
            self.said[mask] = self.read(mask) if self.is_known(mask) else None
        options = self.said[mask]
        return options if options is not None and _runs_as_before(given, given | options) else None

    def read(self, mask: fx.Node) -> dict[str, Any] | None:
        with unset_fake_temporarily(), torch.no_grad():
            value = self.value(mask)
            self.values.clear()
            allowed = value if value.dtype == torch.bool else value == 0
            if value.dtype != torch.bool and not bool((allowed | (value == float("-inf"))).all()):
                return None
            if bool(allowed.all()):
                return NO_MASK
            rows, columns = value.shape[-2:]
            if rows != columns:
                return None
            causal = torch.ones(rows, columns, dtype=torch.bool, device=value.device).tril()
            return CAUSAL if bool((allowed == causal).all()) else None

    def is_known(self, node: fx.Node) -> bool:
        """Whether a value is made of constants alone, in settled sizes."""
        seen: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            current = waiting.pop()
            if current in seen:
                continue
            seen.add(current)
            if current.op == "placeholder":
                constant = self.constants.get(current.name)
                if constant is None or isinstance(constant, FakeTensor) or constant.is_meta:
                    return False
            elif not _is_evaluated(current):
                return False
            waiting += current.all_input_nodes
        return True

    def value(self, node: fx.Node) -> Any:
        if node not in self.values:
            if node.op == "placeholder":
                self.values[node] = self.constants[node.name]
            else:
                args, kwargs = map_aggregate((node.args, node.kwargs), self.given)
                self.values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                for operand in node.all_input_nodes:
                    # Of long sequences each may take gigabytes.
                    if len(operand.users) == 1:
                        del self.values[operand]
        return self.values[node]

    def given(self, leaf: Any) -> Any:
        return self.value(leaf) if isinstance(leaf, fx.Node) else leaf


def _fits(mask: fx.Node, query: fx.Node, key: fx.Node) -> bool:
    """Whether a mask makes the result no larger: it has the sizes of the scores, or 1, and no further ones."""
    scores = (*tensor_of(query).shape[:-1], tensor_of(key).shape[-2])
    sizes = tensor_of(mask).shape
    if not 2 <= len(sizes) <= len(scores) or not all(map(is_settled, sizes)):
        return False
    pairs = zip(sizes, scores[-len(sizes) :], strict=True)
    return all(size == 1 or (is_settled(score) and size == score) for size, score in pairs)


def _runs_as_before(given: dict[str, Any], settled: dict[str, Any]) -> bool:
    """Whether torch takes the same path on CPU, so that no bit changes; some masks keep it from the fused one."""
    if tensor_of(given["query"]).device.type != "cpu":
        return True
    return eager_attention_is_flash(given) == eager_attention_is_flash(settled)


def _is_evaluated(node: fx.Node) -> bool:
    """Whether an op gives the same at every call, of a shape that is known now."""
    value = node.meta.get("val")
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    if not isinstance(value, Tensor) or value.device.type == "meta" or node.target._schema.is_mutable:
        return False
    return all(map(is_settled, value.shape))
