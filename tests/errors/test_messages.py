"""Every refusal: raised by the mistake it is for, with its id, cause, hint and the user's source line."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from mistakes import (
    Branches,
    Casts,
    Constant,
    Counts,
    Disturbed,
    Hypernetwork,
    Maps,
    Misshapen,
    Packed,
    Resizes,
    Selects,
    SettlingSinks,
    ThroughNumpy,
    Uncovered,
    Wraps,
    X,
    branching,
    constant,
    halved,
    leaky,
    misshapen,
    mlp,
)
from torch import Tensor, nn

from lrp_compiler import (
    Contrast,
    Token,
    compile_for_lrp,
    composites,
    errors,
    fit_patterns,
    patch_effects,
    register_rule,
    seeds,
)
from lrp_compiler.cli import load_call
from lrp_compiler.passes.errors import LRPError
from lrp_compiler.passes.verify import verify
from lrp_compiler.registry import REGISTRY
from lrp_compiler.rules import on


def ask(target: Any = 0, model: nn.Module | None = None, x: Tensor = X, verify: str = "off", **kwargs: Any) -> Any:
    return compile_for_lrp(model or mlp(), verify=verify).run(x)[1].relevance(target, **kwargs)


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


def dropping() -> Any:
    model = nn.Sequential(nn.LSTM(3, 4, 2, dropout=0.5))
    return compile_for_lrp(model).run(torch.ones(5, 2, 3))[1].relevance(lambda out: out[0].sum((0, 2)))


def relu_with(rule: Callable[..., Any], **options: Any) -> Any:
    explained = compile_for_lrp(mlp(), rules={torch.ops.aten.relu: rule}, **options)
    return explained.attribute(X, 0)


def unsettled() -> Any:
    explained = compile_for_lrp(mlp(), rules={torch.ops.aten.relu.default: SettlingSinks()})
    tapes = [explained.run(torch.randn(batch, 3))[1] for batch in (2, 3, 5)]
    return tapes[-1].sinks(0)


def hooked() -> Any:
    model = mlp()
    model[1].register_forward_hook(lambda module, args, output: None)
    return ask(0, model)


def illegal() -> None:
    program = compile_for_lrp(mlp()).stages(X)[-1].program
    verify(program.having(outputs=("gone",)), "analyse")


def patterns(given: dict[str, Tensor]) -> Any:
    return compile_for_lrp(mlp().eval(), composites.pattern_attribution(given)).attribute(X, 0)


def boxed() -> Any:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten())
    return compile_for_lrp(model, composites.epsilon_gamma_box((0, 0), (1, 1))).attribute(torch.ones(1, 3, 2, 2), 0)


def interpreted() -> Any:
    return compile_for_lrp(mlp(), reference=True).run(X)[1].ledger(0)


def flat() -> Any:
    return tape("epsilon_plus_flat").parameters(0)


def tape(composite: str = "epsilon", **options: Any) -> Any:
    return compile_for_lrp(mlp(), composite, **options).run(X)[1]


def unrecorded() -> Any:
    with torch.no_grad():
        return tape()


def drawn_twice() -> Any:
    rules = {torch.ops.lrp_tests.disturbs: lambda c, out, x: c}
    tape = compile_for_lrp(Disturbed().train(), "epsilon", rules=rules).run(X)[1]
    return tape.activations("linear")


def without_compiler() -> Any:
    inductor = importlib.import_module("torch._inductor.config")
    with inductor.patch({"cpp.cxx": ("/nowhere/g++",)}):
        return compile_for_lrp(mlp(), backend="inductor").attribute(X, 0)


MUTATION = ["add_", "mistakes.py", "y.add_(1)"]


CASES: list[tuple[str, Callable[[], Any], type[LRPError], list[str]]] = [
    (
        "branch",
        lambda: compile_for_lrp(Branches())(X),
        errors.DataDependentError,
        ["torch.cond", "if x.sum() > 0:"],
    ),
    (
        "shape of data",
        lambda: compile_for_lrp(Selects()).run(X),
        errors.DataDependentError,
        ["aten::index", "return x[x > 0]", "torch.where"],
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
        ["2 operation(s)", "special_i0e", "erfinv", "mistakes.py", "register_rule(torch.ops.aten."],
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
    (
        "not an op",
        lambda: compile_for_lrp(mlp(), rules={"relu": leaky}),
        errors.OptionValueError,
        ["operator"],
    ),
    ("composite", lambda: compile_for_lrp(mlp(), "lrp"), errors.UnknownCompositeError, ["'lrp'", "attnlrp"]),
    ("no values", lambda: ask(0, mlp().to("meta"), X.to("meta")), errors.NoValuesError, ["'0.weight'", "report"]),
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
        errors.ReferenceModeError,
        ["no coefficients"],
    ),
]


CASES += [
    ("in-place reshape", lambda: compile_for_lrp(Resizes())(X), errors.UnsupportedMutationError, MUTATION),
    ("sizes of another call", unsettled, errors.SizesError, ["shape (5, 3)", "Run the model again"]),
    (
        "site of another output",
        lambda: ask(0, zoo.TwoHeads(), at="b"),
        errors.SiteWithoutRelevanceError,
        ["no path leads"],
    ),
    ("nan", lambda: ask(0, x=X * float("nan"), verify="ledger"), errors.NonFiniteError, ["linear_1", "nan"]),
    ("illegal program", illegal, errors.VerifierError, ["after pass 'analyse'", "the output gone is gone"]),
    ("no pattern", lambda: patterns({}), errors.PatternError, ["0.weight", "fit_patterns(model, loader)"]),
    ("no baselines", lambda: compile_for_lrp(mlp()).attribute(X, 0, baselines=0.0), errors.BaselineError, ["epsilon"]),
    ("no factory", lambda: load_call("models"), errors.FactoryNotFoundError, ["'models'", "module:factory", "--path"]),
    ("no model", lambda: load_call("builtins:dict"), errors.FactoryResultError, ["type dict", "(model, args, kwargs)"]),
    ("array", lambda: compile_for_lrp(mlp())(X.numpy()), errors.UnsupportedArgumentError, ["'0'", "numpy.ndarray"]),
    ("set", lambda: compile_for_lrp(mlp())(input={1}), errors.UnsupportedArgumentError, ["'input' is a set"]),
    ("object in", lambda: compile_for_lrp(mlp())(object()), errors.UnsupportedArgumentError, ["'0' is a object"]),
    (
        "object out",
        lambda: compile_for_lrp(Wraps())(X),
        errors.UnsupportedOutputError,
        ["Holder", "dataclass"],
    ),
    ("function", lambda: compile_for_lrp(torch.sum), errors.NotAModelError, ["builtin", "torch.nn.Module"]),  # type: ignore[arg-type]
    ("not a composite", lambda: compile_for_lrp(mlp(), None), errors.CompositeError, ["None", "composites.COMPOSITES"]),
    ("line", lambda: composites.epsilon().override(3), errors.CompositeError, ["'epsilon+'", "line 3", "Matcher"]),  # type: ignore[arg-type]
    ("class by name", lambda: on("linear"), errors.CompositeError, ["'linear'", "OpClass"]),  # type: ignore[arg-type]
    ("epsilon", lambda: composites.epsilon(-1.0), errors.RuleParameterError, ["Epsilon", "positive", "Plain()"]),
    ("bounds", boxed, errors.RuleParameterError, ["ZBox.low", "2 numbers for the 3 channels", "conv2d"]),
    ("ledger of the reference", interpreted, errors.ReferenceModeError, ["keeps no ledger", "without reference=True"]),
    ("mask", lambda: ask(0, through={"0": 3}), errors.MaskError, ["'0'", "type int", "tape.activations('0')"]),
    ("masks", lambda: ask(0, through=["0"]), errors.ArgumentError, ["through=['0']", "Tape.relevance"]),
    ("site by number", lambda: ask(0, at=0), errors.ArgumentError, ["at=0", "a name or a list of names"]),
    ("input by number", lambda: compile_for_lrp(mlp()).run(X, wrt=0), errors.ArgumentError, ["wrt=0", "LRPModule.run"]),  # type: ignore[arg-type]
    ("no inputs", lambda: compile_for_lrp(mlp()).attribute(()), errors.ArgumentError, ["inputs=()", "at least one"]),
    ("chunk", lambda: tape().relevance_of_each([0], chunk=0), errors.ArgumentError, ["chunk=0", "positive"]),
    ("several", lambda: tape().relevance_of_each([]), errors.ArgumentError, ["targets=[]", "at least one target"]),
    ("start", lambda: tape().coefficients_from({"1": X}, "0"), errors.ArgumentError, ["(2, 3)", "shape (2, 4)"]),
    ("weights of flat", flat, errors.ParameterRelevanceError, ["'flat'", "0.weight", "composite.override"]),
    ("not linear", lambda: tape("guided_backprop").linearised(), errors.NotLinearError, ["guided_backprop", "relu"]),
    (
        "no gradients",
        lambda: unrecorded().relevance(0, create_graph=True),
        errors.NoHistoryError,
        ["create_graph=True", "forward pass", "with gradients enabled"],
    ),
    (
        "no derivative",
        lambda: tape("epsilon", rules={torch.ops.aten.relu: halved}).relevance(0, create_graph=True),
        errors.NotDifferentiableError,
        ["lrp_tests::halved", "relu", "Ask without create_graph"],
    ),
    (
        "recompute",
        lambda: compile_for_lrp(mlp(), recompute=["layers.*"]).attribute(X, 0),
        errors.RecomputeError,
        ["recompute='layers.*'", "no module", "Modules: "],
    ),
    ("draws between", drawn_twice, errors.RandomNumbersError, ["drawn in between", "other threads"]),
    ("training", lambda: fit_patterns(mlp(), [X]), errors.PatternFitError, ["training mode", "model.eval()"]),
    ("compiler", without_compiler, errors.CppCompilerError, ["C++ compiler", "/nowhere/g++", "CXX"]),
    ("CUDA graphs", lambda: tape(cuda_graphs=True), errors.OptionValueError, ["cuda_graphs=True", "GPU", "on cpu"]),
    ("region", lambda: compile_for_lrp(Maps())(X), errors.RegionError, ["vmap", "mistakes.py"]),
    ("autocast", lambda: compile_for_lrp(Casts())(X), errors.AutocastError, ["aten::lstm", "self.cell(x)", "'cpu'"]),
    ("hook", hooked, errors.HookError, ["1 has the forward hook hooked.<locals>.<lambda>", "tape.activations"]),
    (
        "transform",
        lambda: torch.func.vmap(compile_for_lrp(mlp()).run)(X.unsqueeze(0)),
        errors.TransformError,
        ["first time", "torch.func", "relevance_of_each"],
    ),
    ("branching rule", lambda: relu_with(branching), errors.RuleTraceError, ["relu", "'branching' branches", "where"]),
    ("constant in a rule", lambda: relu_with(constant), errors.RuleTraceError, ["relu", "out of constants"]),
    ("word of a rule", lambda: relu_with(lambda c, out, x: "c"), errors.RuleResultError, ["a str", "tensor or None"]),
    ("no tensors", lambda: compile_for_lrp(Constant())(), errors.NoTensorsError, ["Constant", "as tensors"]),
    ("rules", lambda: compile_for_lrp(mlp(), rules=[1]), errors.OptionValueError, ["rules=[1]", "dict"]),
    (
        "plain model",
        lambda: patch_effects(mlp(), X, X, 0, ["0"]),
        errors.ArgumentError,
        ["explained=Sequential"],
    ),  # type: ignore[arg-type]
    ("span of a matrix", lambda: ask(seeds.Span(0, 1)), errors.TargetError, ["start_logits"]),
    ("uneven tuples", lambda: ask([(0,), (0, 1)]), errors.TargetError, ["differ in length"]),
    ("empty matrix of seeds", lambda: ask(Misshapen()), errors.TargetError, ["its seed is of shape (2, 1)"]),
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
    kinds = [LRPError, *subclasses(LRPError)]
    assert len({kind.id for kind in kinds}) == len(kinds)
    assert {kind.__name__ for kind in kinds} <= set(errors.__all__)


def subclasses(kind: type[LRPError]) -> list[type[LRPError]]:
    """Every class of refusal of the library, not those that tests define."""
    direct = [sub for sub in kind.__subclasses__() if sub.__module__.startswith("lrp_compiler")]
    return direct + [inner for sub in direct for inner in subclasses(sub)]


def test_every_class_is_rendered() -> None:
    """By a call that really fails; each class has a cause and a remedy of its own."""
    assert set(subclasses(LRPError)) == {kind for _, _, kind, _ in CASES}
    texts = {(kind.template, kind.hint) for kind in subclasses(LRPError)}
    assert len(texts) == len(subclasses(LRPError)) and all(all(pair) for pair in texts)
