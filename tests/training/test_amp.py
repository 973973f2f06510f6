"""Under torch.autocast: eager's bits forward and backward, and relevance at the precision of eager's own gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from training import adam_steps, cleared, differing, gradients, identical, loss_of, tensors

from lrp_compiler import Token, compile_for_lrp

DTYPES = (torch.bfloat16, torch.float16)
NAMES = ["resnet", "vit", "bert", "bert_eager", "gpt2", "llama", "t5"]
CALLS = [
    # float16 takes the same casts as bfloat16.
    pytest.param(name, dtype, marks=() if dtype is torch.bfloat16 or name in ("resnet", "bert") else pytest.mark.slow)
    for name in NAMES
    for dtype in DTYPES
]


@pytest.mark.parametrize(("name", "dtype"), CALLS, ids=str)
def test_outputs_and_gradients_are_those_of_eager(name: str, dtype: torch.dtype) -> None:
    """Forward alone and recorded for relevance, whose pass may come before or after the gradients'."""
    case = zoo.build(name)
    explained = compile_for_lrp(case.model)
    outputs: list[Any] = []
    found = []
    for forward in (case.model, explained, explained.run):
        with torch.autocast("cpu", dtype):
            outputs.append(forward(*case.args, **case.kwargs))
        loss_of(outputs[-1][0] if forward == explained.run else outputs[-1]).backward()
        found.append(gradients(case.model))
        cleared(case.model)
    assert identical(outputs[0], outputs[1]) and identical(outputs[0], outputs[2][0])
    # Hugging Face makes other masks while it is traced than when it runs, and gradients of T5's bias pass through them.
    own = {key for key in found[0] if name == "t5" and key.startswith("decoder") and "relative" in key}
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items() if key not in own)
    assert all(torch.equal(value, found[2][key]) for key, value in found[1].items())
    for key in own:
        torch.testing.assert_close(found[1][key], found[0][key], rtol=0, atol=1e-2 * found[0][key].abs().max().item())


def embedded(model: nn.Module, case: zoo.Case) -> tuple[Any, Tensor]:
    """The output, and what the relevance of its input is relative to: the input itself, or the embeddings of tokens."""
    if case.args and case.args[0].is_floating_point():
        value = case.args[0].clone().requires_grad_()
        return model(value), value
    values: list[Tensor] = []
    table = model.get_input_embeddings()  # type: ignore[operator]
    handle = table.register_forward_hook(lambda module, args, output: values.append(output))
    output = model(*case.args, **case.kwargs)
    handle.remove()
    return output, values[0]


def input_x_gradient(case: zoo.Case, seed: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Eager's input times gradient of seed times output, per token or pixel."""
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        output, value = embedded(case.model, case)
    (gradient,) = torch.autograd.grad(tensors(output)[0], value, seed.to(tensors(output)[0].dtype))
    relevance = value.detach() * gradient
    return relevance if case.args and case.args[0].is_floating_point() else relevance.sum(-1)


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def one_hot(case: zoo.Case) -> Tensor:
    """The seed that the case's target stands for."""
    output = tensors(case())[0]
    target = case.target
    where = (target.position, target.index) if isinstance(target, Token) else (target,)
    seed = torch.zeros_like(output)
    seed[(torch.arange(len(output)), *where)] = 1
    return seed


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("resnet", torch.bfloat16),
        ("bert", torch.float16),
        *(pytest.param(name, torch.bfloat16, marks=pytest.mark.slow) for name in ("bert", "llama")),
    ],
    ids=str,
)
def test_relevance_loses_what_eager_input_x_gradient_loses(name: str, dtype: torch.dtype) -> None:
    """At most twice its error against float64, for that composite and for attnlrp, whose ledger closes all the same."""
    case, exact = zoo.build(name), zoo.build(name, double=True)
    seed = one_hot(exact)
    lost = error(input_x_gradient(case, seed, dtype), input_x_gradient(exact, seed, None))
    assert lost > 0
    for composite in ("input_x_gradient", "attnlrp"):
        _, tape = compile_for_lrp(exact.model, composite).run(*exact.args, **exact.kwargs)
        expected = tape.relevance(exact.target)
        if composite == "input_x_gradient":
            torch.testing.assert_close(expected, input_x_gradient(exact, seed, None))
        explained = compile_for_lrp(case.model, composite)
        with torch.autocast("cpu", dtype):
            _, tape = explained.run(*case.args, **case.kwargs)
        found = tape.relevance(case.target)
        assert found.dtype == torch.float32 and error(found, expected) <= 2 * lost
    tape.ledger(case.target).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_relevance_is_asked_for_changes_nothing(dtype: torch.dtype) -> None:
    """Under autocast or outside, before or after; the run alone decides the precision."""
    case = zoo.build("bert")
    explained = compile_for_lrp(case.model)
    with torch.autocast("cpu", dtype):
        _, tape = explained.run(*case.args)
        inside = tape.relevance(1), tape.relevance(1, at="bert.encoder.layer.0"), tape.seeded_output(1)
    outside = tape.relevance(1), tape.relevance(1, at="bert.encoder.layer.0"), tape.seeded_output(1)
    assert identical(inside, outside)
    _, plain = explained.run(*case.args)
    expected = plain.relevance(1)
    with torch.autocast("cpu", dtype):
        assert torch.equal(plain.relevance(1), expected)
    assert not torch.equal(inside[0], expected)


