"""Rows that carry no relevance are left out: the same relevance as of the whole graph, and the work is really gone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from training import together

from lrp_compiler import LRPModule, compile_for_lrp
from lrp_compiler.captures import Captures
from lrp_compiler.composites import epsilon, keep_top
from lrp_compiler.entries import Entries, on_rows, rows_of
from lrp_compiler.forward_requests import default_request, one_row
from lrp_compiler.passes.optable import schema_name
from lrp_compiler.passes.program import Program, value_of
from lrp_compiler.passes.rules.base import Rule, is_by_row
from lrp_compiler.passes.rules.plain import Plain
from lrp_compiler.seeds import Contrast, LogProbability, MeanContrast, Predicted, Seed, Token, TopK

TEXT = {"gpt2": (-1, 7), "llama": (3, 9)}
COMPOSITES = ("attnlrp", "cp_lrp", "epsilon", "epsilon_plus", "input_x_gradient")


def logit(target: tuple[int, ...]) -> Callable[[Any], Tensor]:
    """The target as a function of the output, of which the compiler knows nothing: its seed is a dense one."""
    return lambda output: output[(slice(None), *target)].sum()


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal but for rounding in float64."""
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-12 * expected.norm()


def lean(explained: LRPModule, *args: Any) -> Program:
    """The partitioned program of an attribution for one class or token."""
    call = explained.explained_call(args, {})
    return call.emitted(one_row(call.program, default_request(call, None, explained.options)))[1].program


