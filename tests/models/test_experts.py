"""Mixtures of experts: every implementation is traced, and relevance is that of the routing written out."""

from __future__ import annotations

import pytest
import torch
import transformers
from gallery import precision
from state_space import half, silu
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from lrp_compiler import compile_for_lrp

FLOAT64 = 1e-12


class Mixture(nn.Module):
    """A block of gated experts as Hugging Face has it, each token sent to ``chosen`` of five."""

    def __init__(self, implementation: str, chosen: int = 2) -> None:
        super().__init__()
        config = transformers.MixtralConfig(
            hidden_size=16, intermediate_size=24, num_local_experts=5, num_experts_per_tok=chosen
        )
        config._experts_implementation = implementation
        self.block = MixtralSparseMoeBlock(config)
        for parameter in self.block.parameters():
            nn.init.normal_(parameter, 0, 0.4)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.block(x)
        return mixed


def restated(block: MixtralSparseMoeBlock, x: Tensor) -> Tensor:
    """Token by token, expert by expert: gates constant, products shared evenly, the sum of weights constant."""
    rows = []
    for token in x.flatten(0, 1):
        probabilities = (block.gate.weight @ token).softmax(-1)
        weights, chosen = probabilities.topk(block.gate.top_k)
        weights = weights / weights.sum().detach()
        mixed = torch.zeros_like(token)
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
            mixed = mixed + half(block.experts.down_proj[expert] @ half(silu(gate), up), weight)
        rows.append(mixed)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_relevance_is_that_of_the_routing_written_out(implementation: str) -> None:
    torch.manual_seed(0)
    model = Mixture(implementation).double()
    x, seed = (torch.randn(2, 3, 16, dtype=torch.float64) for _ in range(2))
    with precision(True):
        output, tape = compile_for_lrp(model, "attnlrp").run(x)
    leaf = x.clone().requires_grad_()
    expected = restated(model.block, leaf)
    (coefficient,) = torch.autograd.grad(expected, leaf, seed)
    torch.testing.assert_close(output.detach(), expected.detach(), rtol=FLOAT64, atol=FLOAT64)
    torch.testing.assert_close(tape.relevance(seed), x * coefficient, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_what_can_be_traced_keeps_its_bits(implementation: str) -> None:
    torch.manual_seed(0)
    model = Mixture(implementation, chosen=3)
    x = torch.randn(4, 20, 16)
    assert torch.equal(compile_for_lrp(model)(x), model(x))


def test_a_loop_over_experts_is_traced_as_products_by_groups_and_left_as_it_was() -> None:
    """The loop multiplies by other kernels and adds in the order of the experts, so it is equal to rounding."""
    torch.manual_seed(0)
    model = Mixture("eager", chosen=3)
    x = torch.randn(4, 20, 16)
    torch.testing.assert_close(compile_for_lrp(model)(x), model(x), rtol=1e-5, atol=1e-5)
    assert model.block.experts.config._experts_implementation == "eager"


def test_training_reaches_the_experts() -> None:
    torch.manual_seed(0)
    model = Mixture("grouped_mm")
    x = torch.randn(2, 7, 16)
    gradients = []
    for call in (model, compile_for_lrp(model)):
        model.zero_grad()
        call(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)


def test_many_targets_at_once() -> None:
    torch.manual_seed(0)
    model = Mixture("grouped_mm").double()
    x = torch.randn(1, 3, 16, dtype=torch.float64)
    tape = compile_for_lrp(model, "attnlrp").run(x)[1]
    together = tape.relevance_of_each([(1, 4), (2, 9)])
    for row, target in zip(together, [(1, 4), (2, 9)], strict=True):
        torch.testing.assert_close(row, tape.relevance(target), rtol=FLOAT64, atol=FLOAT64)
