"""AttnLRP and CP-LRP against LXT 2.1, the implementation of the AttnLRP authors (Achtibat et al., ICML 2024).

It has two forms, both used as they are: ``lxt.explicit`` propagates relevances through autograd functions in
place of the ops; ``lxt.efficient`` changes gradients so that input * gradient is the relevance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from accuracy import relative_error
from catalogue import agreement
from peers import lxt_explicit_rules, lxt_functional, lxt_patches, lxt_rules
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.models.bert import modeling_bert
from transformers.models.llama import modeling_llama

from lrp_compiler import compile_for_lrp, composites

FLOAT32 = 1e-5
"""A hundred rounding errors of the largest relevance; LXT agrees with a float64 reference to 4e-8..4e-6."""

FLOAT64 = 1e-9
"""The 1e-10 that lxt.efficient adds to x in f(x) / x costs 1e-10 / |x| an activation: 2e-11 measured."""

AGAINST_ZERO = 1e-30
"""The epsilon handed to lxt.explicit: its unsigned stabiliser biases z otherwise, and 0/0 alone needs one."""

UNSIGNED_EPSILON = 2.0**-20
"""Close to LXT's default of 1e-6, and exact in binary, so that z = -epsilon can be hit."""

COMPOSITES = ["attnlrp", "cp_lrp"]
WIDTH, HEADS, CLASSES = 8, 2, 3


