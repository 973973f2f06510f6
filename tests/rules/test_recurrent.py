"""LSTM, GRU and RNN against Arras et al. 2017 step by step, and against autograd with detached gates (RULES.md 1.8)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from accuracy import relative_error
from catalogue import agreement
from hypothesis import given
from hypothesis import strategies as st
from pairs import covering
from recurrence import KINDS, arras, cell, frozen, start
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp, errors
from lrp_compiler.kernels.recurrent import recurrent_pullback
from lrp_compiler.ledger import LedgerRow

FLOAT64 = 1e-9
"""Relevance-space oracles divide by outputs that may be small."""

EXACT = 1e-10
"""Coefficients and ledgers in float64 divide by nothing."""


class Reads(nn.Module):
    """A recurrent module whose outputs (0: output, 1: h_n, 2: c_n) named in ``which`` are laid end to end."""

    def __init__(self, recurrent: nn.RNNBase, which: tuple[int, ...] = (0,)) -> None:
        super().__init__()
        self.recurrent, self.which = recurrent, which

    def forward(self, x: Tensor, h0: Tensor | None = None, c0: Tensor | None = None) -> Tensor:
        return laid_out(self.recurrent(x, h0 if c0 is None else (h0, c0)), self.which)


def laid_out(results: Any, which: tuple[int, ...]) -> Tensor:
    output, last = results
    values = [output, *(last if isinstance(last, tuple) else (last,))]
    return torch.cat([values[index].flatten() for index in which])


def close(found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT * scale)


def gaps(rows: tuple[LedgerRow, ...]) -> float:
    return max(row.relative_gap for row in rows)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_relevance_is_that_of_arras_step_by_step(kind: str, layers: int, bidirectional: bool, bias: bool) -> None:
    module = KINDS[kind](4, 5, layers, bidirectional=bidirectional, bias=bias).double()
    x = torch.randn(6, 3, 4).double()
    explained = compile_for_lrp(module)
    output, tape = explained.run(x)
    seed = torch.randn_like(output[0])
    expected = arras(kind, module, x, output[0] * seed)
    if kind == "rnn_relu":
        assert (output[0] == 0).any()
    assert agreement(explained, x, tape.relevance(seed), expected, "Arras step by step") <= FLOAT64
    assert gaps(tape.ledger(seed).rows) <= EXACT


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, nn.RNNBase, Tensor, bool, tuple[int, ...]]:
    """(kind, module, input, whether states are given, which outputs are explained)."""
    kind = draw(st.sampled_from(list(KINDS)))
    features, hidden, layers = (draw(st.integers(1, size)) for size in (4, 4, 3))
    options = {name: draw(st.booleans()) for name in ("bidirectional", "bias", "batch_first")}
    projected = {"proj_size": draw(st.integers(0, hidden - 1))} if kind == "lstm" else {}
    torch.manual_seed(draw(st.integers(0, 99)))
    module = KINDS[kind](features, hidden, layers, **options, **projected).double()
    time, batch = draw(st.integers(1, 5)), draw(st.sampled_from([None, 0, 1, 3]))
    sizes = (time,) if batch is None else (batch, time) if module.batch_first else (time, batch)
    outputs = range(3 if kind == "lstm" else 2)
    which = draw(st.lists(st.sampled_from(outputs), min_size=1, unique=True))
    return kind, module, torch.randn(*sizes, features).double(), draw(st.booleans()), tuple(which)


@given(calls())
def test_coefficients_are_the_gradient_with_detached_gates(call: Any) -> None:
    kind, module, x, given_states, which = call
    states = start(module, x) if given_states else []
    names = ["x", "h0", "c0"][: 1 + len(states)]
    result, tape = compile_for_lrp(Reads(module, which)).run(x, *states)
    leaves = [value.clone().requires_grad_() for value in (x, *(states or start(module, x, 0.0)))]
    again = laid_out(frozen(kind, module, leaves[0], leaves[1:]), which)
    close(result.detach(), again.detach())
    seed = torch.randn_like(result)
    expected = torch.autograd.grad(again, leaves, seed, allow_unused=True)
    found = tape.coefficients(seed, at=names)
    for leaf, ours, theirs in zip(leaves, found.values(), expected, strict=False):
        close(ours, torch.zeros_like(leaf) if theirs is None else theirs)
    rows = [row for row in tape.ledger(seed).rows if row.rule == "recurrent"]
    assert len(rows) == 1 and gaps(tuple(rows)) <= EXACT
    assert set(rows[0].taken) <= set(names) | {"unsqueeze", "unsqueeze_1", "unsqueeze_2"}


@given(calls())
def test_gradient_composites_are_torch_autograd(call: Any) -> None:
    _, module, x, given_states, which = call
    states = start(module, x) if given_states else []
    model = Reads(module, which)
    leaves = [value.clone().requires_grad_() for value in (x, *states)]
    result = model(*leaves)
    seed = torch.randn_like(result)
    expected = torch.autograd.grad(result, leaves, seed, allow_unused=True)
    for composite in ("gradient", "input_x_gradient"):
        tape = compile_for_lrp(model, composite).run(x, *states)[1]
        found = tape.relevance(seed, at=["x", "h0", "c0"][: len(leaves)])
        for leaf, ours, theirs in zip(leaves, found.values(), expected, strict=True):
            theirs = torch.zeros_like(leaf) if theirs is None else theirs
            close(ours, (theirs if composite == "gradient" else leaf * theirs).detach())
        assert gaps(tape.ledger(seed).rows) <= EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_agrees(kind: str) -> None:
    """Projection, given states and all outputs at once; zeros of a ReLU hand on nothing in relevance space."""
    projected = {"proj_size": 3} if kind == "lstm" else {}
    module = KINDS[kind](4, 5, 2, bidirectional=True, batch_first=True, **projected).double()
    x = torch.randn(3, 6, 4).double()
    states = start(module, x)
    model = Reads(module, (0, 1, 2) if kind == "lstm" else (0, 1))
    seed = torch.randn_like(model(x, *states))
    for composite in ("attnlrp", "input_x_gradient", "gradient"):
        ours = compile_for_lrp(model, composite).run(x, *states)[1].relevance(seed)
        theirs = compile_for_lrp(model, composite, reference=True).run(x, *states)[1].relevance(seed)
        assert ours.keys() == theirs.keys() and len(ours) == 1 + len(states)
        for name, expected in theirs.items():
            assert relative_error(ours[name], expected) <= FLOAT64


@pytest.mark.parametrize("composite", ["attnlrp", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_several_targets_share_one_pass(kind: str, composite: str) -> None:
    """Mapped seeds, some of whose edges are absent or shared, against one autograd call each."""
    module = KINDS[kind](3, 4, 2, bidirectional=True).double()
    model, x = Reads(module, (0, 1)), torch.randn(5, 2, 3).double()
    seeds = list(torch.randn(3, *model(x).shape).double())
    tape = compile_for_lrp(model, composite).run(x)[1]
    found = tape.relevance_of_each(seeds)
    leaf = x.clone().requires_grad_()
    results = frozen(kind, module, leaf, start(module, x, 0.0)) if composite == "attnlrp" else module(leaf)
    for seed, ours in zip(seeds, found, strict=True):
        (expected,) = torch.autograd.grad(laid_out(results, (0, 1)), leaf, seed, retain_graph=True)
        close(ours, (expected * x if composite == "attnlrp" else expected).detach())


def test_mapping_the_op_shares_what_is_not_mapped() -> None:
    """vmap over one coefficient along any dimension, the other the same for all."""
    module = nn.LSTM(3, 4).double()
    x = torch.randn(5, 2, 3).double().requires_grad_()
    states = start(module, x)
    again = frozen("lstm", module, x, states)
    params = [parameter.detach() for parameter in module.parameters()]
    many, shared = torch.randn(5, 3, 2, 4).double(), torch.randn(1, 2, 4).double()

    def pulled(c: Tensor) -> Tensor:
        values = (x.detach(), again[0].detach(), states, params)
        return recurrent_pullback("lstm", False, *values, c, shared, None, 1, False, False)[0]

    found = torch.vmap(pulled, in_dims=1)(many)
    for index, ours in enumerate(found):
        outputs, seeds = (again[0], again[1][0]), (many[:, index], shared)
        (expected,) = torch.autograd.grad(outputs, x, seeds, retain_graph=True)
        close(ours, expected)


class Classifier(nn.Module):
    """Tokens, embedding, a recurrent module, and a linear head on its last states."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 6)
        self.recurrent = KINDS[kind](6, 5, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        _, last = self.recurrent(self.embedding(ids))
        h = last[0] if isinstance(last, tuple) else last
        return self.head(torch.cat([h[-2], h[-1]], -1))


@pytest.mark.parametrize(
    ("composite", "kind"), covering(["auto", "cp_lrp", "epsilon_plus", "dynamiclrp", "relp"], list(KINDS))
)
def test_tokens_and_sinks_add_up_to_the_logit(kind: str, composite: str) -> None:
    model, ids = Classifier(kind).double(), torch.randint(0, 30, (4, 7))
    logits, tape = compile_for_lrp(model, composite).run(ids)
    tokens, sinks = tape.relevance(2), tape.sinks(2)
    assert tokens.shape == ids.shape
    accounted = tokens.sum() + sum(sink.sum() for kinds in sinks.values() for sink in kinds.values())
    torch.testing.assert_close(accounted, logits[:, 2].sum().detach(), rtol=EXACT, atol=0)
    assert sinks[next(name for name in sinks if name in KINDS)]["bias"].shape == (4, 4, 5)


def test_biases_and_constant_states_are_sinks_per_sample() -> None:
    """One step of one LSTM layer by hand: R_b = b c_p, R_h0 = h0 U^T c_p, R_c0 = f c0 c_c."""
    module = nn.LSTM(3, 4).double()
    x, h0, c0 = torch.randn(1, 2, 3).double(), torch.randn(1, 2, 4).double(), torch.randn(1, 2, 4).double()
    output, tape = compile_for_lrp(Reads(module)).run(x, h0, c0, wrt="x")
    seed = torch.randn_like(output)
    w, u, b_ih, b_hh = (part.detach() for part in cell(module, 0, 0)[:4] if part is not None)
    i, f, p, o = (x[0] @ w.T + b_ih + h0[0] @ u.T + b_hh).chunk(4, -1)
    state = f.sigmoid() * c0[0] + i.sigmoid() * p.tanh()
    c_state = seed.view(2, 4) * o.sigmoid() * state.tanh() / state
    c_p = c_state * i.sigmoid() * p.tanh() / p
    sinks = tape.sinks(seed)["lstm"]
    close(sinks["bias"], (c_p * (b_ih + b_hh)[8:12])[None])
    close(sinks["h0"], h0 * (c_p @ u[8:12]))
    close(sinks["c0"], c0 * c_state * f.sigmoid())


def test_relevance_of_states_alone_leaves_the_input_to_a_sink() -> None:
    module = nn.GRU(3, 4, 2).double()
    x = torch.randn(5, 2, 3).double()
    (h0,) = start(module, x)
    result, tape = compile_for_lrp(Reads(module)).run(x, h0, wrt="h0")
    seed = torch.randn_like(result)
    whole = compile_for_lrp(Reads(module)).run(x, h0)[1].relevance(seed)
    close(tape.relevance(seed), whole["h0"])
    close(tape.sinks(seed)["gru"]["input"], whole["x"])


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_a_pre_activation_of_zero_has_the_limit_one(kind: str) -> None:
    """With no input, no bias and no state every tanh(p) / p is 0 / 0; half gates let a known part through."""
    module = KINDS[kind](3, 4, bias=False).double()
    x = torch.zeros(1, 2, 3).double()
    found = compile_for_lrp(module).run(x)[1].coefficients(torch.ones(1, 2, 4).double(), at="input")
    rows = {"lstm": slice(8, 12), "gru": slice(8, 12), "rnn_tanh": slice(None)}[kind]
    share = {"lstm": 0.25, "gru": 0.5, "rnn_tanh": 1.0}[kind]
    close(found, (share * module.weight_ih_l0.detach()[rows].sum(0)).expand(1, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradient", [False, True])
def test_the_op_is_well_formed(kind: str, gradient: bool) -> None:
    """torch's own checks of a custom op: schema, and that fake results are like real ones."""
    module = KINDS[kind](3, 4, 2, bidirectional=True, batch_first=True)
    x = torch.randn(2, 5, 3)
    states = [state.float() for state in start(module, x)]
    output = module(x, tuple(states) if kind == "lstm" else states[0])[0].detach()
    params = [p.detach() for p in module.parameters()]
    for leading in ((), (3,)):
        cs = (torch.randn(*leading, *output.shape), None, torch.randn(*leading, *states[-1].shape))
        arguments = (kind, gradient, x, output, states, params, *(cs if kind == "lstm" else (*cs[:2], None)))
        torch.library.opcheck(
            recurrent_pullback, (*arguments, 2, True, True), test_utils=("test_schema", "test_faketensor")
        )


def test_the_graph_does_not_grow_with_time() -> None:
    """One relevance op a module, however long the sequence."""
    explained = compile_for_lrp(zoo.build("lstm").model)
    targets = []
    for time in (2, 50):
        graph = explained.stages(torch.randint(0, zoo.VOCABULARY, (2, time)))[-1].program.relevance_graph
        assert graph is not None
        targets.append([node.target for node in graph.nodes if node.op == "call_function"])
    assert targets[0] == targets[1]
    assert targets[0].count(torch.ops.lrp.recurrent_pullback.default) == 2


def test_dropout_between_layers_is_refused_in_training_only() -> None:
    case = zoo.build("lstm")
    explained = compile_for_lrp(case.model)
    assert torch.isfinite(explained.attribute(*case.args, case.target)).all()
    explained.train()
    explained(*case.args)
    with pytest.raises(errors.RecurrentError, match=r"dropout of 0\.2 between layers"):
        explained.attribute(*case.args, case.target)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_of_parameters_stay_bitwise(kind: str, training: bool) -> None:
    module = KINDS[kind](3, 4, 2, bidirectional=True, dropout=0.3).train(training)
    x = torch.randn(5, 2, 3)
    results = []
    for called in (module, compile_for_lrp(module)):
        torch.manual_seed(3)
        module.zero_grad()
        output, last = called(x)
        values = [output, *(last if isinstance(last, tuple) else (last,))]
        sum(value.square().sum() for value in values).backward()
        results.append([*(value.detach() for value in values), *(p.grad.clone() for p in module.parameters())])
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(eager, ours) for eager, ours in zip(*results, strict=True))
