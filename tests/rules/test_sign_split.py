"""Gamma, alpha-beta, z+, flat, w^2 and z-box against term-by-term restatements (RULES.md 1.1 and 3), in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401 (it registers the product by groups)
from accuracy import relative_error
from catalogue import agreement
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import Composite, compile_for_lrp, composites, errors
from lrp_compiler.rules import AlphaBeta, Flat, Gamma, Rule, WSquare, ZBox, ZPlus, on

EPSILON = 1e-6
FLOAT64 = 1e-9
"""u - |z0| cancels where an output has few terms of one sign; 1e-12 is what remains on these data."""

RULES: list[Rule] = [ZPlus(), AlphaBeta(), AlphaBeta(alpha=1.5, beta=0.5), Gamma(), Gamma(gamma=3.0)]
TERMINALS: list[Rule] = [Flat(), WSquare(), ZBox(low=-2.0, high=1.5)]


def sign(z: Tensor) -> Tensor:
    return torch.where(z >= 0, 1.0, -1.0).double()


def shares(rule: Rule, terms: Tensor, bias: Tensor, z: Tensor) -> Tensor:
    """The share of every term x_i w_ji (outputs, inputs) in output j's relevance, straight from the definitions."""
    positive, negative = terms.clamp(min=0), terms.clamp(max=0)
    if isinstance(rule, Gamma):
        favoured = torch.where((z > 0)[:, None], positive, negative)
        bias_favoured = torch.where(z > 0, bias.clamp(min=0), bias.clamp(max=0))
        weighted = terms + rule.gamma * favoured
        total = weighted.sum(1) + bias + rule.gamma * bias_favoured
        return torch.where((z != 0)[:, None], weighted / (total + EPSILON * sign(total))[:, None], 0)
    alpha, beta = (rule.alpha, rule.beta) if isinstance(rule, AlphaBeta) else (1.0, 0.0)
    up, down = positive.sum(1) + bias.clamp(min=0), negative.sum(1) + bias.clamp(max=0)
    raising = positive / (up + EPSILON * sign(up))[:, None]
    return alpha * raising - beta * negative / (down + EPSILON * sign(down))[:, None]


