"""The reference run: what baselines may be, what it repeats, what it leaves alone, and how it prints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import compile_for_lrp, errors
from lrp_compiler.passes.program import facts
from lrp_compiler.passes.verify import verify


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, a: Tensor, b: Tensor, times: int = 2) -> Tensor:
        return self.layer(torch.tanh(a) * b * times)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_numbers_tensors_tuples_and_names_are_the_same_baselines() -> None:
    model, a, b = TwoInputs(), torch.randn(2, 3), torch.randn(2, 3)
    explained = compile_for_lrp(model, "deep_lift")
    b0 = torch.randn(1, 3)
    expected = explained.attribute((a, b), 1, baselines=(torch.full_like(a, 0.5), b0.expand_as(b)))
    for baselines in ((0.5, b0), (torch.tensor(0.5), b0[0]), [0.5, b0]):
        assert all(map(torch.equal, explained.attribute((a, b), 1, baselines=baselines), expected))
    tape = explained.run(a, b, baselines={"b": b0, "a": 0.5})[1]
    assert all(map(torch.equal, tape.relevance(1).values(), expected))
    zeros = explained.attribute((a, b), 1)
    for baselines in (0, 0.0, (None, None), (torch.zeros(3), 0)):
        assert all(map(torch.equal, explained.attribute((a, b), 1, baselines=baselines), zeros))
    assert not torch.equal(zeros[0], expected[0])


def test_a_reference_run_leaves_the_output_alone() -> None:
    for name in ("resnet", "bert"):
        case = zoo.build(name)
        given = 0.3 if name == "resnet" else {"input_ids": 3}
        out, tape = compile_for_lrp(case.model, "deep_lift").run(*case.args, baselines=given)
        expected = case()
        assert torch.equal(out if name == "resnet" else out.logits, expected if name == "resnet" else expected.logits)
        tape.relevance(case.target)


class Noisy(nn.Module):
    """Random numbers of both kinds that training draws, and statistics it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
        self.drop, self.head = nn.Dropout(0.4), nn.Linear(48, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm(self.conv(x)))
        return self.head(self.drop((hidden + 0.1 * torch.rand_like(hidden)).flatten(1)))


def test_random_numbers_repeat_and_statistics_are_updated_once() -> None:
    """The output is affine in the dropped hidden layer, so another mask in the reference run would break the sum."""
    model, x = Noisy().double().train(), torch.randn(4, 2, 6, 6).double()
    eager = copy.deepcopy(model)
    x0 = torch.randn(4, 2, 6, 6).double()
    torch.manual_seed(7)
    expected = eager(x)
    torch.manual_seed(7)
    reference = copy.deepcopy(model)(x0)
    torch.manual_seed(7)
    out, tape = compile_for_lrp(model, "deep_lift", verify="ledger").run(x, baselines=x0)
    relevance = tape.relevance(1)
    assert torch.equal(out, expected)
    torch.testing.assert_close(tape.seeded_output(1), (expected - reference)[:, 1])
    torch.testing.assert_close(relevance.sum(), (expected - reference)[:, 1].sum())
    for ours, theirs in zip(model.state_dict().values(), eager.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    following = torch.rand(3)
    torch.manual_seed(7)
    eager(x)
    assert torch.equal(torch.rand(3), following)


def test_statistics_of_a_training_batch_couple_its_samples() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).double().train(), torch.randn(4, 3).double()
    seed = torch.zeros(4, 2).double()
    seed[0, 1] = 1
    found = compile_for_lrp(model, "deep_lift").attribute(x, seed, baselines=torch.randn(4, 3).double())
    assert (found.abs().sum(1) > 0).all()


def test_baselines_are_read_when_the_model_runs() -> None:
    """The reference run comes later, from a copy; changed parameters are refused as ever."""
    model, x, x0 = mlp(), torch.randn(2, 3), torch.randn(2, 3)
    explained = compile_for_lrp(model, "deep_lift")
    expected = explained.attribute(x, 1, baselines=x0)
    _, tape = explained.run(x, baselines=x0)
    x0.zero_()
    assert torch.equal(tape.relevance(1), expected)
    with torch.no_grad():
        model[0].weight.mul_(2)  # type: ignore[index, union-attr, operator]
    with pytest.raises(errors.StaleTapeError):
        tape.seeded_output(1)


def test_strided_inputs_get_strided_baselines() -> None:
    """The compiled code may take views that only the input's strides allow."""

    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(0, 1).view(-1, 2).tanh().sum(1)

    x, x0 = torch.randn(4, 3).double().t(), torch.randn(3, 4).double()
    found = compile_for_lrp(Views(), "deep_lift").run(x, baselines=x0)[1].relevance()
    torch.testing.assert_close(found, x.tanh() - x0.tanh())