class Logits(nn.Module):
    """A language model as tokens -> logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits


@pytest.mark.parametrize(
    ("name", "composite"),
    [
        pytest.param(name, one, marks=() if name == "gpt2" or one in ("attnlrp", "epsilon_plus") else pytest.mark.slow)
        for name in TEXT
        for one in COMPOSITES
    ],
)
def test_a_token_costs_a_row(name: str, composite: str) -> None:
    case = zoo.build(name, double=True)
    logits = Logits(case.model)
    explained = compile_for_lrp(logits, composite)
    tokens, target = case.kwargs["input_ids"], TEXT[name]
    with torch.no_grad():
        expected = explained.run(tokens)[1].relevance(logit(target))
        output, tape = explained.run(tokens)
        assert torch.equal(output, logits(tokens))
        assert_same(tape.relevance(target), expected)
        assert_same(tape.relevance(Token(*target)), expected)
        assert_same(explained.attribute(tokens, target), expected)
        nothing, waiting = explained.run(tokens, outputs=False)
        assert nothing is None
        assert_same(waiting.relevance(target), expected)
        assert_same(waiting.relevance(logit(target)), expected)
        assert_same(waiting.relevance(target), expected)


def products(graph: Any) -> dict[str, int]:
    """The multiply-adds of every matrix product of a graph, by name."""
    found = {}
    for node in graph.nodes:
        name = schema_name(node.target) if node.op == "call_function" else ""
        if name in ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul"):
            inner = value_of(node.args[1 if name == "aten::addmm" else 0]).shape[-1]
            found[node.name] = value_of(node).numel() * inner
    return found


class Causal(nn.Module):
    """Causal attention that its library spells as a flag or as a mask of positions, and a head."""

    def __init__(self, is_spelled: bool) -> None:
        super().__init__()
        self.is_spelled, self.project, self.head = is_spelled, nn.Linear(8, 24), nn.Linear(8, 96)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        places = torch.arange(x.shape[1])
        mask = places[None, :] <= places[:, None] if self.is_spelled else None
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        found: Tensor = self.head(mixed.transpose(1, 2).flatten(2))
        return found


@pytest.mark.parametrize("is_spelled", [False, True])
def test_a_token_costs_a_row_behind_outputs_too(is_spelled: bool) -> None:
    """The pass that made all outputs left what the rows need, but for their masks, which nobody has made before."""
    torch.manual_seed(0)
    explained, x = compile_for_lrp(Causal(is_spelled).double(), "attnlrp"), torch.randn(1, 64, 8, dtype=torch.double)
    _, tape = explained.run(x)
    call = explained.explained_call((x,), {})
    asked = tape.questions.ask((40, 3), None, call.source_readings).request
    assert [(pick.dim, pick.count) for pick in asked.picks] == [(1, 1), (2, 1)] and asked.keeps_outputs
    with torch.no_grad():
        assert_same(tape.relevance((40, 3)), explained.run(x)[1].relevance(logit((40, 3))))


def test_the_work_of_dead_rows_is_gone() -> None:
    """Of GPT-2's multiply-adds: one row of the head, and one token in the last block behind its keys and values.

    The logit itself is not computed: AttnLRP does not need it.
    """
    case = zoo.build("gpt2", double=True)
    model = Logits(case.model)
    explained = compile_for_lrp(model, "attnlrp")
    program = lean(explained, case.kwargs["input_ids"])
    config = case.model.config
    batch, tokens, width = *case.kwargs["input_ids"].shape, config.n_embd
    whole = batch * tokens * width * width
    row = batch * width * width
    # Queries, keys and values are one product in GPT-2; output projection, and the MLP's two of four times the width.
    block, last = 3 * whole + whole + 8 * whole, 3 * whole + row + 8 * row
    expected = (config.n_layer - 1) * block + last
    assert sum(products(program.graph).values()) == expected
    assert program.relevance_graph is not None
    assert sum(products(program.relevance_graph).values()) == expected + batch * width
    assert not any("Constant" not in type(leaf).__name__ for leaf in program.outputs)


def test_a_class_token_costs_a_row() -> None:
    """ViT reads one token of the last block: the model's own selection is pushed up, outputs keep their bits."""
    case = zoo.build("vit", double=True)
    explained = compile_for_lrp(case.model, "attnlrp")
    with torch.no_grad():
        output, tape = explained.run(*case.args)
        assert torch.equal(output, case.model(*case.args))
        found = tape.relevance(case.target)
    assert_same(found, compile_for_lrp(case.model, "attnlrp", reference=True).attribute(*case.args, case.target))
    call = explained.explained_call(case.args, {})
    graph = call.emitted(default_request(call, None, explained.options))[1].program.relevance_graph
    batch, tokens, width, hidden = 2, 10, 16, case.model.blocks[0].mlp[0].out_features
    counted = list(products(graph).values())
    # Two products of the MLP in each of two blocks, in the last one for the class token alone.
    assert counted.count(batch * tokens * width * hidden) == counted.count(batch * width * hidden) == 2


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, WEIGHT, WEIGHT[:, 0]),
    "matmul": lambda x: x @ WEIGHT,
    "batched": lambda x: torch.bmm(x, WEIGHT.expand(x.shape[0], 6, 6)),
    "addmm": lambda x: torch.addmm(WEIGHT[0], x.reshape(-1, 6), WEIGHT).view(x.shape),
    "sum of rows": lambda x: x + x.mean(1, keepdim=True),
    "broadcast": lambda x: x * WEIGHT[0] + WEIGHT[:4, :1],
    "layer norm": lambda x: F.layer_norm(x, (6,)),
    "softmax": lambda x: x * x.softmax(-1),
    "gelu": F.gelu,
    "rms norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "heads": lambda x: x.view(*x.shape[:2], 2, 3).transpose(1, 2).contiguous().transpose(1, 2).reshape(x.shape),
    "permute": lambda x: x.permute(2, 0, 1).permute(1, 2, 0),
    "cat": lambda x: torch.cat([x, 2 * x], -1),
    "split": lambda x: x.split(3, -1)[0] * x.split(3, -1)[1],
    "flat": lambda x: F.linear(x.flatten(0, 1), WEIGHT).unflatten(0, (x.shape[0], 4)),
    "sum": lambda x: x.unsqueeze(-1).expand(*x.shape, 3).sum(-1),
    "shift": lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1] + x,
    "attention": lambda x: F.scaled_dot_product_attention(*(x @ W for W in HEADS)),
    "causal": lambda x: F.scaled_dot_product_attention(*((x @ W)[:, None] for W in HEADS), is_causal=True)[:, 0],
    "biased": lambda x: F.scaled_dot_product_attention(*((x @ W)[:, None] for W in HEADS), attn_mask=BIAS)[:, 0],
    "spelled": lambda x: ((x @ HEADS[0]) @ (x @ HEADS[1]).mT + BIAS).softmax(-1) @ (x @ HEADS[2]),
    "where": lambda x: torch.where(WEIGHT[:4, :1] > 0, x, 0.5 * x),
}
torch.manual_seed(0)
WEIGHT = torch.randn(6, 6, dtype=torch.float64)
HEADS = [torch.randn(6, 6, dtype=torch.float64) for _ in range(3)]
BIAS = torch.randn(4, 4, dtype=torch.float64)