# --- a block written with LXT's functions -------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm transformer block with causal attention and a gated MLP, written in overridable ops."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return layer(x)

    def normalise(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        return layer(x)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.normalise(self.norm1, x)
        layers = (self.query, self.key, self.value)
        q, k, v = (self.linear(layer, hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in layers)
        x = self.add(x, self.linear(self.out, self.attend(q, k, v).transpose(1, 2).flatten(2)))
        hidden = self.normalise(self.norm2, x)
        gated = self.gated(self.linear(self.gate, hidden), self.linear(self.up, hidden))
        x = self.add(x, self.linear(self.down, gated))
        return self.linear(self.head, x[:, -1])


class ExplicitBlock(Block):
    """The block on relevances: every op is LXT's autograd function, whose backward is its rule."""

    stopped = False

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return lxt_functional.linear_epsilon(x, layer.weight, layer.bias, AGAINST_ZERO)

    def normalise(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        parameters = (layer.weight, layer.bias, layer.eps)
        return lxt_functional.layer_norm_grad_fn.apply(x, *parameters, AGAINST_ZERO)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return lxt_functional.add2(a, b, False, AGAINST_ZERO)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.stopped:
            weights = self.attention_map(q, k).detach()
            # Half of a product's relevance goes to the constant map; CP-LRP gives V all of it.
            return lxt_explicit_rules.epsilon_lrp(lambda x: weights @ x, AGAINST_ZERO, v)
        return lxt_functional.matmul(self.attention_map(q, k), v, False, AGAINST_ZERO)

    def attention_map(self, q: Tensor, k: Tensor) -> Tensor:
        scores = lxt_functional.matmul(q, k.transpose(-2, -1), False, AGAINST_ZERO)
        scores = lxt_functional.mul2(scores, q.shape[-1] ** -0.5)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return lxt_functional.softmax(scores.masked_fill(future, -torch.inf), -1)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        passed = F.silu(gate).detach() if self.stopped else lxt_explicit_rules.identity(F.silu, gate)
        return lxt_functional.mul2(passed, up)


class StoppedExplicitBlock(ExplicitBlock):
    """CP-LRP: attention map and gate are constants."""

    stopped = True


class EfficientBlock(Block):
    """The block with changed gradients, so that input * gradient is the AttnLRP relevance."""

    def normalise(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        return lxt_patches.layer_norm_forward(layer, x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (lxt_rules.divide_gradient(x, factor) for x, factor in ((q, 4), (k, 4), (v, 2)))
        return super().attend(q, k, v)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return lxt_rules.divide_gradient(lxt_rules.identity_rule_implicit(F.silu, gate) * up, 2)


class StoppedEfficientBlock(EfficientBlock):
    """CP-LRP with changed gradients."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = lxt_rules.stop_gradient(q), lxt_rules.stop_gradient(k)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(lxt_rules.stop_gradient(gate)) * up


EXPLICIT = {"attnlrp": ExplicitBlock, "cp_lrp": StoppedExplicitBlock}
EFFICIENT = {"attnlrp": EfficientBlock, "cp_lrp": StoppedEfficientBlock}
TOLERANCES = {torch.float32: FLOAT32, torch.float64: FLOAT64}


def block_and_twin(twin: type[Block], dtype: torch.dtype) -> tuple[Block, Block, Tensor]:
    """A block, the same weights with LXT's ops, and an input."""
    block, other = Block().to(dtype), twin().to(dtype)
    other.load_state_dict(block.state_dict())
    return block, other, torch.randn(2, 5, WIDTH, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("composite", COMPOSITES)
def test_block_agrees_with_lxt_explicit(composite: str, dtype: torch.dtype) -> None:
    block, twin, x = block_and_twin(EXPLICIT[composite], dtype)
    leaf = x.clone().requires_grad_()
    output = twin(leaf)
    seed = F.one_hot(torch.tensor([1, 2]), CLASSES).to(output)
    output.backward(output.detach() * seed)
    found = compile_for_lrp(block, composite).attribute(x, torch.tensor([1, 2]))
    assert relative_error(found, leaf.grad) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("composite", COMPOSITES)
def test_block_agrees_with_lxt_efficient(composite: str, dtype: torch.dtype) -> None:
    block, twin, x = block_and_twin(EFFICIENT[composite], dtype)
    leaf = x.clone().requires_grad_()
    twin(leaf)[:, 1].sum().backward()
    explained = compile_for_lrp(block, composite)
    assert agreement(explained, x, explained.attribute(x, 1), x * leaf.grad, "LXT") <= TOLERANCES[dtype]


# --- Hugging Face models with LXT's own patches -------------------------------------------------------------

ATTENTION_PATCHES: dict[str, Callable[..., Any]] = {
    "attnlrp": lxt_patches.wrap_attention_forward,
    "cp_lrp": lxt_patches.cp_wrap_attention_forward,
}
GATED_MLP_PATCHES: dict[str, Callable[..., Any]] = {
    "attnlrp": lxt_patches.gated_mlp_forward,
    "cp_lrp": lxt_patches.cp_gated_mlp_forward,
}


@contextlib.contextmanager
def lxt_patched(composite: str) -> Iterator[None]:
    """Llama and BERT with eager attention under LXT's rules, as its maps for them say; all is restored.

    LXT's own map for BERT replaces modelling code of an older transformers; the rules in it are these.
    """
    with pytest.MonkeyPatch.context() as patch:
        for modeling in (modeling_llama, modeling_bert):
            wrapped = ATTENTION_PATCHES[composite](modeling.eager_attention_forward)
            patch.setattr(modeling, "eager_attention_forward", wrapped)
        patch.setattr(modeling_llama.LlamaRMSNorm, "forward", lxt_patches.rms_norm_forward)
        patch.setattr(modeling_llama.LlamaMLP, "forward", GATED_MLP_PATCHES[composite])
        patch.setattr(nn.LayerNorm, "forward", lxt_patches.layer_norm_forward)
        for activation in (GELUActivation, nn.Tanh):
            patch.setattr(activation, "original_forward", activation.forward, raising=False)
            patch.setattr(activation, "forward", lxt_patches.non_linear_forward)
        yield


def lxt_token_relevance(case: zoo.Case, composite: str, seed: Tensor) -> Tensor:
    """(batch, tokens): embedding times gradient, summed over the hidden dimension, as LXT's README does."""
    kwargs = {**dict(zip(("input_ids", "attention_mask"), case.args, strict=False)), **case.kwargs}
    embedded = case.model.get_input_embeddings()(kwargs.pop("input_ids")).detach().requires_grad_()
    with lxt_patched(composite):
        logits = case.model(inputs_embeds=embedded, **kwargs).logits
        (gradient,) = torch.autograd.grad(logits, embedded, seed)
    return (embedded * gradient).sum(-1).detach()


@pytest.mark.parametrize("attention", ["", "_eager"])
@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_token_relevance_agrees_with_lxt(name: str, composite: str, attention: str) -> None:
    """LXT runs on eager attention; ours, on the same weights, on eager and on fused attention alike."""
    case, twin = zoo.build(name + attention), zoo.build(name + "_eager")
    explained = compile_for_lrp(case.model, composite)
    output, tape = explained.run(*case.args, **case.kwargs)
    seed = torch.randn(output.logits.shape)
    expected = lxt_token_relevance(twin, composite, seed)
    assert relative_error(tape.relevance(seed, at="input_ids", output="logits"), expected) <= FLOAT32


def test_patches_are_taken_back() -> None:
    before = nn.LayerNorm.forward, modeling_llama.eager_attention_forward, GELUActivation.forward
    with lxt_patched("attnlrp"):
        assert nn.LayerNorm.forward is lxt_patches.layer_norm_forward
    assert before == (nn.LayerNorm.forward, modeling_llama.eager_attention_forward, GELUActivation.forward)
    assert not hasattr(GELUActivation, "original_forward")


# --- where LXT is wrong -------------------------------------------------------------------------------------


def test_unsigned_epsilon_has_a_pole_where_we_are_finite() -> None:
    """``lxt.explicit`` divides by z + epsilon whatever the sign of z: at z = -epsilon relevance is infinite.

    The exact answer is R_x = R_z for a single weight without bias; the signed epsilon of Bach et al. 2015,
    eq. 58, halves it where |z| = epsilon.
    """
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    x = torch.tensor([[-UNSIGNED_EPSILON]])
    leaf = x.clone().requires_grad_()
    output = lxt_functional.linear_epsilon(leaf, layer.weight, None, UNSIGNED_EPSILON)
    output.backward(output.detach())
    assert torch.isinf(leaf.grad).all()
    assert torch.equal(compile_for_lrp(layer, "epsilon").attribute(x, 0), x)
    assert torch.equal(compile_for_lrp(layer, composites.epsilon(UNSIGNED_EPSILON)).attribute(x, 0), x / 2)


@pytest.mark.parametrize("fn", [F.silu, F.gelu, F.mish])
@pytest.mark.parametrize("place", [0.0, -1e-10])
def test_implicit_identity_rule_fails_at_zero_where_we_are_right(fn: Callable[[Tensor], Tensor], place: float) -> None:
    """lxt.efficient multiplies by f(x) / (x + 1e-10): 0 at x = 0 and infinite at x = -1e-10.

    The coefficient of f(x) = x g(x) is g(x), which next to zero is the derivative of f.
    """
    x = torch.tensor([place])
    leaf = x.clone().requires_grad_()
    lxt_rules.identity_rule_implicit(fn, leaf).sum().backward()
    assert leaf.grad == 0 if place == 0 else torch.isinf(leaf.grad)

    class Activation(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return fn(value)

    _, tape = compile_for_lrp(Activation(), "attnlrp").run(x)
    slope = torch.func.grad(lambda value: fn(value).sum())(x)
    assert torch.allclose(tape.coefficients(torch.ones(1)), slope, rtol=torch.finfo(x.dtype).eps)
