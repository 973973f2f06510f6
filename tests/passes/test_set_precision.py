"""Relevance in another dtype than the model's: outputs keep every bit, errors stay those of the dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import compile_for_lrp
from lrp_compiler.passes.optable import schema_name
from lrp_compiler.passes.program import Program, facts, value_of

CASES = ("resnet", "vit", "bert", "gpt2", "llama", "t5", "lstm")
COMPOSITES = ("attnlrp", "epsilon_plus", "input_x_gradient")
ALLOWED = 2e-2
"""Relative error of relevance in bfloat16, of which every step may lose 0.2 to 0.4 %."""


def relevances(module: Any, case: zoo.Case) -> Tensor:
    """The relevance of all inputs, flattened into one tensor."""
    found = module.run(*case.args, **case.kwargs)[1].relevance(case.target)
    return torch.cat([one.flatten() for one in (found.values() if isinstance(found, dict) else [found])])


def error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def relevance_ops(module: Any, *args: Any) -> Program:
    """The program of a call, partitioned."""
    program: Program = module.stages(*args)[-1].program
    return program


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5))


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_loses_no_more_than_a_few_roundings(name: str, composite: str) -> None:
    case, shared = zoo.shared(name)
    exact, exact_shared = zoo.shared(name, double=True)
    expected = relevances(compile_for_lrp(exact_shared, composite), exact)
    narrow = compile_for_lrp(shared, composite, relevance_dtype=torch.bfloat16)
    found = relevances(narrow, case)
    assert found.dtype == torch.float32
    assert 1e-5 < error(found, expected) <= ALLOWED


def test_outputs_keep_every_bit() -> None:
    case, shared = zoo.shared("gpt2")
    expected = case().logits
    output, _ = compile_for_lrp(shared, "attnlrp", relevance_dtype=torch.bfloat16).run(*case.args, **case.kwargs)
    assert torch.equal(output.logits, expected)


def test_products_run_in_bfloat16_and_what_is_read_off_does_not() -> None:
    module = compile_for_lrp(mlp(), "input_x_gradient", relevance_dtype=torch.bfloat16)
    x = torch.randn(3, 33)
    graph = relevance_ops(module, x).relevance_graph
    assert graph is not None
    found = {}
    for node in graph.nodes:
        if node.op == "call_function":
            found.setdefault(schema_name(node.target), set()).add(value_of(node).dtype)
    assert found["aten::matmul"] == {torch.bfloat16}
    result = next(iter(reversed(graph.nodes))).args[0][0]
    assert value_of(result).dtype == torch.float32


def test_it_is_what_bfloat16_products_give() -> None:
    """Input times gradient of an MLP, written out with torch's own products in bfloat16."""
    model, x = mlp(), torch.randn(3, 33)
    found = compile_for_lrp(model, "input_x_gradient", relevance_dtype=torch.bfloat16).attribute(x, 2)
    first, second, third = (model[place].weight.detach().bfloat16() for place in (0, 2, 4))
    hidden = model[:2](x)
    c = F.one_hot(torch.full((3,), 2), 5).bfloat16() @ third
    c = (c * (model[2:4](hidden) > 0)) @ second
    c = (c * (hidden > 0)) @ first
    assert torch.equal(found, c.float() * x)


def test_high_computes_in_float32_on_the_values_of_a_bfloat16_model() -> None:
    model, x = mlp().bfloat16(), torch.randn(3, 33).bfloat16()
    found = compile_for_lrp(model, "input_x_gradient", relevance_dtype="high").attribute(x, 2)
    assert found.dtype == torch.float32
    hidden = model[:2](x)
    weights = [model[place].weight.detach().double() for place in (0, 2, 4)]
    c = (weights[2][2] * (model[2:4](hidden) > 0)) @ weights[1]
    c = (c * (hidden > 0)) @ weights[0]
    assert error(found, c * x.double()) < 1e-6
    assert error(compile_for_lrp(model, "input_x_gradient").attribute(x, 2), c * x.double()) > 1e-4


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama"])
def test_high_is_float64_but_for_float32_rounding(name: str) -> None:
    """On the same values of a bfloat16 model, where that model's own relevance loses a thousand times more."""
    case = zoo.build(name)
    case.model.bfloat16()
    case.args = tuple(_cast(value, torch.bfloat16) for value in case.args)
    case.kwargs = {key: _cast(value, torch.bfloat16) for key, value in case.kwargs.items()}
    own = compile_for_lrp(case.model, "attnlrp")
    high, exact = (compile_for_lrp(own, "attnlrp", relevance_dtype=given) for given in ("high", torch.float64))
    expected = relevances(exact, case)
    assert error(relevances(high, case), expected) < 1e-5
    assert error(relevances(own, case), expected) > 1e-3


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def test_the_models_own_dtype_changes_nothing() -> None:
    model, x = mlp(), torch.randn(3, 33)
    plain = compile_for_lrp(model, "attnlrp")
    for given in (torch.float32, "high"):
        same = compile_for_lrp(model, "attnlrp", relevance_dtype=given)
        assert torch.equal(same.attribute(x, 1), plain.attribute(x, 1))
        assert same.stages(x)[-1].text() == plain.stages(x)[-1].text()


