"""Attention masks of constants alone are dropped or become "causal"; all others stay, and no bit of outputs changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import compile_for_lrp
from lrp_compiler.passes.canonicalise import SDPA, bound
from lrp_compiler.rules import Stop

Mask = Callable[[Tensor, Tensor], Tensor]
TOKENS = 7
MASKS: dict[str, tuple[Mask, str]] = {
    "all": (lambda x, _: torch.ones(TOKENS, TOKENS, dtype=torch.bool), "none"),
    "all, one row for every query": (lambda x, _: torch.arange(TOKENS)[None, None, None] >= 0, "none"),
    "nothing added": (lambda x, _: torch.zeros(TOKENS, TOKENS), "none"),
    "below the diagonal": (lambda x, _: torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(), "causal"),
    "by positions": (lambda x, _: torch.arange(TOKENS)[None, :] <= torch.arange(TOKENS)[:, None], "causal"),
    "infinity above it": (lambda x, _: torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None], "causal"),
    "a window": (lambda x, _: torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().triu(-2), "mask"),
    "the diagonal hidden": (lambda x, _: torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(-1), "mask"),
    "a large number above it": (lambda x, _: torch.full((TOKENS, TOKENS), -1e4).triu(1), "mask"),
    "a bias": (lambda x, _: torch.arange(TOKENS).expand(TOKENS, TOKENS) * 0.25, "mask"),
    "one head sees all": (
        lambda x, _: torch.stack([torch.ones(TOKENS, TOKENS).tril(), torch.ones(TOKENS, TOKENS)]).bool(),
        "mask",
    ),
    "all, of two heads alike": (lambda x, _: torch.ones(2, TOKENS, TOKENS, dtype=torch.bool), "mask"),
    "drawn": (lambda x, _: torch.rand(TOKENS, TOKENS) > -1, "mask"),
    "a buffer": (lambda x, buffer: buffer, "mask"),
    "of the input": (lambda x, _: x[:, None, :, :1] < 1e9, "mask"),
}
"""What is hidden, and how attention is told of it in the end; a buffer may change between calls."""


class Attending(nn.Module):
    """One attention of two heads under a mask."""

    causal: Tensor

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask, self.project, self.head = mask, nn.Linear(8, 24), nn.Linear(8, 3)
        self.register_buffer("causal", torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).view(x.shape[0], x.shape[1], 3, 2, 4).transpose(1, 3)
        query, key, value = heads.unbind(2)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask(x, self.causal))
        found: Tensor = self.head(mixed.transpose(1, 2).flatten(2))
        return found


def told(module: Any, *args: Any, **kwargs: Any) -> set[str]:
    """How the attention ops behind the pass are told what is hidden: none, causal or mask."""
    program = next(stage.program for stage in module.stages(*args, **kwargs) if stage.name == "settle_masks")
    calls = [bound(node) for node in program.graph.nodes if node.target is SDPA]
    assert calls
    return {"mask" if a["attn_mask"] is not None else "causal" if a["is_causal"] else "none" for a in calls}


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_say_nothing_more_are_dropped(name: str) -> None:
    mask, expected = MASKS[name]
    torch.manual_seed(0)
    model, x = Attending(mask), torch.randn(2, TOKENS, 8)
    module = compile_for_lrp(model, "attnlrp")
    assert told(module, x) == {expected}
    assert torch.equal(module(x), model(x))
    output, tape = module.run(x)
    assert torch.equal(output, model(x))
    found = tape.relevance((3, 1))
    plainly = compile_for_lrp(model, "attnlrp", reference=True).run(x)[1].relevance((3, 1))
    torch.testing.assert_close(found, plainly, rtol=1e-4, atol=1e-6)
    leaf = x.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(model(leaf)[:, 3, 1].sum(), leaf)
    gradient = compile_for_lrp(model, "gradient").attribute(x, (3, 1))
    torch.testing.assert_close(gradient, by_autograd)


@pytest.mark.parametrize(("name", "expected"), [("gpt2", "causal"), ("llama", "causal"), ("bert", "none")])
def test_masks_that_libraries_make_for_tracing_are_gone(name: str, expected: str) -> None:
    """Padding that is given decides something; where none is, they say what is hidden anyway."""
    case, shared = zoo.shared(name)
    tokens = next(iter([*case.args, *case.kwargs.values()]))
    with torch.no_grad():
        assert told(shared, tokens) == {expected}
    if "attention_mask" in case.kwargs:
        assert told(shared, *case.args, **case.kwargs) == {"mask"}


def test_a_rule_for_attention_sees_its_mask() -> None:
    """An op that the user has a rule for stays as it was written."""

    class Beside(Attending):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x[..., :3]

    model, x = Beside(MASKS["below the diagonal"][0]), torch.randn(2, TOKENS, 8)
    assert told(compile_for_lrp(model, "attnlrp", rules={SDPA: Stop()}), x) == {"mask"}


def test_open_sizes_keep_their_masks() -> None:
    """What a mask says at every size is not known from one of them."""

    def window(x: Tensor, _: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        return (places[None, :] <= places[:, None]) & (places[None, :] > places[:, None] - 9)

    model = Attending(window)
    module = compile_for_lrp(model, "attnlrp")
    for tokens in (7, 8, 12):
        x = torch.randn(2, tokens, 8)
        assert torch.equal(module(x), model(x))
    assert told(module, torch.randn(2, 12, 8)) == {"mask"}


def test_what_is_traced_without_values_keeps_its_bits() -> None:
    """A model on the meta device has masks that cannot be read."""
    with torch.device("meta"):
        model, x = Attending(lambda x, _: x.new_ones(TOKENS, TOKENS, dtype=torch.bool)), torch.randn(2, TOKENS, 8)
    assert told(compile_for_lrp(model, "attnlrp"), x) == {"mask"}