class Around(nn.Module):
    """A linear map, an op, and a linear map of the features."""

    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.op = op
        self.first = nn.Linear(6, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.first(x)).tanh()


@pytest.mark.parametrize("name", OPS)
def test_rows_reach_back_through(name: str) -> None:
    """Each op on picked rows gives autograd's gradient, for every dimension of its output."""
    torch.manual_seed(0)
    model = Around(OPS[name])
    explained = compile_for_lrp(model, "input_x_gradient")
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    output = model(x)
    for target in ((1, 2), [(3, 0), (0, 1)]):
        places = [target, target] if isinstance(target, tuple) else target
        chosen = sum(output[sample, row, column] for sample, (row, column) in enumerate(places))
        (gradient,) = torch.autograd.grad(chosen, x, retain_graph=True)
        expected = gradient * x.detach()
        assert_same(explained.attribute(x.detach(), target), expected)
        assert_same(explained.run(x.detach())[1].relevance(target), expected)


@pytest.mark.parametrize("name", sorted(set(OPS) - {"shift"}))
def test_rows_are_pushed_up_to_the_first_layer(name: str) -> None:
    """Where every op lets one row of tokens through, the first layer is computed for fewer rows, or for keys alone."""
    explained = compile_for_lrp(Around(OPS[name]), "attnlrp")
    program = lean(explained, torch.randn(2, 4, 6, dtype=torch.float64))
    assert any("_at_1_rows" in node.name or "_at_0_rows" in node.name for node in program.graph.nodes)