class Mixed(nn.Module):
    """Ops that have no narrow form here: complex numbers, scattered sums and cumulative ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.first(x))
        mixed = torch.fft.irfft(spectrum * torch.exp(-torch.arange(5.0)), n=8) + x.cumsum(-1)
        scattered = torch.zeros_like(mixed).index_add(1, torch.tensor([0, 1, 1, 2, 3, 3, 3, 7]), mixed)
        return self.last(scattered)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float64])
def test_ops_without_a_form_in_the_dtype_run_in_the_models(given: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(4, 8)
    expected = compile_for_lrp(model, "gradient").attribute(x, 1)
    found = compile_for_lrp(model, "gradient", relevance_dtype=given).attribute(x, 1)
    assert error(found, expected) <= (ALLOWED if given is torch.bfloat16 else 1e-6)
    assert found.dtype == (torch.float32 if given is torch.bfloat16 else torch.float64)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return torch.cond(hidden.sum() > 0, lambda h: self.left(h) * 2, lambda h: self.right(h).tanh(), (hidden,))


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float64])
def test_inside_branches_relevance_has_the_models_dtype(given: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Branching(), torch.randn(4, 8)
    expected = compile_for_lrp(model, "epsilon").attribute(x, 1)
    found = compile_for_lrp(model, "epsilon", relevance_dtype=given).attribute(x, 1)
    assert 0 < error(found, expected) <= ALLOWED


def test_every_way_to_ask() -> None:
    """Several targets at once, sinks, masks, inner sites, the ledger, derivatives: as in float32, but for rounding."""
    model, x = mlp(), torch.randn(3, 33)
    _, narrow = compile_for_lrp(model, "epsilon", relevance_dtype=torch.bfloat16).run(x)
    _, plain = compile_for_lrp(model, "epsilon").run(x)
    for tape in (narrow, plain):
        tape.ledger(1).check()
    assert error(narrow.relevance_of_each([0, 1, 4]), plain.relevance_of_each([0, 1, 4])) <= ALLOWED
    assert error(narrow.relevance(1, at="2"), plain.relevance(1, at="2")) <= ALLOWED
    mask = {"1": torch.arange(64) % 2}
    assert error(narrow.relevance(1, through=mask), plain.relevance(1, through=mask)) <= ALLOWED
    for op, sinks in plain.sinks(1).items():
        for kind, value in sinks.items():
            assert error(narrow.sinks(1)[op][kind], value) <= ALLOWED
    gradients = []
    for tape in (narrow, plain):
        relevance = tape.relevance(1, create_graph=True)
        gradients.append(torch.autograd.grad(relevance.square().sum(), model[2].weight)[0])
    assert error(*gradients) <= 2 * ALLOWED


def test_verified_relevance_is_judged_by_its_dtype() -> None:
    model, x = mlp(), torch.randn(3, 33)
    verified = compile_for_lrp(model, "epsilon", relevance_dtype=torch.bfloat16, verify="ledger")
    assert verified.attribute(x, 1).shape == x.shape


def test_sizes_stay_open() -> None:
    case, shared = zoo.shared("gpt2")
    narrow = compile_for_lrp(shared, "attnlrp", relevance_dtype=torch.bfloat16)
    for tokens in (5, 6, 8, 11):
        ids = zoo.ids(tokens=tokens)
        expected = compile_for_lrp(shared, "attnlrp").run(input_ids=ids)[1].relevance(case.target)
        found = narrow.run(input_ids=ids)[1].relevance(case.target)
        assert error(found, expected) <= ALLOWED


def test_differences_from_a_reference_are_taken_before_rounding() -> None:
    model, x = mlp(), torch.randn(3, 33)
    # Two inputs that bfloat16 can hardly tell apart.
    baseline = x + 1e-3 * torch.randn(3, 33)
    found, expected = (
        compile_for_lrp(model, "deep_lift", relevance_dtype=given).attribute(x, 1, baselines=baseline)
        for given in (torch.bfloat16, None)
    )
    assert error(found, expected) <= ALLOWED


def test_what_is_kept_for_relevance_takes_half_the_memory() -> None:
    case, shared = zoo.shared("bert")
    left = [
        compile_for_lrp(shared, "attnlrp", relevance_dtype=given).report(*case.args, **case.kwargs).memory.left
        for given in (torch.bfloat16, None)
    ]
    assert left[0] < 0.7 * left[1]


def test_attention_on_cpu_widens_what_is_stored_narrow() -> None:
    """Its fused backward is slower in bfloat16 than in float32; the buffers it reads stay half as large."""
    case, shared = zoo.shared("vit")
    module = compile_for_lrp(shared, "attnlrp", relevance_dtype=torch.bfloat16)
    program = module.stages(*case.args, **case.kwargs)[-1].program
    assert program.relevance_graph is not None
    calls = [node for node in program.relevance_graph.nodes if node.op == "call_function"]
    fused = [node for node in calls if "flash_attention" in str(node.target)]
    assert fused
    for node in fused:
        read = [value_of(operand) for operand in node.all_input_nodes]
        assert {value.dtype for value in read} == {torch.float32}
        edge_and_operands = node.all_input_nodes[:5]
        assert {value_of(_narrow(operand)).dtype for operand in edge_and_operands} == {torch.bfloat16}


def _narrow(node: Any) -> Any:
    """What a value was before it was shown otherwise and widened."""
    while value_of(node).dtype == torch.float32 and node.op == "call_function":
        node = node.all_input_nodes[0]
    return node


def test_a_transposed_weight_is_cast_once() -> None:
    """Two ops that show the same parameter read one cast of it."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear((x @ self.weight).relu(), self.weight)

    program = relevance_ops(compile_for_lrp(Tied(), "gradient", relevance_dtype=torch.bfloat16), torch.randn(2, 6))
    assert [cast.of for cast in program.casts] == ["p_weight"]
    assert program.relevance_graph is not None
    casts = [node for node in program.relevance_graph.nodes if schema_name(node.target) == "aten::_to_copy"]
    assert all(facts(node).origin != "p_weight" for node in casts)
