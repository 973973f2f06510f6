"""canonicalise: one form per op, chosen so that the forward keeps what its relevance will need.

Every rewrite makes the same kernel calls as eager, so outputs stay bitwise equal: norms become the native ops that
also return their statistics, pooling the variant with indices, attention the variant with the log-sum-exp, dropout
its random mask and a product; composite ops that the table does not know are taken apart.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lrp_compiler.passes.optable import classify
from lrp_compiler.passes.program import Constant, Mutation, Program, carries_float, output_node, return_values, tensor_of, value_of
from lrp_compiler.passes.trace import Emitter

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
PROVENANCE = ("nn_module_stack", "stack_trace", "torch_fn")


def canonicalise(program: Program, kept: frozenset[str] = frozenset(), grad_enabled: bool = False) -> Program:
    """The same computation on the vocabulary of the op table.

    Ops named in ``kept`` (``aten::x``) stay as they are. ``grad_enabled`` says whether gradients are recorded, which
    decides what eager does with a mask that depends on parameters.
    """
    program = program.fork()
    state = _State(program, kept, grad_enabled)
    for node in list(program.graph.nodes):
        if node.op == "call_function":
            state.rewrite(node)
    outputs = tuple(leaf if isinstance(leaf, Constant) else state.renamed(leaf) for leaf in program.outputs)
    mutations = tuple(Mutation(m.input, state.renamed(m.value)) for m in program.mutations)
    program = program.having(outputs=outputs, mutations=(*mutations, *state.mutations))
    return_values(program)
    program.graph.eliminate_dead_code()
    return program


class _State:
    """The graph being rewritten, and where replaced values went."""

    def __init__(self, program: Program, kept: frozenset[str], grad_enabled: bool) -> None:
        self.kept = kept
        self.grad_enabled = grad_enabled
        self.emitter = Emitter(program.graph, program.fake_mode, output_node(program.graph), program.traces)
        self.replaced: dict[str, str] = {}
        self.mutations: list[Mutation] = []

    def renamed(self, name: str) -> str:
        while name in self.replaced:
            name = self.replaced[name]
        return name

    def rewrite(self, node: fx.Node) -> None:
        """Put the canonical form of ``node`` in its place, if it has another one."""
        self.emitter.before = node
        self.emitter.provenance = {key: node.meta[key] for key in PROVENANCE if key in node.meta}
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.name in self.kept:
            return
        rewriter = REWRITES.get(schema.name)
        if rewriter is not None:
            new = rewriter(self, node)
        elif classify(node) is None and _is_composite(node.target):
            new = self.expand(node, node.target, call_op, node.target, tuple(node.args), dict(node.kwargs))
        else:
            return
        if new is not None and new is not node:
            node.replace_all_uses_with(new)
            self.replaced[node.name] = new.name
            self.emitter.graph.erase_node(node)

    def expand(self, node: fx.Node, target: Any, fn: Callable[..., Any], *args: Any) -> fx.Node:
        """Emit ``fn(*args)`` before ``node`` with its calls of ``target`` opened and their ops made canonical."""
        start = node.prev
        result = self.emitter(fn, *args, opened=target)
        inner = start.next
        while inner is not node:
            following = inner.next
            self.rewrite(inner)
            inner = following
        name = self.renamed(result.name)
        return next(found for found in self.emitter.graph.nodes if found.name == name)


def call_op(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``target(*args, **kwargs)``."""
    return target(*args, **kwargs)


