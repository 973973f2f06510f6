"""Code whose results autograd can differentiate: plain forms of fused ops, and what has no derivative at all.

Torch returns some results as if they were constants (the statistics of norms, attention's log-sum-exp) and has no
derivative of some fused ops. Neither may pass for a gradient of zero: what has no plain form here is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from lrp_compiler.kernels.attention import attention_backward
from lrp_compiler.kernels.gates import hardsigmoid_backward, log_sigmoid_backward, mish_backward, silu_backward
from lrp_compiler.kernels.linear import grouped_weights_by_group
from lrp_compiler.kernels.norm_statistics import (
    batch_norm,
    batch_norm_backward,
    group_norm,
    group_norm_backward,
    layer_norm,
    layer_norm_backward,
)
from lrp_compiler.kernels.recurrent import pull_back
from lrp_compiler.kernels.registry import spec_of
from lrp_compiler.passes.branches import ConditionalRelevance
from lrp_compiler.passes.errors import NotDifferentiableError
from lrp_compiler.passes.optable import GROUPED_PRODUCT, OpClass, classify, schema_name
from lrp_compiler.passes.program import InputKind, Program, copy_graph, facts, is_float, value_of
from lrp_compiler.passes.share_memory import IN_PLACE, IN_PLACE_FORWARD
from lrp_compiler.passes.sizes import at_hints, hints
from lrp_compiler.passes.source_lines import user_source

aten = torch.ops.aten


@dataclass(frozen=True)
class Plain:
    """A function that takes a fused op's place; it needs none of the arguments at the positions ``unread``."""

    function: Callable[..., Any]
    unread: tuple[int, ...] = ()


PLAIN: dict[str, Plain] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": Plain(attention_backward, unread=(4, 5)),
    f"{GROUPED_PRODUCT}_backward": Plain(grouped_weights_by_group),
    "aten::native_layer_norm_backward": Plain(layer_norm_backward),
    "aten::native_batch_norm_backward": Plain(batch_norm_backward),
    "aten::native_group_norm_backward": Plain(group_norm_backward),
    "aten::silu_backward": Plain(silu_backward),
    "aten::mish_backward": Plain(mish_backward),
    "aten::hardsigmoid_backward": Plain(hardsigmoid_backward),
    "aten::log_sigmoid_backward": Plain(log_sigmoid_backward, unread=(2,)),
    "lrp::recurrent_pullback": Plain(pull_back),
}
"""Fused op that torch cannot differentiate (again) -> the same in ops that it can."""

WITH_STATISTICS: dict[str, Callable[..., Any]] = {
    "aten::native_layer_norm": layer_norm,
    "aten::native_group_norm": group_norm,
    "aten::native_batch_norm": batch_norm,
}
"""Op -> the same op with statistics that are no constants to autograd."""

FUNCTIONAL = {in_place: op for op, in_place in (IN_PLACE | IN_PLACE_FORWARD).items()}
"""Op that overwrites what its derivative may need -> the same that does not."""


def keep_derivatives(graph: fx.Graph) -> None:
    """Give the statistics of norms that are read their derivatives; values stay as they are."""
    for node in graph.nodes:
        if node.op == "call_function" and any(index > 0 for index in _outputs_read(node)):
            node.target = WITH_STATISTICS.get(schema_name(node.target), node.target)


def overwrite_nothing(graph: fx.Graph) -> None:
    """Put ops that make something new in the place of those that overwrite."""
    for node in graph.nodes:
        node.target = FUNCTIONAL.get(node.target, node.target)


def write_plainly(graph: fx.Graph) -> None:
    """Put plain functions in the place of ops that cannot be differentiated (again)."""
    for node in graph.nodes:
        kernel = spec_of(node.target)
        plain = Plain(kernel.reference, kernel.unread) if kernel is not None else PLAIN.get(schema_name(node.target))
        if plain is not None:
            node.target = plain.function
            node.args = tuple(None if place in plain.unread else arg for place, arg in enumerate(node.args))
    overwrite_nothing(graph)
    graph.eliminate_dead_code()
    keep_derivatives(graph)


