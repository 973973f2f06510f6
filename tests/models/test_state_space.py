"""Hugging Face's Mamba and Mamba-2 against MambaLRP restated, in float64 throughout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from accuracy import relative_error
from state_space import explained_by_autograd, restated_mamba, restated_mamba2
from torch import Tensor, nn
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from lrp_compiler import Token, compile_for_lrp

FLOAT64 = 1e-9
CONSERVING = 1e-10
COMMON = {"vocab_size": 23, "hidden_size": 6, "state_size": 3, "num_hidden_layers": 2, "use_cache": False}


class DoubleTorch:
    """The torch module where float32 is float64: Hugging Face's norms and scans cast to float32 by name."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@dataclass
class Kind:
    """A model family: how to build a small one, its restatement and the pattern it is recognised by."""

    build: Callable[[], nn.Module]
    restated: Callable[[Any, Tensor], Tensor]
    pattern: str
    per_layer: int


def mamba() -> nn.Module:
    return transformers.MambaForCausalLM(transformers.MambaConfig(**COMMON, time_step_rank=2))


def mamba2() -> nn.Module:
    config = transformers.Mamba2Config(**COMMON, num_heads=4, head_dim=3, n_groups=2, chunk_size=3)
    return transformers.Mamba2ForCausalLM(config)


KINDS = {
    "mamba": Kind(mamba, restated_mamba, "scan", 1),
    "mamba2": Kind(mamba2, restated_mamba2, "state_product", 6),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter random, so that no bias or gain is trivial."""
    for name, parameter in model.named_parameters():
        spread = 0.5 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
        nn.init.normal_(parameter, 0.5 if "norm" in name else 0.0, spread)
    return model.eval()


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cast to float32 inside Hugging Face's code."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    for module in (modeling_mamba, modeling_mamba2):
        monkeypatch.setattr(module, "torch", DoubleTorch())


@pytest.mark.parametrize(("tokens", "composite"), [(1, "mamba_lrp"), (5, "mamba_lrp"), (7, "auto")])
def test_relevance_is_mamba_lrp(double: None, kind: Kind, tokens: int, composite: str) -> None:
    model, ids = randomised(kind.build()).double(), torch.randint(0, 23, (2, tokens))
    explained = compile_for_lrp(model, composite)
    out, tape = explained.run(input_ids=ids)
    embeddings, seed = model.get_input_embeddings()(ids), torch.randn_like(out.logits)
    torch.testing.assert_close(kind.restated(model, embeddings), out.logits, rtol=1e-10, atol=1e-10)
    report = explained.report(input_ids=ids)
    assert report.composite == "mamba_lrp"
    assert composite == "mamba_lrp" or kind.pattern.replace("_", " ") in report.reason
    assert report.patterns[kind.pattern] == 2 * kind.per_layer
    expected = explained_by_autograd(lambda leaf: kind.restated(model, leaf), embeddings, seed)
    assert relative_error(tape.relevance(seed, per_dimension=True), expected) <= FLOAT64


def test_the_ledger_closes(double: None, kind: Kind) -> None:
    model, ids = randomised(kind.build()).double(), torch.randint(0, 23, (2, 7))
    ledger = compile_for_lrp(model, "mamba_lrp").run(input_ids=ids)[1].ledger(Token(-1, 4))
    assert max(row.relative_gap for row in ledger.rows) <= CONSERVING
    assert abs(ledger.gap) <= CONSERVING * abs(ledger.seed)


def test_the_reference_interpreter_agrees(double: None, kind: Kind) -> None:
    model, ids = randomised(kind.build()).double(), torch.randint(0, 23, (2, 7))
    ours, theirs = (
        compile_for_lrp(model, "mamba_lrp", reference=reference).run(input_ids=ids)[1].relevance(Token(-1, 4))
        for reference in (False, True)
    )
    assert relative_error(ours, theirs) <= FLOAT64


def test_outputs_are_those_of_the_model(kind: Kind) -> None:
    """Bitwise, in float32 with Hugging Face's own casts and padding, with and without gradients."""
    model, ids = randomised(kind.build()), torch.randint(0, 23, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    explained = compile_for_lrp(model)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            expected = model(input_ids=ids, attention_mask=mask).logits
            assert explained(input_ids=ids, attention_mask=mask).logits.equal(expected)


def test_bfloat16_models_scan_in_the_precision_of_their_states(kind: Kind) -> None:
    """bfloat16 has eight bits; the two layers cost a few of them, and nothing is lost or infinite."""
    model, ids = randomised(kind.build()), torch.randint(0, 23, (2, 7))
    exact = compile_for_lrp(model, "mamba_lrp").run(input_ids=ids)[1].relevance(Token(-1, 4))
    found = compile_for_lrp(model.bfloat16(), "mamba_lrp").run(input_ids=ids)[1].relevance(Token(-1, 4))
    assert relative_error(found, exact) <= 0.05


def test_padding_gets_nothing(kind: Kind) -> None:
    model, ids = randomised(kind.build()), torch.randint(0, 23, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    _, tape = compile_for_lrp(model, "mamba_lrp").run(input_ids=ids, attention_mask=mask)
    relevance = tape.relevance(Token(-1, 4))
    assert relevance[1, :2].abs().max() == 0
    assert relevance[1, 2:].abs().min() > 0


def test_reading_two_targets_at_once(kind: Kind) -> None:
    _, tape = compile_for_lrp(randomised(kind.build())).run(input_ids=torch.randint(0, 23, (2, 6)))
    each = tape.relevance_of_each([Token(-1, 4), Token(2, 1)])
    for target, found in zip([Token(-1, 4), Token(2, 1)], each, strict=True):
        torch.testing.assert_close(found, tape.relevance(target))


@pytest.mark.thorough
def test_the_relevance_graph_does_not_grow_with_the_text(kind: Kind) -> None:
    explained = compile_for_lrp(randomised(kind.build()), "mamba_lrp")
    short, long = (explained.report(input_ids=torch.randint(0, 23, (1, length))) for length in (6, 15))
    assert short.relevance_ops == long.relevance_ops