def terminal_shares(rule: Rule, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same for rules of a first layer."""
    if isinstance(rule, ZBox):
        terms = x * weight - rule.low * weight.clamp(min=0) - rule.high * weight.clamp(max=0)
        offset = torch.zeros_like(bias)
    elif isinstance(rule, Flat):
        terms, offset = torch.ones_like(weight), torch.zeros_like(bias)
    else:
        terms, offset = weight.square(), bias.square()
    total = terms.sum(1) + offset
    return terms / (total + EPSILON * sign(total))[:, None]


def everywhere(rule: Rule) -> Composite:
    return composites.attnlrp().override((on(composites.OpClass.LINEAR), rule))


def linear_case(positive: bool, batch: int, inputs: int, outputs: int) -> tuple[nn.Linear, Tensor, Tensor]:
    layer = nn.Linear(inputs, outputs).double()
    x = torch.randn(batch, inputs, dtype=torch.float64)
    return layer, x.abs() if positive else x, torch.randn(batch, outputs, dtype=torch.float64)


def restated(rule: Rule, layer: nn.Linear, x: Tensor, seed: Tensor) -> Tensor:
    """R_x, sample by sample, for the seed at the layer's output."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    rows = []
    for value, coefficient in zip(x, seed, strict=True):
        z = weight @ value + bias
        if isinstance(rule, (Flat, WSquare, ZBox)):
            part = terminal_shares(rule, value, weight, bias)
        else:
            part = shares(rule, value * weight, bias, z)
        rows.append((part * (z * coefficient)[:, None]).sum(0))
    return torch.stack(rows) if rows else torch.zeros_like(x)


class Rectified(nn.Module):
    """A ReLU in front, so that the compiler knows the layer's input is not negative."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(x))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("positive", [False, True], ids=["signed", "rectified"])
@pytest.mark.parametrize("rule", [*RULES, *TERMINALS], ids=str)
def test_linear_layers(rule: Rule, positive: bool, reference: bool) -> None:
    layer, x, seed = linear_case(positive, 3, 6, 5)
    model = Rectified(layer) if positive else layer
    explained = compile_for_lrp(model, everywhere(rule), reference=reference)
    site = "relu" if positive else "input"
    found = explained.run(x)[1].relevance(seed, at=site)
    expected = restated(rule, layer, x, seed)
    assert relative_error(found, expected) <= FLOAT64
    if not positive:
        agreement(explained, x, found, expected, "terms one by one")


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("rule", [*RULES, *TERMINALS], ids=str)
def test_convolutions_are_their_matrices(rule: Rule, reference: bool) -> None:
    """A strided, padded, dilated, grouped convolution with bias, its matrix taken from the jacobian."""
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2).double()
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    out = conv(x)
    seed = torch.randn_like(out)
    dense = nn.Linear(x[0].numel(), out[0].numel()).double()
    with torch.no_grad():
        jacobian = torch.autograd.functional.jacobian(lambda v: conv(v).flatten(), x[:1])
        dense.weight.copy_(jacobian.reshape(dense.weight.shape))
        dense.bias.copy_(conv(torch.zeros_like(x[:1])).flatten())
    explained = compile_for_lrp(conv, everywhere(rule), reference=reference)
    found = explained.attribute(x, seed)
    if isinstance(rule, Flat):
        # Flat counts the kernel's entries, also where the dense matrix of a sliding window is zero.
        ones = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False).double()
        nn.init.ones_(ones.weight)
        probe = torch.ones_like(x).requires_grad_()
        counts = ones(probe)
        (expected,) = torch.autograd.grad(counts, probe, out * seed / (counts.detach() + EPSILON))
    else:
        expected = restated(rule, dense, x.flatten(1), seed.flatten(1)).view_as(x)
    assert agreement(explained, x, found, expected, "terms one by one") <= FLOAT64


def test_outputs_without_terms_of_one_sign_are_no_blow_up() -> None:
    """With all terms positive, alpha-beta has no lowering part: float32 must not divide rounding by the stabiliser."""
    layer = nn.Linear(50, 4)
    with torch.no_grad():
        layer.weight.abs_()
        layer.bias.zero_()
    x, seed = torch.rand(2, 50), torch.rand(2, 4)
    for rule in (ZPlus(), AlphaBeta()):
        found = compile_for_lrp(layer, everywhere(rule)).attribute(x, seed)
        double = nn.Linear(50, 4).double()
        double.load_state_dict(layer.state_dict())
        assert relative_error(found.double(), restated(rule, double, x.double(), seed.double())) <= 1e-5


@given(
    batch=st.integers(0, 3),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 7),
    rule=st.sampled_from([*RULES, *TERMINALS]),
    positive=st.booleans(),
)
def test_linear_layers_of_any_size(batch: int, inputs: int, outputs: int, rule: Rule, positive: bool) -> None:
    layer, x, seed = linear_case(positive, batch, inputs, outputs)
    strided = x.repeat_interleave(2, 1)[:, ::2]
    found = compile_for_lrp(layer, everywhere(rule)).attribute(strided, seed)
    expected = restated(rule, layer, x, seed)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8 * (1 + expected.abs().sum().item()))


def test_parameters_out_of_range_are_refused() -> None:
    with pytest.raises(errors.RuleParameterError, match="alpha - beta must be 1"):
        AlphaBeta(alpha=2.0, beta=0.5)
    with pytest.raises(errors.RuleParameterError, match="at least 0"):
        Gamma(gamma=-1.0)


@pytest.mark.parametrize("epsilon", [0.3, 1e-6])
def test_epsilon_is_not_rounded_to_the_default_dtype(epsilon: float) -> None:
    """0.3 has another value in float32; a float64 model must not see it."""
    layer, x, seed = linear_case(False, 4, 6, 5)
    z = layer(x).detach()
    expected = x * ((z * seed / (z + epsilon * sign(z))) @ layer.weight.detach())
    assert relative_error(compile_for_lrp(layer, composites.epsilon(epsilon)).attribute(x, seed), expected) <= 1e-14


def test_leaky_slopes_are_not_rounded_to_the_default_dtype() -> None:
    x = torch.randn(20, dtype=torch.float64)
    found = compile_for_lrp(nn.LeakyReLU(0.3), "attnlrp").attribute(x, torch.ones_like(x))
    assert relative_error(found, F.leaky_relu(x, 0.3)) <= 1e-15


class ScaledAddmm(nn.Module):
    """beta b + alpha x W: the factors of addmm belong to the bias and to the product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight, beta=2.0, alpha=0.5)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_factors_of_addmm_count(rule: Rule) -> None:
    model, x, seed = ScaledAddmm().double(), torch.randn(3, 4).double(), torch.randn(3, 3).double()
    layer = nn.Linear(4, 3).double()
    with torch.no_grad():
        layer.weight.copy_(0.5 * model.weight.T)
        layer.bias.copy_(2.0 * model.bias)
    for reference in (False, True):
        explained = compile_for_lrp(model, everywhere(rule), reference=reference)
        assert relative_error(explained.attribute(x, seed), restated(rule, layer, x, seed)) <= FLOAT64


