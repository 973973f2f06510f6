"""Sizes that differ from call to call: static first, one graph for all from the second shape on, and when not."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrp_compiler import LRPModule, compile_for_lrp
from lrp_compiler.captures import GRAPHS, RecompileWarning
from lrp_compiler.errors import SizesError
from lrp_compiler.passes.rules.base import Edges, Rule, Sinks
from lrp_compiler.passes.site import Site

SHAPES = [(2, 7), (3, 9), (4, 11), (5, 6)]
CASES = [("resnet", "epsilon_plus"), ("vit", "attnlrp"), ("bert", "epsilon_plus"), ("llama", "attnlrp")]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (("vgg", "epsilon_plus"), ("gpt2", "attnlrp"), ("t5", "attnlrp"))
]


def resized(case: zoo.Case, batch: int, tokens: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a case with another batch, and another length if they are tokens."""
    torch.manual_seed(100 * batch + tokens)

    def one(value: Tensor) -> Tensor:
        if value.dtype.is_floating_point:
            return torch.randn(batch, *value.shape[1:])
        sequence = zoo.ids(batch, tokens)
        return zoo.padding(sequence) if value.max() <= 1 else sequence

    made: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(one, (case.args, case.kwargs))
    return made


def relevance(explained: LRPModule, args: Any, kwargs: Any, target: Any) -> tuple[Any, dict[str, Tensor]]:
    with torch.no_grad():
        output, tape = explained.run(*args, **kwargs)
        found = tape.relevance(target)
    return output, found if isinstance(found, dict) else {"input": found}


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "composite"), CASES)
def test_one_graph_serves_all_sizes(name: str, composite: str) -> None:
    """The first shape is traced as it is, open sizes give the same bits as a trace of each shape by itself."""
    case = zoo.build(name)
    explained = compile_for_lrp(case.model, composite)
    target = (2, 7) if name in ("gpt2", "llama", "t5") else 1
    for shape in SHAPES:
        args, kwargs = resized(case, *shape)
        output, found = relevance(explained, args, kwargs, target)
        # The first is a trace of its own anyway.
        if shape in (SHAPES[0], SHAPES[2]):
            continue
        alone = compile_for_lrp(case.model, composite, dynamic=False)
        expected_output, expected = relevance(alone, args, kwargs, target)
        for ours, theirs in zip(pytree.tree_leaves(output), pytree.tree_leaves(expected_output), strict=True):
            assert torch.equal(ours, theirs)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert [compilation.form for compilation in explained.compilations] == ["static", "symbolic"]
    assert "symbolic (sizes differ: " in str(explained.compilations[1])


@pytest.mark.thorough
def test_a_tape_of_open_sizes_answers_every_question() -> None:
    case = zoo.build("bert", double=True)
    explained = compile_for_lrp(case.model, "attnlrp")
    answers: list[dict[bool, Any]] = []
    for shape in SHAPES[1:3]:
        args, kwargs = resized(case, *shape)
        answers.append({})
        for dynamic in (True, False):
            module = explained if dynamic else compile_for_lrp(case.model, "attnlrp", dynamic=False)
            tape = module.run(*args, **kwargs)[1]
            ledger = tape.ledger(1)
            ledger.check(1e-10)
            mask = torch.ones(shape[0], shape[1], 1, dtype=torch.float64)
            site = "bert.encoder.layer.0"
            answers[-1][dynamic] = (
                tape.relevance(1, at=site),
                tape.relevance(1, through={site: mask * 0.5}),
                tape.coefficients(1, at=site),
                tape.sinks(1),
                tape.activations(site),
            )
    assert [compilation.form for compilation in explained.compilations] == ["static", "symbolic"]
    for both in answers:
        ours, theirs = pytree.tree_leaves(both[True]), pytree.tree_leaves(both[False])
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_gradients_flow_through_open_sizes() -> None:
    case = zoo.build("gpt2")
    explained = compile_for_lrp(case.model)
    for shape in SHAPES[:3]:
        _, kwargs = resized(case, *shape)
        found = torch.autograd.grad(explained(**kwargs).logits.square().sum(), [*case.model.parameters()])
        expected = torch.autograd.grad(case.model(**kwargs).logits.square().sum(), [*case.model.parameters()])
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    assert len(explained.compilations) == 2


class Branching(nn.Module):
    """Takes another path for long inputs, and returns a size."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        layer = self.long if x.shape[1] > 10 else self.short
        return {"scores": layer(x).mean(1), "length": x.shape[1]}


def test_a_branch_on_a_size_is_heeded() -> None:
    model = Branching()
    explained = compile_for_lrp(model, "attnlrp")
    for length in (5, 6, 8, 20, 30, 9):
        x = torch.randn(2, length, 4)
        out, tape = explained.run(x)
        layer = model.long if length > 10 else model.short
        assert out["length"] == length and torch.equal(out["scores"], model(x)["scores"])
        torch.testing.assert_close(tape.relevance(2), x * layer.weight[2] / length)
    # One graph for short inputs, one for long ones.
    assert [compilation.form for compilation in explained.compilations] == ["static", "symbolic", "symbolic"]


class Outer(nn.Module):
    """Adds a row and a column."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(-1)


