"""canonicalise: one form per op, chosen so that the forward keeps what its relevance will need.

Every rewrite makes the same kernel calls as eager, so outputs stay bitwise equal: norms become the native ops that
also return their statistics, pooling the variant with indices, attention the variant with the log-sum-exp, dropout
its random mask and a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lrp_compiler.passes.linear_map import in_full_precision
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.program import Mutation, Program, carries_float, tensor_of
from lrp_compiler.passes.rewriter import Replacement, Rewriter
from lrp_compiler.passes.sizes import hints

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
FLASH_ON_CPU = aten._scaled_dot_product_flash_attention_for_cpu.default


def canonicalise(program: Program, kept: frozenset[str] = frozenset(), grad_enabled: bool = False) -> Program:
    """The same computation on the vocabulary of the op table.

    Ops named in ``kept`` (``aten::x``) stay as they are. ``grad_enabled`` says whether gradients are recorded, which
    decides what eager does with a mask that depends on parameters.
    """
    return _Canonicaliser(program.fork(), kept, grad_enabled).run()


class _Canonicaliser(Rewriter):
    """Rewrites op by op; training-mode batch norm adds mutations."""

    def __init__(self, program: Program, kept: frozenset[str], grad_enabled: bool) -> None:
        super().__init__(program)
        self.kept = kept
        self.grad_enabled = grad_enabled

    def replacement(self, node: fx.Node) -> Replacement:
        name = op_name(node)
        rewrite = None if name in self.kept else REWRITES.get(name)
        return None if rewrite is None else rewrite(self, node)

    def first(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """The first output of a call of ``target``."""
        return self.output(self.emitter.call(target, *args, **kwargs), 0)


Rewrite = Callable[[_Canonicaliser, fx.Node], Replacement]


def bound(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by name, defaults filled in."""
    found: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if position < len(node.args) and not argument.kwarg_only:
            found[argument.name] = node.args[position]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def _layer_norm(rewriter: _Canonicaliser, node: fx.Node) -> fx.Node:
    a = bound(node)
    arguments = (a["input"], a["normalized_shape"], a["weight"], a["bias"], a["eps"])
    return rewriter.first(aten.native_layer_norm.default, *arguments)


def _group_norm(rewriter: _Canonicaliser, node: fx.Node) -> fx.Node:
    a = bound(node)
    x = a["input"]
    if not tensor_of(x).is_contiguous():
        x = rewriter.emitter.call(aten.contiguous.default, x)
    batch, channels, *rest = tensor_of(x).shape
    sizes = (batch, channels, math.prod(rest), a["num_groups"], a["eps"])
    return rewriter.first(aten.native_group_norm.default, x, a["weight"], a["bias"], *sizes)


def _batch_norm(rewriter: _Canonicaliser, node: fx.Node) -> fx.Node:
    """Training updates copies of the running statistics, which the runtime writes back."""
    a = bound(node)
    mean, variance = a["running_mean"], a["running_var"]
    if a["training"] and mean is not None:
        copies = [rewriter.emitter.call(aten.clone.default, running) for running in (mean, variance)]
        rewriter.mutations += [Mutation(old.name, new.name) for old, new in zip((mean, variance), copies, strict=True)]
        mean, variance = copies
    tensors = (a["input"], a["weight"], a["bias"], mean, variance)
    uses_batch = a["training"] or mean is None
    return rewriter.first(aten.native_batch_norm.default, *tensors, uses_batch, a["momentum"], a["eps"])


def _max_pool(target: Any) -> Rewrite:
    def rewrite(rewriter: _Canonicaliser, node: fx.Node) -> fx.Node:
        return rewriter.first(target, *bound(node).values())

    return rewrite