def test_what_a_call_compiles_to_depends_on_autocast_where_it_is_on() -> None:
    case = zoo.build("resnet")
    explained = compile_for_lrp(case.model)
    plain = explained(*case.args)
    with torch.autocast("cpu", torch.float16, enabled=False):
        assert identical(explained(*case.args), plain)
    assert len(explained.compilations) == 1
    for dtype in DTYPES:
        with torch.autocast("cpu", dtype):
            assert explained(*case.args).dtype == dtype
            assert explained.attribute(case.args[0], 2).dtype == torch.float32
    assert len(explained.compilations) == 3
    assert identical(explained(*case.args), plain)


class Regions(nn.Module):
    """Layers inside and outside of autocast regions of the model's own, which ``casts`` turns off."""

    def __init__(self, casts: bool = True) -> None:
        super().__init__()
        self.casts = casts
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        wide = self.first.weight.dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=self.casts):
            x = F.gelu(self.first(x))
            with torch.autocast("cpu", enabled=False):
                x = self.second(x.to(wide)).softmax(-1)
            x = x @ self.second.weight
        return self.third(x.to(wide))


@pytest.mark.parametrize("ambient", [None, *DTYPES], ids=str)
def test_regions_of_the_model_keep_their_precision(ambient: torch.dtype | None) -> None:
    model, x = Regions(), torch.randn(4, 6)
    explained = compile_for_lrp(model, "epsilon")
    outputs, found = [], []
    for forward in (model, explained):
        with torch.autocast("cpu", ambient or torch.bfloat16, enabled=ambient is not None):
            outputs.append(forward(x))
        loss_of(outputs[-1]).backward()
        found.append(gradients(model))
        cleared(model)
    assert identical(*outputs) and identical(*found)
    exact = Regions(casts=False)
    exact.load_state_dict(model.state_dict())
    expected = compile_for_lrp(exact.double(), "epsilon").attribute(x.double(), 2)
    with torch.autocast("cpu", ambient or torch.bfloat16, enabled=ambient is not None):
        relevance = explained.attribute(x, 2)
    assert relevance.dtype == torch.float32
    assert error(relevance, expected) <= 4 * torch.finfo(torch.bfloat16).eps


class Opened(nn.Module):
    """Composite ops that torch casts inside of."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.table = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum("bti,io->bto", x, self.mix).softmax(-1)
        return torch.einsum("bto,ko->bkt", mixed.to(self.table.dtype), self.table)[..., -1]


def test_ops_that_cast_inside_are_opened() -> None:
    model, x = Opened(), torch.randn(2, 3, 6)
    explained = compile_for_lrp(model)
    with torch.autocast("cpu"):
        assert identical(explained(x), model(x))
        found = explained.attribute(x, 1)
    exact = compile_for_lrp(copy.deepcopy(model).double()).attribute(x.double(), 1)
    assert error(found, exact) <= 4 * torch.finfo(torch.bfloat16).eps


class Shared(nn.Module):
    """A weight used twice, and an input that two layers cast."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight) * self.layer(x)


@pytest.mark.parametrize("keeps", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("kind", ["constant", "leaf", "computed"])
def test_gradients_add_up_where_autocast_keeps_casts(kind: str, keeps: bool) -> None:
    """In the lower precision for leaves with its cache of casts, else in float32; eager's bits tell the two apart."""
    model, x = Shared(), torch.randn(5, 6, requires_grad=kind != "constant")
    explained = compile_for_lrp(model)
    found = []
    for forward in (model, explained):
        with torch.autocast("cpu", cache_enabled=keeps):
            output = forward(x * 1 if kind == "computed" else x)
        loss_of(output).backward()
        found.append([gradients(model), None if x.grad is None else x.grad.clone()])
        cleared(model)
        x.grad = None
    assert identical(*found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["resnet", "bert", "llama"])
def test_adam_under_autocast_leaves_the_state_eager_leaves(name: str, dtype: torch.dtype) -> None:
    """With relevance of every step read in between."""
    states = []
    for ours in (False, True):
        case = zoo.build(name)
        case.model.train()
        explained = compile_for_lrp(case.model)

        def forward(case: zoo.Case = case, ours: bool = ours, explained: Any = explained) -> Any:
            if not ours:
                return case()
            output, tape = explained.run(*case.args, **case.kwargs)
            tape.relevance(case.target)
            return output

        states.append(adam_steps(case.model, forward, autocast=dtype))
    assert not differing(*states)


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(6):
        yield torch.randn(3, 3, 12, 12, generator=generator)


def test_scaled_and_accumulated_gradients_leave_the_state_eager_leaves() -> None:
    """GradScaler over two micro-batches a step, one step skipped for an overflow, relevance read before backward."""
    states = []
    for ours in (False, True):
        model = zoo.build("resnet").model.train()
        explained = compile_for_lrp(model)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
        scales = []
        for number, x in enumerate(batches()):
            with torch.autocast("cpu", torch.float16):
                output, tape = explained.run(x) if ours else (model(x), None)
                loss = output.float().logsumexp(1).mean() / 2 * (torch.inf if number == 2 else 1)
            if tape is not None:
                tape.relevance(2)
            scaler.scale(loss).backward()
            if number % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scales.append(scaler.get_scale())
        assert scales[1] < scales[0]
        states.append({"model": model.state_dict(), "adam": optimizer.state_dict(), "scales": scales})
    assert not differing(*states)