@pytest.mark.parametrize("name", ["attnlrp", "excitation_backprop", "dynamiclrp", "input_x_gradient"])
def test_the_ledger_of_a_scaled_addmm_closes(name: str) -> None:
    _, tape = compile_for_lrp(ScaledAddmm().double(), name).run(torch.randn(3, 4).double())
    tape.ledger(1).check()


def products(explained: Any, x: Tensor) -> int:
    """How many products of the layer's size the relevance pass makes, forward ones among them."""
    (stage,) = [stage for stage in explained.stages(x) if stage.name == "partition"]
    graph = stage.program.relevance_graph
    wanted = ("linear", "matmul", "mm", "addmm", "convolution", "conv2d", "convolution_backward")
    return sum(str(node.target).split(".")[1] in wanted for node in graph.nodes if node.op == "call_function")


@pytest.mark.parametrize(
    ("rule", "positive", "rectified", "count"),
    [
        (Gamma(), True, True, 2),
        (Gamma(), True, False, 3),
        (Gamma(), False, True, 3),
        (ZPlus(), True, False, 2),
        (ZPlus(), False, False, 3),
        (AlphaBeta(), True, False, 4),
        (AlphaBeta(), False, False, 3),
    ],
    ids=str,
)
def test_products_are_as_few_as_signs_allow(rule: Rule, positive: bool, rectified: bool, count: int) -> None:
    """Forward plus backward: 1 + 1 where x >= 0 (gamma: and a ReLU follows), 1 + 2 for any signs; right either way."""
    layer, x, seed = linear_case(positive, 4, 6, 5)
    model: nn.Module = nn.Sequential(Rectified(layer) if positive else layer, nn.ReLU() if rectified else nn.Identity())
    explained = compile_for_lrp(model, everywhere(rule))
    assert products(explained, x) == count
    found = explained.run(x)[1].relevance(seed, at="relu" if positive else "input")
    masked = seed * (layer(x) > 0) if rectified else seed
    assert relative_error(found, restated(rule, layer, x, masked)) <= FLOAT64
    explained.run(x)[1].ledger(seed).check()