def test_sizes_that_were_equal_need_not_stay_so() -> None:
    explained = compile_for_lrp(Outer(), "input_x_gradient")
    for rows, columns in [((3, 5), (3, 5)), ((3, 6), (3, 6)), ((4, 7), (4, 7)), ((4, 7), (1, 7)), ((4, 7), (4, 1))]:
        x, y = torch.randn(rows), torch.randn(columns)
        out, tape = explained.run(x, y)
        assert torch.equal(out, (x * y).sum(-1))
        torch.testing.assert_close(tape.relevance(torch.ones(4 if rows[0] == 4 else 3))["x"], x * y.expand_as(x))


def test_views_of_larger_tensors_have_strides_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    explained, alone = compile_for_lrp(model, "attnlrp"), compile_for_lrp(model, "attnlrp", dynamic=False)
    whole = torch.randn(6, 9, 8)
    for x in (whole[:2, :5, :4], whole[1:4, 2:, ::2], whole[:5, 1:7, 4:], whole[:1, 2:, 4:], torch.randn(4, 8, 4)):
        found, expected = explained.run(x)[1].relevance((0, 1)), alone.run(x)[1].relevance((0, 1))
        assert torch.equal(explained(x), model(x)) and torch.equal(found, expected)


def test_models_that_depend_on_sizes_say_so_and_are_bounded() -> None:
    case = zoo.build("lstm")
    explained = compile_for_lrp(case.model, "attnlrp")
    for length in range(3, 3 + GRAPHS):
        explained(zoo.ids(2, length))
    second = explained.compilations[1]
    assert second.form == "static" and "depends on the size of tokens dimension 1" in second.reason
    with pytest.warns(RecompileWarning, match="more than 8 shapes: the forward depends on the size of tokens"):
        explained(zoo.ids(2, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explained(zoo.ids(2, 31))
    assert explained.compiler.captures.kept == GRAPHS


class OverTokens(nn.Module):
    """A normalisation over a dimension of open size, and a mean over it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.sum(1, keepdim=True) / x.shape[1]
        scaled = centred / (centred.pow(2).sum(1, keepdim=True) / x.shape[1] + 1e-5).sqrt()
        return self.layer(scaled.sum(1) / x.shape[1])


def test_rules_are_the_same_whether_sizes_are_open() -> None:
    """How many values a hand-written norm is over belongs to its rule."""
    explained = compile_for_lrp(OverTokens().double(), "attnlrp")
    alone = compile_for_lrp(explained.original, "attnlrp", dynamic=False)
    for length in (5, 6, 8):
        x = torch.randn(2, length, 4, dtype=torch.float64)
        ours, theirs = explained.run(x)[1], alone.run(x)[1]
        assert torch.equal(ours.relevance(1), theirs.relevance(1))
        assert sorted(ours.sinks(1)) == sorted(theirs.sinks(1))


def test_graphs_that_are_not_kept_are_freed_with_their_rules() -> None:
    explained = compile_for_lrp(nn.Linear(4, 3), "epsilon", dynamic=False)
    programs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecompileWarning)
        for batch in range(2, 4 + GRAPHS):
            x = torch.randn(batch, 4)
            explained.run(x)
            programs.append(weakref.ref(explained.explained_call((x,), {})))
    gc.collect()
    assert sum(program() is not None for program in programs) == GRAPHS


def test_dynamic_can_be_turned_off() -> None:
    explained = compile_for_lrp(nn.Linear(4, 3), dynamic=False)
    for batch in (2, 3, 4):
        explained(torch.randn(batch, 4))
    assert [compilation.form for compilation in explained.compilations] == ["static"] * 3
    assert "  traced\n    [2, 4]: static (first call of its kind)" in str(explained.report(torch.randn(4, 4)))
    assert "dynamic=False" in explained.compilations[1].reason


@dataclass(frozen=True)
class Counting(Rule):
    """A rule that reads a size as a plain number: where its edge is made, or only where its sink is."""

    name: ClassVar[str] = "counting"
    in_sinks: bool = False

    def propagate(self, site: Site, edge: Any) -> Edges:
        count = 1 if self.in_sinks else int(edge.meta["val"].shape[0])
        return site.vjp(site.scale(edge, count), self.receivers(site.op))

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        return {"count": site.scale(edge, int(edge.meta["val"].shape[0]))} if self.in_sinks else {}


def counting(in_sinks: bool) -> tuple[nn.Module, Callable[..., LRPModule]]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

    def compiled(**options: Any) -> LRPModule:
        return compile_for_lrp(model, "attnlrp", rules={torch.ops.aten.tanh.default: Counting(in_sinks)}, **options)

    return model, compiled


def test_a_rule_that_settles_a_size_is_compiled_for_each() -> None:
    model, compiled = counting(in_sinks=False)
    explained = compiled()
    for batch in (2, 3, 5, 3, 4):
        x = torch.randn(batch, 4)
        gate = 1 - torch.tanh(model[0](x)) ** 2
        c = ((model[2].weight[1] * gate * batch) @ model[0].weight).detach()
        torch.testing.assert_close(explained.run(x)[1].relevance(1), x * c)


def test_a_later_question_that_settles_a_size_is_refused_not_answered_wrongly() -> None:
    _, compiled = counting(in_sinks=True)
    explained = compiled()
    tapes = [explained.run(torch.randn(batch, 4))[1] for batch in (2, 3, 5)]
    with pytest.raises(SizesError, match=r"LRP025.*\n.*Run the model again"):
        tapes[2].sinks(1)
    x = torch.randn(5, 4)
    again = explained.run(x)[1]
    assert again.sinks(1) and again.relevance(1).shape == x.shape
