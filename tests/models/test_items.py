"""Numbers that ``.item()`` takes out of tensors: constants to relevance, whatever python makes of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp, errors

CONSERVING = 1e-10
Uses = dict[str, tuple[Callable[[Tensor], float | int], Callable[[Tensor, float | int], Tensor]]]

USES: Uses = {
    "factor": (lambda x: x.abs().max().item(), lambda x, s: x * s),
    "divisor": (lambda x: x.norm().item(), lambda x, s: x / s),
    "addend": (lambda x: x.max().item(), lambda x, s: x + s),
    "minuend": (lambda x: x.max().item(), lambda x, s: s - x),
    "bound": (lambda x: x.mean().item(), lambda x, s: x.clamp(max=s)),
    "fill": (lambda x: x.max().item(), lambda x, s: x * torch.full_like(x, s)),
    "masked": (lambda x: x.max().item(), lambda x, s: x.masked_fill(x < 0, s)),
    "chosen": (lambda x: x.min().item(), lambda x, s: torch.where(x > 0, x, s)),
    "arithmetic": (lambda x: x.max().item() * 2 + 1, lambda x, s: x * s),
    "root": (lambda x: torch.sym_sqrt(x.square().sum().item()), lambda x, s: x * s),
    "whole": (lambda x: x.argmax().item() + 2, lambda x, s: x * s + s * 2.5),
    "listed": (lambda x: x[0].tolist()[1], lambda x, s: x * s),
    "slope": (lambda x: x.abs().min().item(), nn.functional.leaky_relu),
    "exponent": (lambda x: x.abs().max().item(), lambda x, s: (x.abs() + 1) ** s),
    "in_place": (lambda x: x.max().item(), lambda x, s: (x * 1).mul_(s).relu_()),
    "branch": (lambda x: x.sum().item(), lambda x, s: torch.cond(s > 0, lambda v: v * v.max().item(), torch.sin, (x,))),
}


class Scaled(nn.Module):
    """A number comes from the input, unless ``known`` gives it."""

    def __init__(self, use: str, known: float | int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.known = nn.Linear(4, 5), nn.Linear(5, 3), known
        self.number, self.apply_number = USES[use]

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(self.apply_number(h, self.number(h) if self.known is None else self.known))


def inputs() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 4).double()


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon_plus", "dynamiclrp"])
@pytest.mark.parametrize("use", USES)
def test_an_item_is_a_number(use: str, composite: str) -> None:
    model, x = Scaled(use).double(), inputs()
    with torch.no_grad():
        number = USES[use][0](model.first(x))
        explained = compile_for_lrp(model, composite)
        out, tape = explained.run(x)
        plain = compile_for_lrp(Scaled(use, number).double(), composite).run(x)[1]
        assert torch.equal(out, model(x))
        torch.testing.assert_close(tape.relevance(1), plain.relevance(1), rtol=1e-12, atol=1e-14)
        together = tape.relevance_of_each([0, 1])
        ledger = tape.ledger(1)
    torch.testing.assert_close(together[1], plain.relevance(1), rtol=1e-12, atol=1e-14)
    ledger.check(CONSERVING)
    assert ledger.gap == pytest.approx(0, abs=CONSERVING * ledger.rows[0].magnitude)


def test_one_capture_serves_every_number() -> None:
    model = Scaled("factor").double()
    explained = compile_for_lrp(model, "attnlrp")
    for factor in (1.0, -3.0):
        x = inputs() * factor
        number = USES["factor"][0](model.first(x))
        found = explained.run(x)[1].relevance(0)
        torch.testing.assert_close(found, compile_for_lrp(Scaled("factor", number).double()).run(x)[1].relevance(0))
    assert explained.compiler.captures.kept == 1


def test_a_product_with_a_negative_item_may_be_negative() -> None:
    class Rectified(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x).relu() * x.min().item())

    program = compile_for_lrp(Rectified("factor").double(), "attnlrp").stages(inputs())[-1].program
    signs = {node.name: node.meta["lrp"].non_negative for node in program.graph.nodes if node.op == "call_function"}
    assert signs["relu"] and not signs["mul"]


@pytest.mark.parametrize("use", ["factor", "divisor", "addend", "fill"])
def test_differences_do_not_take_items_for_constants(use: str) -> None:
    explained = compile_for_lrp(Scaled(use).double(), "deep_lift")
    if use == "fill":
        # The filled tensor differs between the two runs as any other constant does.
        explained.run(inputs())[1].ledger(0).check(CONSERVING)
        return
    with pytest.raises(errors.UncoveredOpsError, match="no exact rule for differences"):
        explained.run(inputs())


def test_items_are_constants_in_training() -> None:
    model, x = Scaled("divisor").double(), inputs()
    grads = []
    for run in (compile_for_lrp(model), model):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(grads[0]) == 4
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