def test_an_output_that_is_read_elsewhere_keeps_both_signs() -> None:
    """A skip around the ReLU brings relevance to negative outputs too."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(F.relu(x))
            return F.relu(z) + 0.5 * z

    model, x = Skip().double(), torch.randn(3, 6, dtype=torch.float64).abs()
    seed = torch.randn(3, 5, dtype=torch.float64)
    found = compile_for_lrp(model, everywhere(Gamma())).run(x)[1].relevance(seed, at="relu")
    both = seed * ((model.layer(x) > 0) + 0.5)
    assert relative_error(found, restated(Gamma(), model.layer, x, both)) <= FLOAT64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", [*RULES, *TERMINALS], ids=str)
def test_sixteen_bit_models_lose_no_more_than_rounding(rule: Rule, dtype: torch.dtype) -> None:
    """Raising parts a hundredth of the lowering ones: a stored z or u of 16 bits would leave nothing of them."""
    layer = nn.Linear(64, 8).to(dtype)
    with torch.no_grad():
        layer.weight[:, :56] = -layer.weight[:, :56].abs()
        layer.weight[:, 56:] = layer.weight[:, 56:].abs() / 8
    x, seed = torch.rand(4, 64).to(dtype), torch.randn(4, 8).to(dtype)
    found = compile_for_lrp(layer, everywhere(rule)).run(x)[1].relevance(seed)
    exact = restated(rule, layer.double(), x.double(), seed.double())
    assert found.dtype == dtype
    # The result, the output's relevance z c and the product of x and c are rounded once each.
    assert relative_error(found.double(), exact) <= 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rule", [*RULES, *TERMINALS], ids=str)
@pytest.mark.parametrize("op", ["mm", "matmul", "bmm", "addmm"])
def test_products_with_a_constant_are_linear_layers(op: str, rule: Rule) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 6, 5) if op == "bmm" else torch.randn(6, 5))
            self.bias = nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight) if op == "addmm" else getattr(torch, op)(x, self.weight)

    model = Product().double()
    x = torch.randn((2, 3, 6) if op == "bmm" else (3, 6), dtype=torch.float64)
    seed = torch.randn((2, 3, 5) if op == "bmm" else (3, 5), dtype=torch.float64)
    explained = compile_for_lrp(model, everywhere(rule))
    found = explained.run(x)[1].relevance(seed)
    layers = [nn.Linear(6, 5).double() for _ in range(2)]
    for number, layer in enumerate(layers):
        layer.weight.data = (model.weight[number] if op == "bmm" else model.weight).detach().T
        layer.bias.data = model.bias.detach() if op == "addmm" else torch.zeros(5, dtype=torch.float64)
    if op == "bmm":
        expected = torch.stack([restated(rule, layer, *pair) for layer, *pair in zip(layers, x, seed, strict=True)])
    else:
        expected = restated(rule, layers[0], x, seed)
    assert agreement(explained, x, found, expected, "terms one by one") <= FLOAT64


class ByGroups(nn.Module):
    """Rows times the matrix of their group; the second of three groups is empty."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, inputs, outputs))
        self.register_buffer("ends", torch.tensor([2, 2, 5], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16:
            return F.grouped_mm(x, self.weight, offs=self.ends)
        return torch.ops.transformers.grouped_mm_fallback(x, self.weight, self.ends)  # type: ignore[no-any-return]

    def restated(self, rule: Rule, x: Tensor, seed: Tensor) -> Tensor:
        """The relevance of ``x``, every group a layer of its own, in float64."""
        found = []
        for start, end, weight in ((0, 2, self.weight[0]), (2, 5, self.weight[2])):
            layer = nn.Linear(weight.shape[0], weight.shape[1]).double()
            layer.weight.data, layer.bias.data = weight.detach().double().T, torch.zeros_like(layer.bias)
            found.append(restated(rule, layer, x[start:end].double(), seed[start:end].double()))
        return torch.cat(found)


@pytest.mark.parametrize("rule", [*RULES, *TERMINALS], ids=str)
def test_products_by_groups_are_a_linear_layer_each(rule: Rule) -> None:
    model = ByGroups(6, 4).double()
    x, seed = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    explained = compile_for_lrp(model, everywhere(rule))
    output, tape = explained.run(x)
    assert torch.equal(output, model(x))
    assert agreement(explained, x, tape.relevance(seed), model.restated(rule, x, seed), "terms one by one") <= FLOAT64
    if rule in RULES:
        # The same terms, summed per weight: every group's matrices get what its rows get.
        per_weight = tape.parameters(seed)["weight"].sum((1, 2))
        rows = model.restated(rule, x, seed).sum(1)
        expected = torch.stack([rows[:2].sum(), torch.zeros((), dtype=torch.float64), rows[2:].sum()])
        assert relative_error(per_weight, expected) <= FLOAT64


def test_matrices_of_groups_get_what_their_rows_get() -> None:
    model = ByGroups(6, 4).double()
    x, seed = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    tape = compile_for_lrp(model, "epsilon").run(x)[1]
    expected = torch.zeros_like(model.weight)
    for start, end, group in ((0, 2, 0), (2, 5, 2)):
        expected[group] = model.weight[group].detach() * (x[start:end].T @ seed[start:end])
    torch.testing.assert_close(tape.parameters(seed)["weight"], expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", [ZPlus(), Gamma(), WSquare()], ids=str)
def test_products_by_groups_of_torch_itself_in_bfloat16(rule: Rule) -> None:
    """Products of values rounded to 8 bits: the result, the output's relevance and x c are rounded once each."""
    model = ByGroups(16, 8).bfloat16()
    x, seed = torch.randn(5, 16).bfloat16(), torch.randn(5, 8).bfloat16()
    output, tape = compile_for_lrp(model, everywhere(rule)).run(x)
    assert torch.equal(output, model(x))
    found = tape.relevance(seed)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.double(), model.restated(rule, x, seed)) <= 3 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("rule", [*RULES, *TERMINALS], ids=str)
def test_autocast_relevance_is_of_its_input(rule: Rule) -> None:
    """A float32 input of a layer that autocast runs in bfloat16 gets float32, right to bfloat16's rounding."""
    layer, x, seed = nn.Linear(6, 5), torch.rand(4, 6) + 0.5, torch.rand(4, 5)
    with torch.no_grad():
        layer.weight.abs_()
    with torch.autocast("cpu", torch.bfloat16):
        found = compile_for_lrp(layer, everywhere(rule)).run(x)[1].relevance(seed)
    exact = restated(rule, layer.double(), x.double(), seed.double())
    assert found.dtype == torch.float32
    assert relative_error(found.double(), exact) <= 4 * torch.finfo(torch.bfloat16).eps