def _dropout(rewriter: _Canonicaliser, node: fx.Node) -> fx.Node:
    a = bound(node)
    x: fx.Node = a["input"]
    if not a["train"] or a["p"] == 0:
        return x
    dropped: fx.Node = rewriter.emitter(dropout, x, a["p"])
    return dropped


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Training dropout as eager computes it on this device: a random mask, scaled, times ``x``."""
    if p == 1:
        return x * torch.zeros_like(x)
    if x.device.type == "cuda":
        drawn: torch.Tensor = aten.bernoulli.p(x.detach(), 1 - p)
        return x * drawn * (1 / (1 - p))
    if torch.empty_like(x).is_contiguous():
        kept: torch.Tensor = aten.bernoulli.p(x.detach(), 1 - p)
    else:
        # Eager draws in the order of memory, the functional op in that of indices; this one draws as eager does.
        kept = aten.native_dropout.default(torch.empty_like(x), p, True)[1].to(x.dtype)
    scaled: torch.Tensor = aten.div.Scalar(kept, 1 - p)
    return x * scaled


def _gated_linear_unit(rewriter: _Canonicaliser, node: fx.Node) -> fx.Node:
    gated: fx.Node = rewriter.emitter(gated_linear_unit, bound(node)["self"], bound(node)["dim"])
    return gated


def gated_linear_unit(x: torch.Tensor, dim: int) -> torch.Tensor:
    """a * sigmoid(b) of the halves of ``x`` along ``dim``; like torch's kernel, 16-bit numbers in float32."""
    value, gate = aten.chunk.default(in_full_precision(x), 2, dim)
    gated: torch.Tensor = value * torch.sigmoid(gate)
    return gated.to(x.dtype) if gated.dtype != x.dtype else gated


def _attention(rewriter: _Canonicaliser, node: fx.Node) -> Replacement:
    """CPU attention that eager runs as flash keeps its log-sum-exp; what eager runs as plain math is opened."""
    a = bound(node)
    query, key, value, mask = (a[name] for name in ("query", "key", "value", "attn_mask"))
    if tensor_of(query).device.type != "cpu":
        return None
    if mask is not None and tensor_of(mask).dtype == torch.bool:
        mask = rewriter.emitter(additive_mask, mask, tensor_of(query).dtype)
    mask_needs_grad = rewriter.grad_enabled and mask is not None and needs_grad(mask)
    if not mask_needs_grad and eager_attention_is_flash(a):
        arguments = (query, key, value, 0.0, a["is_causal"])
        return rewriter.first(FLASH_ON_CPU, *arguments, attn_mask=mask, scale=a["scale"])
    options = (a["dropout_p"], a["is_causal"], a["scale"], a["enable_gqa"])
    math_path = aten._scaled_dot_product_attention_math.default
    return rewriter.expand(node, math_path, attention_math, query, key, value, mask, *options)


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


def eager_attention_is_flash(a: dict[str, Any]) -> bool:
    """Ask torch which path it takes for tensors of these shapes (metadata alone decides)."""
    # Of fake tensors, which an enclosing mode would make of these, torch takes another path.
    with unset_fake_temporarily():
        real: list[Any] = [_unfilled(a[name]) for name in ("query", "key", "value", "attn_mask")]
        choice: int = aten._fused_sdp_choice.default(
            *real, a["dropout_p"], a["is_causal"], scale=a["scale"], enable_gqa=a["enable_gqa"]
        )
    return choice == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value


def needs_grad(node: fx.Node) -> bool:
    """Whether gradients would flow from ``node`` to a parameter that is trained."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in seen or current.target is aten.detach.default or not carries_float(current):
            continue
        seen.add(current)
        if current.op == "placeholder" and tensor_of(current).requires_grad:
            return True
        waiting += current.all_input_nodes
    return False


def attends_with_learned_mask(program: Program) -> bool:
    """Whether some attention's mask depends on parameters, so that eager's choice of path depends on grad mode."""
    masks = [bound(node)["attn_mask"] for node in program.graph.nodes if node.target is SDPA]
    return any(mask is not None and needs_grad(mask) for mask in masks)


def _unfilled(node: fx.Node | None) -> torch.Tensor | None:
    if node is None:
        return None
    fake = tensor_of(node)
    return torch.empty_strided(hints(fake.shape), hints(fake.stride()), dtype=fake.dtype)


REWRITES: dict[str, Rewrite] = {
    "aten::layer_norm": _layer_norm,
    "aten::group_norm": _group_norm,
    "aten::batch_norm": _batch_norm,
    "aten::max_pool2d": _max_pool(aten.max_pool2d_with_indices.default),
    "aten::max_pool3d": _max_pool(aten.max_pool3d_with_indices.default),
    "aten::dropout": _dropout,
    "aten::glu": _gated_linear_unit,
    "aten::scaled_dot_product_attention": _attention,
}
