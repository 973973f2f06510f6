"""Relevance of every promised architecture: the ledger, the reference interpreter, batches, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from lrp_compiler import Tape, compile_for_lrp

COMPOSITES = ["attnlrp", "cp_lrp", "epsilon", "input_x_gradient"]
FLOAT64_RTOL = 1e-10
FLOAT64 = [name for name in zoo.BUILDERS if name != "llama_eager"]
"""The models that compute in float64 when asked to: Llama's eager attention casts its softmax to float32."""


OFTEN = ("vgg", "bert", "lstm")
"""A convolutional, an attending and a recurrent model, for what the others differ little in."""


def of_every_kind(names: list[str], composites: list[str]) -> list[Any]:
    """All pairs of them; by default every model with the first composite, and one of every kind with the others."""
    return [
        pytest.param(name, composite, marks=() if composite == composites[0] or name in OFTEN else pytest.mark.slow)
        for composite in composites
        for name in names
    ]


def tape_of(case: zoo.Case, composite: Any, **options: Any) -> Tape:
    return compile_for_lrp(case.model, composite, **options).run(*case.args, **case.kwargs)[1]


def shared_tape(name: str, composite: Any, *, double: bool = False, **options: Any) -> tuple[zoo.Case, Tape]:
    """A case as it is built, and a tape of its call."""
    case, explained = zoo.explained_by(name, composite, double=double, **options)
    return case, explained.run(*case.args, **case.kwargs)[1]


def by_name(relevance: Any) -> dict[str, Tensor]:
    return relevance if isinstance(relevance, dict) else {"input": relevance}


@pytest.mark.parametrize(("name", "composite"), of_every_kind(FLOAT64, COMPOSITES))
def test_ledger_closes_op_by_op(name: str, composite: str) -> None:
    """seed = relevance at inputs + sinks, and so at every op, in float64."""
    case, tape = shared_tape(name, composite, double=True)
    ledger = tape.ledger(case.target)
    assert ledger.rows and ledger.seed != 0
    for row in ledger.rows:
        assert row.relative_gap <= FLOAT64_RTOL, row
    assert abs(ledger.gap) <= FLOAT64_RTOL * abs(ledger.seed)
    inputs = sum(value.sum().item() for value in by_name(tape.relevance(case.target, per_dimension=True)).values())
    sinks = sum(value.sum().item() for kinds in tape.sinks(case.target).values() for value in kinds.values())
    assert inputs + sinks == pytest.approx(ledger.seed, rel=FLOAT64_RTOL)
    ledger.check()


@pytest.mark.parametrize(("name", "composite"), of_every_kind(FLOAT64, [*COMPOSITES, "gradient"]))
def test_agrees_with_the_relevance_space_reference(name: str, composite: str) -> None:
    case, tape = shared_tape(name, composite, double=True)
    ours = by_name(tape.relevance(case.target, per_dimension=True))
    slow = shared_tape(name, composite, double=True, reference=True)[1]
    theirs = by_name(slow.relevance(case.target, per_dimension=True))
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        scale = expected.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(ours[key], expected, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL * scale)


@pytest.mark.parametrize("name", ["resnet", "bert", "llama"])
def test_verify_ledger_accepts_sound_relevance_in_float32(name: str) -> None:
    case, tape = shared_tape(name, "attnlrp", verify="ledger")
    assert by_name(tape.relevance(case.target))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["llama", "llama_eager", "t5"])
def test_models_that_cast_inside_close_to_that_precision(name: str) -> None:
    """Hugging Face computes RMSNorm (and eager softmax) in float32 even in float64 models: so closes the ledger."""
    case = zoo.build(name)
    case.model.double()
    for row in tape_of(case, "attnlrp").ledger(case.target).rows:
        assert row.relative_gap <= 32 * torch.finfo(torch.float32).eps, row


@pytest.mark.parametrize("name", zoo.BUILDERS)
def test_float32_error_is_that_of_the_gradient(name: str) -> None:
    """Relevance in float32 is at most twice as far from float64 as input x gradient computed by autograd."""
    errors = {}
    for composite in ("attnlrp", "input_x_gradient"):
        case, tape = shared_tape(name, composite)
        found = by_name(tape.relevance(case.target, per_dimension=True))
        exact = by_name(shared_tape(name, composite, double=True)[1].relevance(case.target, per_dimension=True))
        errors[composite] = max(relative_error(found[key], exact[key]) for key in exact)
    floor = 8 * torch.finfo(torch.float32).eps
    assert errors["attnlrp"] <= 2 * errors["input_x_gradient"] + floor, errors


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", ["vgg", "resnet", "vit", "bert", "gpt2", "llama", "t5"])
def test_a_batch_is_its_samples_one_by_one(name: str) -> None:
    case = zoo.build(name, double=True)
    target = 1 if name in ("vgg", "resnet", "vit", "bert") else (2, 7)
    batch = by_name(tape_of(case, "attnlrp").relevance(target))
    for sample in range(2):
        one = zoo.Case(
            case.model,
            tuple(value[sample : sample + 1] for value in case.args),
            {key: value[sample : sample + 1] for key, value in case.kwargs.items()},
        )
        for key, value in by_name(tape_of(one, "attnlrp").relevance(target)).items():
            torch.testing.assert_close(value[0], batch[key][sample], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "composite"),
    of_every_kind(["bert", "bert_eager", "roberta", "llama", "llama_eager", "t5"], ["attnlrp", "cp_lrp", "epsilon"]),
)
def test_padding_gets_exactly_nothing(name: str, composite: str) -> None:
    case, tape = shared_tape(name, composite)
    mask = case.kwargs.get("attention_mask", case.args[-1] if case.args else None)
    relevance = by_name(tape.relevance(case.target))
    found = relevance.get("input_ids", next(iter(relevance.values())))
    assert torch.isfinite(found).all()
    assert (found[mask == 0] == 0).all() and (found[mask == 1] != 0).all()


def test_token_relevance_shapes() -> None:
    case = zoo.build("bert")
    tape = tape_of(case, "attnlrp")
    tokens, dims = tape.relevance(case.target), tape.relevance(case.target, per_dimension=True)
    assert tokens.shape == case.args[0].shape and dims.shape == (*case.args[0].shape, 32)
    torch.testing.assert_close(dims.sum(-1), tokens)
    half = zoo.build("bert")
    half.model.bfloat16()
    assert tape_of(half, "attnlrp").relevance(half.target).dtype == torch.float32


def test_encoder_decoder_attributes_both_inputs() -> None:
    case = zoo.build("t5")
    relevance = tape_of(case, "attnlrp").relevance(case.target)
    assert set(relevance) == {"input_ids", "decoder_input_ids"}
    assert relevance["decoder_input_ids"].shape == (2, 5)


@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp"])
def test_reports_name_what_was_recognised(composite: str) -> None:
    case = zoo.build("llama")
    report = compile_for_lrp(case.model, composite).report(**case.kwargs)
    assert report.patterns == {"rms_norm": 5, "rotary": 4, "grouped_heads": 2, "gated_mlp": 2}
    stopped = report.stopped.get("aten::silu", 0)
    assert stopped == (2 if composite == "cp_lrp" else 0)
