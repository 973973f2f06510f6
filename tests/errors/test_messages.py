"""Every refusal: raised by the mistake it is for, with its id, cause, hint and the user's source line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from lrp_compiler import Composite, Contrast, Token, compile_for_lrp, composites, errors, register_rule
from lrp_compiler.passes.errors import LRPError
from lrp_compiler.registry import REGISTRY
from lrp_compiler.rules import OpClass, Plain, on


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


class ThroughNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(x.numpy() + 1)


class Counts(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return ids.float().mean(1)


class Uncovered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.special.i0e(self.inner(x))
        return torch.erfinv(torch.tanh(x))


X = torch.ones(2, 3)


def ask(target: Any = 0, model: nn.Module | None = None, x: Tensor = X, **kwargs: Any) -> Any:
    return compile_for_lrp(model or mlp()).run(x)[1].relevance(target, **kwargs)


def stale() -> Any:
    model = mlp()
    out, tape = compile_for_lrp(model).run(X)
    out.sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    return tape.relevance(0)


def twice() -> None:
    def rule(c: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return c

    register_rule(torch.ops.aten.sinc)(rule)
    try:
        register_rule(torch.ops.aten.sinc)(rule)
    finally:
        REGISTRY.remove(torch.ops.aten.sinc)


class Hypernetwork(nn.Module):
    """A GRU whose weights are computed from its input."""

    def forward(self, x: Tensor) -> Tensor:
        weights = [x.mean((0, 1)).expand(6, 3), x.mean((0, 1))[:2].expand(6, 2)]
        return torch.gru(x, x.new_zeros(1, 2, 2), weights, False, 1, 0.0, False, False, True)[0].sum((1, 2))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
        return self.cell(packed)[1][0][0]


def dropping() -> Any:
    model = nn.Sequential(nn.LSTM(3, 4, 2, dropout=0.5))
    return compile_for_lrp(model).run(torch.ones(5, 2, 3))[1].relevance(lambda out: out[0].sum((0, 2)))


def leaky(c: Tensor, out: Tensor, x: Tensor) -> Tensor:
    """A rule that loses half of the relevance."""
    return c * 0.5


def misshapen(c: Tensor, out: Tensor, x: Tensor) -> Tensor:
    return c.sum(0)


def relu_with(rule: Callable[..., Any], **options: Any) -> Any:
    explained = compile_for_lrp(mlp(), rules={torch.ops.aten.relu: rule}, **options)
    return explained.attribute(X, 0)


CASES: list[tuple[str, Callable[[], Any], type[LRPError], list[str]]] = [
    (
        "branch",
        lambda: compile_for_lrp(Branches())(X),
        errors.DataDependentError,
        ["torch.cond", "if x.sum() > 0:"],
    ),
    (
        "numpy in forward",
        lambda: compile_for_lrp(ThroughNumpy())(X),
        errors.CaptureError,
        ["ThroughNumpy could not be traced", "x.numpy()", "numpy"],
    ),
    (
        "uncovered ops",
        lambda: ask(0, Uncovered()),
        errors.UncoveredOpsError,
        ["2 operation(s)", "special_i0e", "erfinv", "test_messages.py", "register_rule(torch.ops.aten."],
    ),
    (
        "integer input",
        lambda: ask(None, Counts(), torch.ones(2, 3).long()),
        errors.NoAttributableInputError,
        ["ids"],
    ),
    ("wrt", lambda: compile_for_lrp(mlp()).run(X, wrt="image"), errors.UnknownInputError, ["image", "input"]),
    ("site", lambda: ask(0, at="lin"), errors.UnknownSiteError, ["Did you mean", "linear"]),
    (
        "empty submodule",
        lambda: ask(0, nn.Sequential(nn.Linear(3, 2), nn.Identity()), at="1"),
        errors.UnknownSiteError,
        ["no site matches '1'"],
    ),
    ("index", lambda: ask(7), errors.TargetError, ["7", "(2, 2)", "has 2 entries"]),
    ("no target", lambda: ask(None), errors.TargetError, ["one number a sample"]),
    ("three targets", lambda: ask(torch.tensor([0, 1, 0])), errors.TargetError, ["(3,) indices for 2"]),
    ("float index", lambda: ask(0.5), errors.TargetError, ["0.5 is not an index"]),
    ("seed shape", lambda: ask(torch.ones(2, 3)), errors.TargetError, ["shape of the output"]),
    ("tuple", lambda: ask((0, 1)), errors.TargetError, ["2 index(es)", "1 dimension(s)"]),
    ("word", lambda: ask("cat"), errors.TargetError, ["cat"]),
    ("token of a matrix", lambda: ask(Token(0, 1)), errors.TargetError, ["(batch, positions, vocabulary)"]),
    ("contrast", lambda: ask(Contrast(0, 5)), errors.TargetError, ["5"]),
    ("constant callable", lambda: ask(lambda out: torch.ones(2)), errors.TargetError, ["does not depend"]),
    ("output", lambda: ask(0, output="logits"), errors.OutputError, ["logits", "output"]),
    (
        "device",
        lambda: compile_for_lrp(mlp())(X.to("meta")),
        errors.DeviceMismatchError,
        ["'0' is on meta", "the model is on cpu"],
    ),
    ("option", lambda: compile_for_lrp(mlp(), epsilon=1), errors.UnknownOptionError, ["'epsilon'", "verify"]),
    ("option value", lambda: compile_for_lrp(mlp(), verify="yes"), errors.OptionValueError, ["'ledger'"]),
    ("not a module", lambda: compile_for_lrp(torch.sum), errors.OptionValueError, ["torch.nn.Module"]),  # type: ignore[arg-type]
    (
        "not an op",
        lambda: compile_for_lrp(mlp(), rules={"relu": leaky}),
        errors.OptionValueError,
        ["operator"],
    ),
    ("composite", lambda: compile_for_lrp(mlp(), "lrp"), errors.UnknownCompositeError, ["'lrp'", "attnlrp"]),
    ("stale tape", stale, errors.StaleTapeError, ["parameter 0.weight changed"]),
    (
        "ledger",
        lambda: relu_with(leaky, verify="ledger"),
        errors.LedgerError,
        ["does not close at relu", "leaky"],
    ),
    (
        "shape of a rule",
        lambda: relu_with(misshapen),
        errors.RuleResultError,
        ["misshapen", "(4,)", "(2, 4)"],
    ),
    ("count of a rule", lambda: relu_with(lambda c, out, x: (c, c)), errors.RuleResultError, ["2 value(s)"]),
    (
        "no derivative",
        lambda: compile_for_lrp(Hypernetwork(), "gradient").attribute(torch.ones(2, 5, 3)),
        errors.DerivativeError,
        ["aten::gru", "weights", "register_rule"],
    ),
    ("packed", lambda: compile_for_lrp(Packed())(torch.ones(2, 5, 3)), errors.RecurrentError, ["LSTM", "padded"]),
    ("dropout of a kernel", dropping, errors.RecurrentError, ["dropout of 0.5", "model.eval()", "aten::lstm"]),
    ("second rule", twice, errors.DuplicateRuleError, ["aten::sinc", "replace=True"]),
    (
        "coefficients of the reference",
        lambda: compile_for_lrp(mlp(), reference=True).run(X)[1].coefficients(0),
        errors.OptionValueError,
        ["no coefficients"],
    ),
]


@pytest.mark.parametrize(("make", "kind", "parts"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_mistake_is_named(make: Callable[[], Any], kind: type[LRPError], parts: list[str]) -> None:
    with pytest.raises(kind) as caught:
        make()
    text = str(caught.value)
    assert text.startswith(f"[{kind.id}]") and "hint: " in text
    for part in parts:
        assert part in text, text


def test_ids_are_unique_and_every_class_is_exported() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LRPError)]
    assert len({kind.id for kind in kinds}) == len(kinds)
    assert {kind.__name__ for kind in LRPError.__subclasses__()} <= set(errors.__all__)


def test_failed_capture_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(errors.CaptureError):
        compile_for_lrp(Branches())(X)
    assert capfd.readouterr() == ("", "")


def test_sites_without_relevance_say_why() -> None:
    case = zoo.build("gpt2")
    _, tape = compile_for_lrp(case.model, "cp_lrp").run(**case.kwargs)
    with pytest.raises(errors.SiteWithoutRelevanceError, match="inside the recognised gelu_tanh"):
        tape.relevance(case.target, at="tanh")

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    _, tape = compile_for_lrp(TwoHeads()).run(X)
    with pytest.raises(errors.SiteWithoutRelevanceError, match="no path leads from it"):
        tape.relevance(0, at="b")


def test_a_composite_that_leaves_an_op_out_is_refused_whole() -> None:
    """A hole in a composite is never filled with the gradient."""
    hole = Composite("hole", ((on(OpClass.LINEAR), Plain()),))
    with pytest.raises(errors.UncoveredOpsError, match="aten::relu as relu in 1"):
        compile_for_lrp(mlp(), hole).attribute(X, 0)


def test_epsilon_has_to_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        composites.epsilon(-1.0)