def _is_composite(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch._C._dispatch_has_kernel_for_dispatch_key(
        target.name(), "CompositeImplicitAutograd"
    )


def bound(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by name, defaults filled in."""
    found: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if position < len(node.args) and not argument.kwarg_only:
            found[argument.name] = node.args[position]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def _layer_norm(state: _State, node: fx.Node) -> fx.Node:
    a = bound(node)
    call = state.emitter.call
    return _first(
        state, call(aten.native_layer_norm.default, a["input"], a["normalized_shape"], a["weight"], a["bias"], a["eps"])
    )


def _group_norm(state: _State, node: fx.Node) -> fx.Node:
    a = bound(node)
    x = a["input"]
    if not tensor_of(x).is_contiguous():
        x = state.emitter.call(aten.contiguous.default, x)
    batch, channels, *rest = tensor_of(x).shape
    sizes = (batch, channels, math.prod(rest), a["num_groups"], a["eps"])
    return _first(state, state.emitter.call(aten.native_group_norm.default, x, a["weight"], a["bias"], *sizes))


def _batch_norm(state: _State, node: fx.Node) -> fx.Node:
    """Training updates copies of the running statistics, which the runtime writes back."""
    a = bound(node)
    mean, variance = a["running_mean"], a["running_var"]
    if a["training"] and mean is not None:
        copies = [state.emitter.call(aten.clone.default, running) for running in (mean, variance)]
        state.mutations += [Mutation(old.name, new.name) for old, new in zip((mean, variance), copies, strict=True)]
        mean, variance = copies
    statistics = (a["training"] or mean is None, a["momentum"], a["eps"])
    return _first(
        state,
        state.emitter.call(
            aten.native_batch_norm.default, a["input"], a["weight"], a["bias"], mean, variance, *statistics
        ),
    )


def _first(state: _State, node: fx.Node) -> fx.Node:
    """The first result of a multi-output call."""
    return select_output(state.emitter, node, 0)


def select_output(emitter: Emitter, node: fx.Node, index: int) -> fx.Node:
    """``node[index]`` as a node."""
    with emitter.graph.inserting_before(emitter.before):
        result = emitter.graph.call_function(operator.getitem, (node, index))
    result.meta = {**emitter.provenance, "val": value_of(node)[index]}
    return result


def _max_pool(target: Any) -> Callable[[_State, fx.Node], fx.Node]:
    def rewrite(state: _State, node: fx.Node) -> fx.Node:
        return _first(state, state.emitter.call(target, *bound(node).values()))

    return rewrite


def _dropout(state: _State, node: fx.Node) -> fx.Node:
    a = bound(node)
    if not a["train"] or a["p"] == 0:
        return a["input"]  # type: ignore[no-any-return]
    return state.emitter(dropout, a["input"], a["p"])  # type: ignore[no-any-return]


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Training dropout as eager computes it on this device: a random mask, scaled, times ``x``."""
    if p == 1:
        return x * torch.zeros_like(x)
    if x.device.type == "cuda":
        mask = aten.bernoulli.p(x.detach(), 1 - p)
        return x * mask * (1 / (1 - p))
    return x * aten.div.Scalar(aten.bernoulli.p(x.detach(), 1 - p), 1 - p)


def _attention(state: _State, node: fx.Node) -> fx.Node | None:
    """CPU attention that eager runs as flash keeps its log-sum-exp; what eager runs as plain math is opened."""
    a = bound(node)
    query, key, value, mask = (a[name] for name in ("query", "key", "value", "attn_mask"))
    if tensor_of(query).device.type != "cpu":
        return None
    if mask is not None and tensor_of(mask).dtype == torch.bool:
        mask = state.emitter(additive_mask, mask, tensor_of(query).dtype)
    mask_needs_grad = state.grad_enabled and mask is not None and depends_on_parameters(mask)
    if not mask_needs_grad and _eager_attention_is_flash(a):
        call = state.emitter.call(
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            *(query, key, value, 0.0, a["is_causal"]),
            attn_mask=mask,
            scale=a["scale"],
        )
        return _first(state, call)
    options = (a["dropout_p"], a["is_causal"], a["scale"], a["enable_gqa"])
    math_path = aten._scaled_dot_product_attention_math.default
    return state.expand(node, math_path, attention_math, query, key, value, mask, *options)


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask (True: attend) as the additive mask that the fused kernels take."""
    return torch.where(mask, 0.0, torch.full((), float("-inf"), dtype=dtype, device=mask.device))


def attention_math(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Attention as its product, softmax and product, in the order of torch's own math path."""
    output: torch.Tensor = aten._scaled_dot_product_attention_math.default(
        query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    return output


def _eager_attention_is_flash(a: dict[str, Any]) -> bool:
    """Ask torch which path it takes for tensors of these shapes (metadata alone decides)."""
    real = [_unfilled(a[name]) for name in ("query", "key", "value", "attn_mask")]
    options = (a["dropout_p"], a["is_causal"])
    choice = torch._fused_sdp_choice(*real, *options, scale=a["scale"], enable_gqa=a["enable_gqa"])  # type: ignore[attr-defined]
    return int(choice) == int(torch.nn.attention.SDPBackend.FLASH_ATTENTION)


def depends_on_parameters(node: fx.Node) -> bool:
    """Whether gradients would flow from ``node`` to a parameter or a user's float input."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in seen or current.target is aten.detach.default or not carries_float(current):
            continue
        seen.add(current)
        if current.op == "placeholder" and not current.name.startswith(("b_", "c_")):
            return True
        waiting += current.all_input_nodes
    return False


def attends_with_learned_mask(program: Program) -> bool:
    """Whether some attention's mask depends on parameters, so that eager's choice of path depends on grad mode."""
    masks = [bound(node)["attn_mask"] for node in program.graph.nodes if node.target is SDPA]
    return any(mask is not None and depends_on_parameters(mask) for mask in masks)


def _unfilled(node: fx.Node | None) -> torch.Tensor | None:
    if node is None:
        return None
    fake = tensor_of(node)
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype)


REWRITES: dict[str, Callable[[_State, fx.Node], fx.Node | None]] = {
    "aten::layer_norm": _layer_norm,
    "aten::group_norm": _group_norm,
    "aten::batch_norm": _batch_norm,
    "aten::max_pool2d": _max_pool(aten.max_pool2d_with_indices.default),
    "aten::max_pool3d": _max_pool(aten.max_pool3d_with_indices.default),
    "aten::dropout": _dropout,
    "aten::scaled_dot_product_attention": _attention,
}
