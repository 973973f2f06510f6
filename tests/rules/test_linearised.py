"""The linear interpreter: W(x) x + r = y, rows by VJP, columns by JVP, r from the biases; and the gates it needs."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from accuracy import relative_error
from catalogue import agreement
from functions import WITH_OFFSET
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import compile_for_lrp, composites, errors
from lrp_compiler.kernels.offset_gates import OFFSET_GATES

FLOAT64 = 1e-10


@pytest.mark.parametrize("name", OFFSET_GATES)
def test_gates_with_offset_are_their_functions(name: str) -> None:
    """f(0) + x g(x) = f(x) far from zero; near it g meets the quotient in float64 from float32's result."""
    gate, at_zero = OFFSET_GATES[name]
    assert at_zero() == pytest.approx(WITH_OFFSET[name](torch.zeros((), dtype=torch.float64)).item(), rel=1e-15)
    x = torch.cat([torch.linspace(-30, 30, 241), torch.tensor([1e-4, -1e-4, 0.0])]).double()
    torch.testing.assert_close(at_zero() + x * gate(x), WITH_OFFSET[name](x), rtol=1e-13, atol=1e-14)
    small = torch.logspace(-6, -1, 51)
    # Eager's quotient (f(x) - f(0)) / x loses eps f(0) / x of it; the gate loses a few eps.
    exact = gate(small.double())
    torch.testing.assert_close(gate(small).double(), exact, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


class Frozen(nn.Module):
    """Convolution, batch norm, GELU, max-pool, sigmoid and softplus, all of which LinearScope freezes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.dense, self.out = nn.Linear(36, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.max_pool2d(F.gelu(self.norm(self.conv(x))), 2)
        return self.out(F.softplus(torch.sigmoid(self.dense(hidden.flatten(1))))) + math.pi


def frozen() -> tuple[nn.Module, Tensor]:
    model, x = Frozen().double(), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    model(2 * x + 1)
    return model.eval(), x


def test_rows_and_offset_make_the_output() -> None:
    """y_k = W_k . x + r_k with r from the sinks of a pass per output: biases, f(0) and constants, nothing else."""
    model, x = frozen()
    with torch.no_grad():
        y, tape = compile_for_lrp(model, "linear_interpreter").run(x)
    linear = tape.linearised()
    for k in range(3):
        (row,) = linear.row(k).values()
        assert torch.equal(row, tape.relevance(k))
        sinks = [value for found in tape.sinks(k).values() for value in found.values()]
        offset = sum((sink.sum() for sink in sinks), torch.zeros(()))
        assert float((row * x).sum() + offset) == pytest.approx(float(y[:, k].sum()), rel=FLOAT64)
        assert float(offset) == pytest.approx(float(linear.offset[:, k].sum()), rel=FLOAT64)


def test_columns_transpose_rows() -> None:
    model, x = frozen()
    _, tape = compile_for_lrp(model, "linear_interpreter").run(x)
    linear = tape.linearised()
    rows = torch.stack([next(iter(linear.row(k).values())) for k in range(3)], 1)
    impulse = torch.zeros_like(x)
    impulse[:, 1, 3, 4] = 1
    assert relative_error(linear.apply({"x": impulse}), rows[:, :, 1, 3, 4]) <= FLOAT64
    direction = torch.randn_like(x)
    assert relative_error(linear.apply({"x": direction}), torch.einsum("nkchw,nchw->nk", rows, direction)) <= FLOAT64


def test_the_frozen_network_run_forward() -> None:
    """Pushing another image through gates, indices and statistics kept from the first gives W v + r."""
    model, x = frozen()
    assert isinstance(model, Frozen)
    v = torch.randn_like(x)
    mean, var = model.norm.running_mean, model.norm.running_var
    assert mean is not None and var is not None

    def norm(h: Tensor) -> Tensor:
        shaped = [t.view(1, -1, 1, 1) for t in (mean, var, model.norm.weight, model.norm.bias)]
        return (h - shaped[0]) / (shaped[1] + model.norm.eps).sqrt() * shaped[2] + shaped[3]

    z = norm(model.conv(x))
    cdf = (1 + torch.erf(z / math.sqrt(2))) / 2
    pooled, indices = F.max_pool2d(z * cdf, 2, return_indices=True)
    pushed = (norm(model.conv(v)) * cdf).flatten(2).gather(2, indices.flatten(2)).view_as(pooled)
    p, q = model.dense(pooled.flatten(1)), model.dense(pushed.flatten(1))
    s, t = torch.sigmoid(p), 0.5 + q * (torch.sigmoid(p) - 0.5) / p
    u = math.log(2) + t * (F.softplus(s) - math.log(2)) / s
    expected = (model.out(u) + math.pi).detach()
    explained = compile_for_lrp(model, "linear_interpreter")
    linear = explained.run(x)[1].linearised()
    found = linear.apply({"x": v}) + linear.offset
    assert agreement(explained, x, found, expected, "frozen network") <= FLOAT64


@pytest.mark.parametrize("name", ["vgg", "resnet", "vit", "bert", "llama", "gpt2"])
def test_architectures_are_linear_where_they_are(name: str) -> None:
    """Completeness from the rows alone, for a random combination of outputs; the offset comes from the columns."""
    case = zoo.build(name, double=True)
    with torch.no_grad():
        _, tape = compile_for_lrp(case.model, "linear_interpreter").run(*case.args, **case.kwargs)
    linear = tape.linearised()
    seed = torch.randn_like(linear.offset)
    ((site, row),) = linear.row(seed).items()
    x = tape.activations(site)
    sinks = sum((v.sum() for found in tape.sinks(seed).values() for v in found.values()), torch.zeros(()))
    seeded = float(tape.seeded_output(seed).sum())
    assert seeded == pytest.approx(float((row * x).sum() + sinks), rel=1e-9)
    assert float((seed * linear.offset).sum()) == pytest.approx(float(sinks), rel=1e-9)
    assert float((seed * linear.apply({site: x})).sum()) == pytest.approx(float((row * x).sum()), rel=1e-9)


def test_what_cannot_be_linearised_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
    _, tape = compile_for_lrp(model, "guided_backprop").run(x)
    with pytest.raises(errors.NotLinearError, match=r"guided_backprop.*not linear in the seed"):
        tape.linearised()
    _, tape = compile_for_lrp(model, composites.linear_interpreter()).run(x)
    with pytest.raises(errors.ArgumentError, match=r"the sites and their shapes are"):
        tape.linearised().apply({"input": torch.ones(3)})