def check_differentiable(program: Program) -> None:
    """Raise NotDifferentiableError where autograd would give relevance no gradient, or one that lacks a part.

    Every kind of call in the relevance graph is differentiated once, and so is every forward op that kept a value for
    it, all on fake tensors: what is computed from inputs, parameters or seeds has to have a gradient there.
    """
    assert program.relevance_graph is not None
    relevance, forward = copy_graph(program.relevance_graph), copy_graph(program.graph)
    write_plainly(relevance)
    keep_derivatives(forward)
    # A call is tried by itself, on leaves, which nothing can overwrite.
    overwrite_nothing(forward)
    fixed = {spec.node for spec in program.inputs if spec.kind in (InputKind.BUFFER, InputKind.CONSTANT)}
    trained = _trained(forward, fixed)
    fixed |= {node.name for node in forward.nodes if node not in trained}
    trained |= _trained(relevance, fixed)
    read = {node.name for node in relevance.nodes if node.op == "placeholder" and node.users}
    kept = [node for node in forward.nodes if node.op == "call_function" and node.name in read]
    seen: set[Any] = set()
    for node in [*(node for node in relevance.nodes if node.op == "call_function"), *kept]:
        if isinstance(node.target, ConditionalRelevance):
            for branch in node.target.branches:
                check_differentiable(branch)
            continue
        made = node.args[0] if node.target is operator.getitem else node
        if made not in trained or _is_known(made):
            continue
        outputs = frozenset({node.args[1]}) if made is not node else _outputs_read(node)
        key = (made.target, outputs, tuple(operand in trained for operand in made.all_input_nodes))
        if key not in seen:
            _check_call(made, outputs, trained)
        seen.add(key)


def _trained(graph: fx.Graph, fixed: set[str]) -> set[fx.Node]:
    """The nodes whose floats may require a gradient: all that is computed from inputs other than ``fixed``."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        reads = node.name not in fixed if node.op == "placeholder" else not found.isdisjoint(node.all_input_nodes)
        if reads and any(is_float(leaf) for leaf in pytree.tree_leaves(node.meta.get("val"))):
            found.add(node)
    return found


def _outputs_read(node: fx.Node) -> frozenset[Any]:
    """Which outputs of a multi-output op are read."""
    return frozenset(user.args[1] for user in node.users if user.target is operator.getitem)


def _is_known(node: fx.Node) -> bool:
    """Whether a call has its derivative by construction, or one of zero by what it is (comparisons, rounding)."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    entry = classify(node)
    return entry is not None and entry.op_class is OpClass.NON_RELEVANCE


def _check_call(node: fx.Node, outputs: Iterable[int], trained: set[fx.Node]) -> None:
    """Differentiate one call; ``outputs`` says which results are read where there are several."""
    with FakeTensorMode(), torch.enable_grad():

        def stand_in(operand: fx.Node) -> Any:
            return pytree.tree_map(lambda value: _like(value, operand in trained), value_of(operand))

        args, kwargs = fx.map_arg(at_hints((node.args, node.kwargs)), stand_in)
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if is_float(leaf) and leaf.requires_grad]
        try:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
            results = [result] if isinstance(result, Tensor) else [result[index] for index in outputs]
            found = [_has_gradient(value, leaves) for value in results if is_float(value)]
        except RuntimeError as error:
            raise _refusal(node, str(error).splitlines()[0]) from error
    if not all(found):
        raise _refusal(node, "to autograd its result is a constant")


def _like(value: Any, trained: bool) -> Any:
    """A fake value like another, a float tensor as a leaf of autograd, with sizes as in the call that was captured."""
    if isinstance(value, Tensor):
        layout = hints(value.shape), hints(value.stride())
        made = torch.empty_strided(*layout, dtype=value.dtype, device=value.device)
        return made.requires_grad_(trained and is_float(value))
    return 1.0 if isinstance(value, torch.SymFloat) else 1 if isinstance(value, torch.SymInt) else value


def _has_gradient(value: Tensor, leaves: list[Tensor]) -> bool:
    if not value.requires_grad:
        return False
    grads = torch.autograd.grad(value, leaves, torch.ones_like(value), allow_unused=True, retain_graph=True)
    return any(grad is not None for grad in grads)


def _refusal(node: fx.Node, cause: str) -> NotDifferentiableError:
    at = facts(node).origin or node.name
    return NotDifferentiableError(op=schema_name(node.target), at=at, cause=cause, source=user_source(node))