def targets(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """Targets of an output of this shape; contrasts are between two of its logits."""
    batch, tokens, classes = shape

    def differ(places: tuple[tuple[int, int], tuple[int, int]]) -> bool:
        (first, left), (second, right) = places
        return (first % tokens, left) != (second % tokens, right)

    position, index = st.integers(-tokens, tokens - 1), st.integers(0, classes - 1)
    one = st.tuples(position, index)
    return st.one_of(
        one,
        st.lists(one, min_size=batch, max_size=batch),
        st.builds(Token, position, index),
        st.tuples(one, one).filter(differ).map(lambda places: Contrast(*places)),
    )


SHARED = Captures()
MODEL = Around(OPS["causal"])
VALUES = torch.linspace(-1, 1, 72, dtype=torch.float64).view(3, 4, 6).sin()


@given(targets((3, 4, 6)), st.sampled_from(["attnlrp", "epsilon", "attnlrp_gamma"]))
def test_any_target_gives_what_its_dense_seed_gives(target: Any, composite: str) -> None:
    explained = LRPModule(MODEL, composite, captures=SHARED)
    seed = target.seed(MODEL(VALUES)) if isinstance(target, Seed) else None
    if seed is None:
        places = target if isinstance(target, list) else [target] * 3
        seed = torch.zeros(3, 4, 6, dtype=torch.float64)
        for sample, place in enumerate(places):
            seed[(sample, *place)] = 1
    expected = explained.run(VALUES)[1].relevance(lambda output: (output * seed).sum())
    assert_same(explained.attribute(VALUES, target), expected)
    assert_same(explained.attribute(VALUES, seed), expected)


@pytest.mark.parametrize("again", [(1, 0), (-3, 0)])
def test_a_logit_in_contrast_with_itself_leaves_nothing_but_rounding(again: tuple[int, int]) -> None:
    explained = LRPModule(MODEL, "attnlrp", captures=SHARED)
    one, none = explained.attribute(VALUES, (1, 0)), explained.attribute(VALUES, Contrast((1, 0), again))
    assert none.norm() <= 1e-12 * one.norm()


def test_several_targets_cost_their_rows() -> None:
    torch.manual_seed(0)
    explained = compile_for_lrp(MODEL, "attnlrp")
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    tape = explained.run(x)[1]
    asked = [(0, 1), (3, 5), (2, 2)]
    for found, target in zip(tape.relevance_of_each(asked), asked, strict=True):
        assert_same(found, tape.relevance(logit(target)))


@pytest.mark.parametrize("target", [Predicted(), LogProbability((1, 2)), MeanContrast((1, 2))], ids=str)
def test_targets_that_read_outputs(target: Seed) -> None:
    torch.manual_seed(0)
    explained = compile_for_lrp(MODEL, "epsilon")
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    seed = target.seed(MODEL(x).detach())
    expected = explained.run(x)[1].relevance(lambda output: (output * seed).sum())
    assert_same(explained.attribute(x, target), expected)
    assert_same(explained.run(x, outputs=False)[1].relevance(target), expected)


class Doubled(Contrast):
    """A contrast whose seed a user has changed, and not said where it is."""

    def seed(self, output: Tensor) -> Tensor:
        return 2 * super().seed(output) + 1


def test_a_seed_that_a_subclass_changes_is_taken_as_it_is() -> None:
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    explained = compile_for_lrp(MODEL, "epsilon")
    seed = Doubled((1, 2), (3, 4)).seed(MODEL(x).detach())
    expected = explained.run(x)[1].relevance(lambda output: (output * seed).sum())
    assert_same(explained.attribute(x, Doubled((1, 2), (3, 4))), expected)


def test_sites_behind_a_selection_are_read_whole() -> None:
    case = zoo.build("vit", double=True)
    explained = compile_for_lrp(case.model, "attnlrp")
    sites = ["blocks.1", "blocks.1.mlp", "input"]
    found = explained.run(*case.args)[1].relevance(case.target, at=sites)
    each = {site: explained.run(*case.args)[1].relevance(case.target, at=site) for site in sites}
    dense = explained.run(*case.args)[1].relevance(lambda output: output[:, case.target].sum(), at=sites)
    for site in sites:
        assert_same(found[site], dense[site])
        assert_same(each[site], dense[site])
    # Of all tokens the class token alone carries relevance behind the last block.
    assert found["blocks.1"][:, 1:].abs().max() == 0


def test_rules_that_look_at_all_rows_are_not_cut() -> None:
    """A filter keeps the largest share of what it is given: given fewer rows, it would keep others."""
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    explained = compile_for_lrp(MODEL, keep_top(epsilon(), 0.5))
    expected = explained.run(x)[1].relevance(logit((1, 2)))
    assert_same(explained.attribute(x, (1, 2)), expected)


class Mine(Plain):
    """A rule of a user's, made of one that goes by row."""


def test_going_by_row_is_not_inherited() -> None:
    assert is_by_row(Plain())
    assert not is_by_row(Mine())
    assert not is_by_row(Rule())


class Trained(nn.Module):
    """Batch statistics in front of tokens, dropout behind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6).double()
        self.body = nn.Linear(6, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.body(self.norm(x.mT).mT), 0.5, self.training)


def test_a_pass_without_outputs_changes_what_the_model_changes_once() -> None:
    """Running statistics and random numbers are those of one call of the model."""
    torch.manual_seed(0)
    model, twin = Trained(), Trained()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    explained = compile_for_lrp(model, "input_x_gradient")
    torch.manual_seed(1)
    tape = explained.run(x, outputs=False)[1]
    assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
    found = [tape.relevance((1, 2)), tape.relevance((1, 2)), tape.relevance(logit((1, 2)))]
    leaf = x.clone().requires_grad_()
    torch.manual_seed(1)
    (gradient,) = torch.autograd.grad(twin(leaf)[:, 1, 2].sum(), leaf)
    for one in found:
        assert_same(one, gradient * x)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, twin.get_buffer(name))


def test_differentiable_relevance_of_a_row() -> None:
    """Derivatives with respect to parameters by what is left of the graph equal those by all of it."""
    torch.manual_seed(0)
    model = Around(OPS["attention"])
    explained = compile_for_lrp(model, "attnlrp")
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    gradients = []
    for target in ((1, 2), logit((1, 2))):
        tape = explained.run(x)[1]
        loss = tape.relevance(target, create_graph=True).square().sum()
        gradients.append(torch.autograd.grad(loss, model.first.weight)[0])
    assert_same(*gradients)


def test_entries_on_rows() -> None:
    """The small seed at its rows is the dense seed, whatever is shared, negative, repeated or padded."""
    places = (torch.tensor([[1, -1], [2, 2]]), torch.tensor([[5, 5], [5, 5]]))
    entries = Entries(places, torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
    shape = (2, 9, 11)
    (small,) = on_rows([entries], shape, 2) or [None]
    assert small is not None
    assert {dim: len(rows) for dim, rows in small.rows.items()} == {1: 4, 2: 2}
    spread = torch.zeros(2, small.values.shape[1], 11).index_add(2, small.rows[2], small.values)
    assert torch.equal(torch.zeros(shape).index_add(1, small.rows[1], spread), entries.dense(shape))
    assert on_rows([entries], (2, 4, 3), 2) is None


def test_rows_of_a_seed_given_as_it_is() -> None:
    seed = torch.zeros(2, 8, 8)
    seed[0, 3, 1], seed[1, 5, 2], seed[1, 6, 7] = 1.0, -1.0, 2.0
    small = rows_of(seed, 2)
    assert small is not None
    assert set(small.rows[1].tolist()) >= {3, 5, 6}
    assert small.values.shape == (2, 4, 4)
    spread = torch.zeros(2, 4, 8).index_add(2, small.rows[2], small.values)
    assert torch.equal(torch.zeros(2, 8, 8).index_add(1, small.rows[1], spread), seed)
    assert rows_of(torch.ones(2, 8, 8), 2) is None


def test_top_k_of_many_classes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 40)).double()
    explained = compile_for_lrp(model, "epsilon")
    x = torch.randn(3, 6, dtype=torch.float64)
    seed = TopK(3).seed(model(x).detach())
    expected = explained.run(x)[1].relevance(lambda output: (output * seed).sum())
    assert_same(explained.attribute(x, TopK(3)), expected)


@pytest.mark.parametrize("composite", ["guided_backprop", "deconvnet", "epsilon"])
@pytest.mark.parametrize("target", [Contrast((1, 2), (1, 5)), Contrast((1, 2), (1, 2))], ids=str)
def test_a_row_asked_for_twice_is_one_row(target: Contrast, composite: str) -> None:
    """Rules that are not linear in the seed see what both entries of a position send, not each by itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 9)).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    explained = compile_for_lrp(model, composite)
    seed = target.seed(model(x).detach())
    expected = explained.run(x)[1].relevance(lambda output: (output * seed).sum())
    torch.testing.assert_close(explained.attribute(x, target), expected, rtol=1e-12, atol=1e-15)


def test_several_targets_of_a_pass_that_waits() -> None:
    torch.manual_seed(0)
    explained = compile_for_lrp(MODEL, "attnlrp")
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    asked = [(0, 1), (3, 5)]
    tape = explained.run(x, outputs=False)[1]
    for found, target in zip(tape.relevance_of_each(asked), asked, strict=True):
        assert_same(found, explained.attribute(x, target))


def test_threads_that_ask_a_waiting_tape_get_their_own_rows() -> None:
    """Whoever comes first runs the pass for its rows; nobody reads another one's."""
    torch.manual_seed(0)
    explained = compile_for_lrp(MODEL, "attnlrp")
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    asked = [(row, column) for row in range(4) for column in range(2)]
    expected = [explained.run(x)[1].relevance(logit(target)) for target in asked]
    for _ in range(5):
        tape = explained.run(x, outputs=False)[1]
        for found, one in zip(together([partial(tape.relevance, target) for target in asked]), expected, strict=True):
            assert_same(found, one)