def test_tokens_against_baseline_ids() -> None:
    """Relevance of a token is its embedding's difference; a token that is its own baseline has none."""
    case = zoo.build("gpt2", double=True)
    ids = case.kwargs["input_ids"]
    references = ids.clone()
    references[:, 3:5] = 1
    explained = compile_for_lrp(case.model, "deep_lift", verify="ledger")
    out, tape = explained.run(**case.kwargs, baselines=references)
    found = tape.relevance(case.target)
    assert found.shape == ids.shape and (found[:, [0, 1, 2, 5, 6]] == 0).all() and (found[:, 3:5] != 0).all()
    change = (out.logits - case.model(references).logits)[:, -1, 7]
    torch.testing.assert_close(found.sum(1), change.detach())
    by_attribute = explained.attribute(ids, case.target, baselines=1)
    assert torch.equal(by_attribute, explained.run(**case.kwargs, baselines={"input_ids": 1})[1].relevance(case.target))


def test_float32_is_complete_to_its_rounding() -> None:
    case = zoo.build("vit")
    _, delta = compile_for_lrp(case.model, "deep_lift", verify="ledger").attribute(
        *case.args, case.target, baselines=0.1, return_convergence_delta=True
    )
    assert delta.abs().max() <= 1e-4


def test_the_reference_run_is_seen_in_report_and_stages() -> None:
    x = torch.randn(2, 3)
    explained = compile_for_lrp(mlp(), "deep_lift")
    report = explained.report(x)
    kinds = [buffer.kind for buffer in report.buffers]
    assert kinds.count("reference") > 0 and f"{kinds.count('reference')} of the reference run" in str(report)
    texts = {stage.name: stage.text() for stage in explained.stages(x)}
    assert "reference_promise(tanh)" in texts["insert_relevance"] and "reference_promise(" not in texts["partition"]
    assert "# buffer: tanh reference" in texts["partition"] and "reference_tanh" in texts["partition"]


def test_the_verifier_guards_values_of_the_reference_run() -> None:
    stages = {stage.name: stage for stage in compile_for_lrp(mlp(), "deep_lift").stages(torch.randn(2, 3))}
    lowered = stages["lower_promises"].program
    assert any(facts(node).part == "reference" for node in lowered.graph.nodes)
    kept = tuple(buffer for buffer in lowered.buffers if buffer.kind != "reference")
    with pytest.raises(errors.VerifierError, match="of the reference run for which no buffer is planned"):
        verify(lowered.having(buffers=kept), "lower_promises")
    inserted = stages["insert_relevance"].program
    promised = next(node for node in inserted.graph.nodes if "reference_promise" in node.name)
    promised.replace_all_uses_with(promised.args[0])
    with pytest.raises(errors.VerifierError, match="without a promise"):
        verify(inserted, "insert_relevance")


X = torch.ones(2, 3)


def lift(model: nn.Module | None = None, *inputs: Tensor, baselines: Any = None, **options: Any) -> Any:
    return compile_for_lrp(model or mlp(), "deep_lift").run(*(inputs or (X,)), baselines=baselines, **options)


MISTAKES: list[tuple[str, Callable[[], Any], type[errors.LRPError], list[str]]] = [
    (
        "no reference run",
        lambda: compile_for_lrp(mlp(), "epsilon").attribute(X, 0, baselines=0),
        errors.BaselineError,
        ["'epsilon' has no reference run", "deep_lift"],
    ),
    ("shape", lambda: lift(baselines=torch.ones(3, 3)), errors.BaselineError, ["(3, 3)", "(2, 3)", "'input'"]),
    ("dtype", lambda: lift(baselines=X.double()), errors.BaselineError, ["float64", "float32", "Convert it"]),
    ("device", lambda: lift(baselines=X.to("meta")), errors.BaselineError, ["device is meta"]),
    ("kind", lambda: lift(baselines="mean"), errors.BaselineError, ["a str"]),
    ("flag", lambda: lift(baselines=True), errors.BaselineError, ["a bool"]),
    ("name", lambda: lift(baselines={"image": 0}), errors.UnknownInputError, ["'image'", "input"]),
    (
        "one tensor for two",
        lambda: lift(TwoInputs(), X, X, baselines=X),
        errors.BaselineError,
        ["2 attributed inputs (a, b)", "dict"],
    ),
    (
        "one for two",
        lambda: compile_for_lrp(TwoInputs(), "deep_lift").attribute((X, X), 0, baselines=(X,)),
        errors.BaselineError,
        ["1 for 2 input(s)"],
    ),
    (
        "tokens",
        lambda: compile_for_lrp(zoo.build("gpt2").model, "deep_lift").run(input_ids=torch.ones(1, 4).long()),
        errors.BaselineError,
        ["'input_ids'", "no natural zero", "padding"],
    ),
    (
        "fraction of a token",
        lambda: lift(zoo.build("gpt2").model, torch.ones(1, 4).long(), baselines=0.5),
        errors.BaselineError,
        ["a float for ids"],
    ),
    (
        "interpreter",
        lambda: compile_for_lrp(mlp(), "deep_lift", reference=True),
        errors.ReferenceModeError,
        ["no formulas for the differences", "deep_lift"],
    ),
]


@pytest.mark.parametrize(("make", "kind", "parts"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistakes_are_named(make: Callable[[], Any], kind: type[errors.LRPError], parts: list[str]) -> None:
    with pytest.raises(kind) as caught:
        make()
    assert "hint: " in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
