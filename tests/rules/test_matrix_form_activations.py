"""Products, activations and gates against the uniform and the identity rule in relevance space.

The papers are named in matrix_form.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from functions import ACTIVATIONS, WITH_OFFSET, Op, gelu_new
from matrix_form import Case, Restatement, Tensors, check, decomposed, halved_matmul, halves, op, unchanged
from recognised import patterns_in
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp
from lrp_compiler.kernels.gates import GATES
from lrp_compiler.kernels.offset_gates import OFFSET_GATES

pytestmark = pytest.mark.usefixtures("float64")

STEP = 1e-8
"""Step of one-sided difference quotients at zero; truncation error and eps / STEP are both of this size."""


# --- products of live operands: the uniform rule ------------------------------------------------------------


def halved_broadcast_matmul(inputs: Tensors, relevance: Tensor) -> Tensors:
    """``halved_matmul`` of a batch with one matrix: the matrix collects from the whole batch."""
    a, b = inputs
    on_a, on_b = halved_matmul((a, b.expand(*a.shape[:-2], *b.shape[-2:])), relevance)
    return on_a, on_b.sum_to_size(b.shape)


PRODUCTS: dict[str, tuple[Case, Restatement]] = {
    "mul": (op(torch.mul, (2, 3), (2, 3)), halves),
    "mul_broadcast": (op(torch.mul, (2, 1, 3), (4, 1)), halves),
    "mul_by_itself": (op(lambda x: x * x, (2, 3)), unchanged),
    "mm": (op(torch.mm, (2, 3), (3, 4)), halved_matmul),
    "bmm": (op(torch.bmm, (2, 3, 4), (2, 4, 3)), halved_matmul),
    "matmul_four_dims": (op(torch.matmul, (2, 2, 3, 4), (2, 2, 4, 3)), halved_matmul),
    "matmul_broadcast": (op(torch.matmul, (2, 3, 4), (4, 3)), halved_broadcast_matmul),
    "einsum": (op(lambda a, b: torch.einsum("bij,bjk->bik", a, b), (2, 3, 4), (2, 4, 3)), halved_matmul),
    "addmm": (op(lambda a, b, c: torch.addmm(c, a, b), (2, 3), (3, 4), (2, 4)), halved_matmul),
    "baddbmm": (op(lambda a, b, c: torch.baddbmm(c, a, b), (2, 2, 3), (2, 3, 4), (2, 2, 4)), halved_matmul),
    "linear_with_made_weight": (
        op(lambda a, b: F.linear(a, b.mT), (2, 3), (3, 4)),
        halved_matmul,
    ),
}


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_share_evenly(name: str, reference: bool) -> None:
    case, restatement = PRODUCTS[name]
    check(case.make(), case.inputs(), restatement, "attnlrp", reference)


@pytest.mark.parametrize("reference", [False, True])
def test_division_gives_everything_to_the_numerator(reference: bool) -> None:
    """The LN-rule (CP-LRP, proposition on layer normalisation): the denominator is a constant."""

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        return relevance, torch.zeros_like(inputs[1])

    check(Op(torch.div), (torch.randn(2, 3), torch.rand(2, 3) + 1), restatement, "attnlrp", reference)


# --- activations: the identity rule -------------------------------------------------------------------------


def gelu_fast(x: Tensor) -> Tensor:
    """GELU as Hugging Face's FastGELUActivation spells it."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


SPELLINGS = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu_fast": gelu_fast}

PLACES = torch.tensor([-6.0, -2.5, -1.0, -0.3, -1e-10, 1e-10, 0.1, 0.7, 1.0, 2.5, 7.0], dtype=torch.float64)
"""Both sides of every kink, and next to zero."""


def test_every_gate_is_tested() -> None:
    assert ACTIVATIONS.keys() == GATES.keys() and WITH_OFFSET.keys() == OFFSET_GATES.keys()


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", [*ACTIVATIONS, *SPELLINGS])
def test_activations_pass_relevance_on(name: str, reference: bool) -> None:
    """AttnLRP eq. 9: R_x = R_y wherever x is not zero."""
    model = Op({**ACTIVATIONS, **SPELLINGS}[name])
    check(model, (PLACES.clone(),), unchanged, "attnlrp", reference)


@pytest.mark.parametrize("name", [*ACTIVATIONS, *SPELLINGS])
def test_coefficients_of_activations_at_zero(name: str) -> None:
    """At x = 0 the coefficient is f'(0), or lies between the slopes of the two sides where f has a kink."""
    fn = {**ACTIVATIONS, **SPELLINGS}[name]
    _, tape = compile_for_lrp(Op(fn), "attnlrp").run(torch.zeros(3))
    found = tape.coefficients(torch.ones(3))
    slopes = fn(torch.tensor([-STEP, STEP])) / torch.tensor([-STEP, STEP])
    assert (found >= slopes.min() - STEP).all()
    assert (found <= slopes.max() + STEP).all()
    assert (tape.relevance(torch.ones(3)) == 0).all()


@pytest.mark.parametrize("fn", [gelu_new, gelu_fast])
def test_spelled_gelu_is_recognised(fn: Callable[[Tensor], Tensor]) -> None:
    assert patterns_in(compile_for_lrp(Op(fn), "attnlrp"), torch.randn(4)) == {"gelu_tanh": 1}


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", WITH_OFFSET)
def test_functions_that_do_not_vanish_pass_relevance_on(name: str, reference: bool) -> None:
    """AttnLRP eq. 9 where f(0) != 0: R_x = R_y even at x = 0, where no coefficient exists."""
    x = torch.cat([torch.zeros(1), PLACES])
    check(Op(WITH_OFFSET[name]), (x,), unchanged, "attnlrp", reference)


# --- gates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("gate", [F.silu, F.gelu, torch.sigmoid])
def test_cp_lrp_stops_at_gates(gate: Callable[[Tensor], Tensor], reference: bool) -> None:
    """CP-LRP: in gate(g) * u the gate is a constant, everything goes to u."""

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        return torch.zeros_like(inputs[0]), relevance

    check(Op(lambda g, u: gate(g) * u), (torch.randn(2, 3), torch.randn(2, 3)), restatement, "cp_lrp", reference)


@pytest.mark.parametrize("reference", [False, True])
def test_attnlrp_shares_between_gate_and_signal(reference: bool) -> None:
    """AttnLRP: Prop. 3.2 at the product, eq. 9 at the SiLU."""
    model = Op(lambda g, u: F.silu(g) * u)
    check(model, (torch.randn(2, 3), torch.randn(2, 3)), halves, "attnlrp", reference)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.down = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(("composite", "to_gate"), [("attnlrp", 0.5), ("cp_lrp", 0.0)])
def test_gated_mlp_is_its_chain_of_rules(composite: str, to_gate: float, reference: bool) -> None:
    model = GatedMLP()

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        hidden = F.silu(model.gate(*inputs)) * model.up(*inputs)
        (on_hidden,) = decomposed(model.down, (hidden.detach(),), relevance)
        (on_gate,) = decomposed(model.gate, inputs, on_hidden * to_gate)
        (on_up,) = decomposed(model.up, inputs, on_hidden * (1 - to_gate))
        return (on_gate + on_up,)

    check(model, (torch.randn(2, 4),), restatement, composite, reference)
