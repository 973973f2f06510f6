"""Scans, chunked state-space models and linear attention against autograd with detached factors (RULES.md 1.8)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import relative_error
from catalogue import agreement
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import covering
from recognised import patterns_in
from state_space import (
    SPELLINGS,
    MambaBlock,
    as_hugging_face,
    as_mamba_minimal,
    as_sums,
    explained_by_autograd,
    frozen_scan,
    half,
    minimal_ssd,
    rms_norm,
)
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp
from lrp_compiler.kernels.dialect.selective_scan import SELECTIVE_SCAN_TRANSPOSE

FLOAT64 = 1e-9
CONSERVING = 1e-10


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def unrolled(u: Tensor, decay: Tensor, write: Tensor, read: Tensor) -> Tensor:
    """y_t = sum over states of read_t h_t, h_t = decay_t h_{t-1} + write_t u_t; all (T, B, D, N) but u (T, B, D, 1)."""
    state, outputs = torch.zeros_like(write[0]), []
    for t in range(u.shape[0]):
        state = decay[t] * state + write[t] * u[t]
        outputs.append((read[t] * state).sum(-1))
    return torch.stack(outputs)


sizes = {
    "steps": st.integers(1, 6),
    "batch": st.sampled_from([0, 1, 3]),
    "channels": st.integers(1, 4),
    "states": st.integers(1, 4),
}


@given(**sizes)
def test_the_reverse_scan_is_the_transpose_of_the_forward_scan(
    steps: int, batch: int, channels: int, states: int
) -> None:
    shape = (steps, batch, channels, states)
    decay, write, read = torch.rand(shape).double(), random(*shape), random(*shape)
    u, c = random(*shape[:3], 1).requires_grad_(), random(*shape[:3])
    (expected,) = torch.autograd.grad(unrolled(u, decay, write, read), u, c)
    found = SELECTIVE_SCAN_TRANSPOSE.op(read * c.unsqueeze(-1), decay, write, list(u.shape))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mapped", [(0, None, None), (1, 2, None), (None, 1, 0)])
def test_the_reverse_scan_under_vmap(mapped: tuple[int | None, ...]) -> None:
    """Each mapped argument brings a dimension of size 3 anywhere; the rest is shared."""
    shapes = [(4, 2, 3, 5), (4, 2, 1, 5), (4, 2, 3, 5)]
    each = [[random(*shape) for _ in range(3)] for shape in shapes]
    stacked = [one[0] if dim is None else torch.stack(one, dim) for one, dim in zip(each, mapped, strict=True)]
    found = torch.vmap(lambda s, d, w: SELECTIVE_SCAN_TRANSPOSE.op(s, d, w, [4, 2, 3, 1]), in_dims=mapped)(*stacked)
    for index in range(3):
        chosen = [one[0 if dim is None else index] for one, dim in zip(each, mapped, strict=True)]
        torch.testing.assert_close(found[index], SELECTIVE_SCAN_TRANSPOSE.op(*chosen, [4, 2, 3, 1]))


def test_the_op_is_registered_soundly() -> None:
    arguments = (random(4, 2, 3, 5), random(4, 1, 3, 5), random(4, 2, 3, 5), [4, 2, 3, 1])
    torch.library.opcheck(SELECTIVE_SCAN_TRANSPOSE.op, arguments)


@pytest.mark.parametrize(
    ("scan", "composite"),
    covering(SPELLINGS, ["mamba_lrp", "attnlrp", "auto"]),
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_mamba_block_is_explained_by_mamba_lrp(scan: Callable[..., Tensor], composite: str) -> None:
    block, x, seed = MambaBlock(scan).double(), random(2, 5, 3), random(2, 5, 3)
    torch.testing.assert_close(block(x), block.restated(x), rtol=1e-12, atol=1e-12)
    explained = compile_for_lrp(block, composite)
    out, tape = explained.run(x)
    assert out.equal(block(x))
    assert patterns_in(explained, x)["scan"] == 1
    expected = explained_by_autograd(block.restated, x, seed)
    assert agreement(explained, x, tape.relevance(seed), expected, "MambaLRP by detach") <= FLOAT64


@pytest.mark.parametrize("scan", SPELLINGS, ids=lambda scan: scan.__name__)
def test_the_ledger_of_a_mamba_block_closes(scan: Callable[..., Tensor]) -> None:
    _, tape = compile_for_lrp(MambaBlock(scan).double(), "mamba_lrp").run(random(2, 5, 3))
    ledger = tape.ledger((2, 1))
    assert max(row.relative_gap for row in ledger.rows) <= CONSERVING
    assert abs(ledger.gap) <= CONSERVING * abs(ledger.seed)


@pytest.mark.parametrize("scan", SPELLINGS, ids=lambda scan: scan.__name__)
def test_the_reference_interpreter_agrees(scan: Callable[..., Tensor]) -> None:
    block, x = MambaBlock(scan).double(), random(2, 4, 3)
    theirs = compile_for_lrp(block, "mamba_lrp", reference=True).attribute(x, (3, 1))
    assert relative_error(compile_for_lrp(block, "mamba_lrp").attribute(x, (3, 1)), theirs) <= FLOAT64


@settings(max_examples=6, deadline=None)
@given(**sizes)
def test_blocks_of_any_size(steps: int, batch: int, channels: int, states: int) -> None:
    """Also one step, one sample, one channel, and no sample at all."""
    block = MambaBlock(as_hugging_face, inner=channels, states=states + 1).double()
    x, seed = random(batch, steps, 3), random(batch, steps, 3)
    found = compile_for_lrp(block, "mamba_lrp").attribute(x, seed)
    torch.testing.assert_close(found, explained_by_autograd(block.restated, x, seed), rtol=1e-8, atol=1e-10)


def test_several_targets_in_one_pass() -> None:
    _, tape = compile_for_lrp(MambaBlock(as_mamba_minimal).double(), "mamba_lrp").run(random(2, 5, 3))
    targets = [(4, 0), (4, 2), (1, 1)]
    for target, found in zip(targets, tape.relevance_of_each(targets), strict=True):
        torch.testing.assert_close(found, tape.relevance(target))


def test_the_relevance_graph_does_not_grow_with_time() -> None:
    reports = [
        compile_for_lrp(MambaBlock(as_hugging_face), "mamba_lrp").report(torch.randn(1, steps, 3)) for steps in (2, 9)
    ]
    assert reports[0].relevance_ops == reports[1].relevance_ops
    assert reports[0].forward_ops < reports[1].forward_ops


def test_no_state_is_kept() -> None:
    """What relevance saves of the loop is computed before it: no buffer is a state, an addend or a readout."""
    explained = compile_for_lrp(MambaBlock(as_hugging_face), "mamba_lrp")
    x = torch.randn(1, 6, 3)
    stage = next(stage for stage in explained.stages(x) if stage.name == "recognise")
    (members,) = [
        node.meta["lrp"].pattern.members
        for node in stage.program.graph.nodes
        if node.meta.get("lrp") and node.meta["lrp"].pattern and node.meta["lrp"].pattern.kind == "scan"
    ]
    assert not {buffer.name for buffer in explained.report(x).buffers} & set(members)


def test_gradients_see_the_loop_op_by_op() -> None:
    block, x, seed = MambaBlock(as_hugging_face).double(), random(2, 4, 3), random(2, 4, 3)
    explained = compile_for_lrp(block, "input_x_gradient")
    assert relative_error(explained.attribute(x, seed), explained_by_autograd(block, x, seed)) <= FLOAT64
    assert not patterns_in(explained, x)


class Loop(nn.Module):
    """A recurrence that is no linear scan with one signal."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.decay = nn.Parameter(torch.rand(3))

    def forward(self, u: Tensor, b: Tensor) -> object:
        if self.kind == "one state":
            return as_sums(u, nn.functional.softplus(b), -self.decay[:, None], b[..., :1], b[..., 1:2])
        decay, added = torch.sigmoid(self.decay).expand_as(u), u * b
        added = added if self.kind == "two candidates" else u * self.decay
        state, outputs = torch.zeros_like(u[:, 0]), []
        for t in range(u.shape[1]):
            state = decay[:, t] * state + added[:, t]
            outputs.append(state * torch.sigmoid(state) if self.kind == "nonlinear readout" else state * b[:, t])
        out = torch.stack(outputs, 1)
        return (out, state) if self.kind == "state is an output" else out


@pytest.mark.parametrize("kind", ["nonlinear readout", "state is an output", "two candidates", "one state"])
@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_no_scan_is_left_alone(kind: str, steps: int) -> None:
    explained = compile_for_lrp(Loop(kind), "attnlrp")
    inputs = (torch.randn(2, steps, 3), torch.randn(2, steps, 3))
    assert "scan" not in patterns_in(explained, *inputs)


class Surrounded(nn.Module):
    """A scan whose signal is a gated product and whose B is normalised, as in hybrid models."""

    def __init__(self, scan: Callable[..., Tensor]) -> None:
        super().__init__()
        self.scan, self.a, self.gain = scan, nn.Parameter(-torch.rand(4, 3)), nn.Parameter(torch.rand(3))

    def forward(self, u: Tensor, gate: Tensor, delta: Tensor, b: Tensor, c: Tensor) -> Tensor:
        b = self.gain * (b * torch.rsqrt(b.pow(2).mean(-1, keepdim=True) + 1e-5))
        return self.scan(u * gate, nn.functional.softplus(delta), self.a, b, c)

    def restated(self, u: Tensor, gate: Tensor, delta: Tensor, b: Tensor, c: Tensor) -> Tensor:
        b = rms_norm(b, self.gain, 1e-5)
        return frozen_scan(half(u, gate), nn.functional.softplus(delta), self.a, b, c)


@pytest.mark.parametrize("scan", SPELLINGS, ids=lambda scan: scan.__name__)
def test_what_a_scan_reads_may_be_products_itself(scan: Callable[..., Tensor]) -> None:
    """Relevance reaches u and the gate, half each; Delta, B and C get none."""
    model = Surrounded(scan).double()
    inputs = [random(2, 5, width) for width in (4, 4, 4, 3, 3)]
    _, tape = compile_for_lrp(model, "mamba_lrp").run(*inputs)
    seed = random(2, 5, 4)
    leaves = [value.clone().requires_grad_() for value in inputs[:2]]
    grads = torch.autograd.grad(model.restated(*leaves, *inputs[2:]), leaves, seed)
    found = list(tape.relevance(seed).values())
    for relevance, value, grad in zip(found[:2], inputs, grads, strict=False):
        assert relative_error(relevance, value * grad) <= FLOAT64
    assert all(relevance.abs().max() == 0 for relevance in found[2:])


class MinimalMamba2(nn.Module):
    """Projections around the Mamba-2 paper's minimal SSD."""

    def __init__(self, heads: int = 2, width: int = 3, states: int = 4, block: int = 3) -> None:
        super().__init__()
        self.sizes = [heads * width, heads * states, heads * states, heads]
        self.heads, self.block = heads, block
        self.proj = nn.Linear(5, sum(self.sizes))
        self.a_log = nn.Parameter(torch.rand(heads))

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        u, b, c, step = self.proj(x).split(self.sizes, -1)
        u, b, c = (value.unflatten(-1, (self.heads, -1)) for value in (u, b, c))
        return u, b, c, nn.functional.softplus(step)

    def forward(self, x: Tensor) -> Tensor:
        u, b, c, delta = self.parts(x)
        return minimal_ssd(u * delta.unsqueeze(-1), -torch.exp(self.a_log) * delta, b, c, self.block)

    def restated(self, x: Tensor) -> Tensor:
        u, b, c, delta = self.parts(x)
        decay = -torch.exp(self.a_log)[:, None]
        heads = []
        for head in range(self.heads):
            width, states = u.shape[-1], b.shape[-1]
            one = (value[:, :, head : head + 1].expand(-1, -1, width) for value in (delta,))
            wide = (value[:, :, head, None].expand(-1, -1, width, -1) for value in (b, c))
            heads.append(frozen_scan(u[:, :, head], *one, decay[head].expand(width, states), *wide))
        return torch.stack(heads, 2)


@pytest.mark.parametrize("composite", ["mamba_lrp", "auto"])
def test_the_minimal_ssd_is_explained_by_mamba_lrp(composite: str) -> None:
    model, x = MinimalMamba2().double(), random(2, 9, 5)
    seed = random(2, 9, 2, 3)
    torch.testing.assert_close(model(x), model.restated(x), rtol=1e-10, atol=1e-10)
    explained = compile_for_lrp(model, composite)
    _, tape = explained.run(x)
    expected = explained_by_autograd(model.restated, x, seed)
    assert agreement(explained, x, tape.relevance(seed), expected, "MambaLRP by detach") <= FLOAT64
    assert max(row.relative_gap for row in tape.ledger(seed).rows) <= CONSERVING


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.mT @ v)


def einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v))


def causal_einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhnd,bhnde->bhne", q, torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2))


def causal_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = torch.cumsum(k.unsqueeze(-1) * v.unsqueeze(-2), 2)
    return (q.unsqueeze(-1) * states).sum(-2)


def normaliser(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    total = k.cumsum(2) if causal else k.sum(2, keepdim=True)
    return (q * total).sum(-1, keepdim=True) + 1e-6


class LinearAttention(nn.Module):
    """phi(q) (phi(k)^T v), normalised or not."""

    def __init__(self, fn: Callable[..., Tensor], normalised: str) -> None:
        super().__init__()
        self.fn, self.normalised = fn, normalised
        self.qkv = nn.Linear(6, 3 * 2 * 3, bias=False)

    def forward(self, x: Tensor, share: Callable[[Tensor], Tensor] = lambda value: value) -> Tensor:
        """``share`` treats phi(q) and phi(k)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        q, k = share(nn.functional.elu(q) + 1), share(nn.functional.elu(k) + 1)
        y = self.fn(q, k, v)
        if self.normalised == "no":
            return y
        z = normaliser(q.detach(), k.detach(), self.fn in (causal_einsums, causal_products))
        return y / z if self.normalised == "divided" else y * (1 / z)


@pytest.mark.parametrize("composite", ["cp_lrp", "mamba_lrp"])
@pytest.mark.parametrize(
    ("fn", "normalised"),
    covering([products, einsums, causal_einsums, causal_products], ["no", "divided", "reciprocal"]),
    ids=lambda value: getattr(value, "__name__", value),
)
def test_linear_attention_with_constant_maps(fn: Callable[..., Tensor], normalised: str, composite: str) -> None:
    model, x, seed = LinearAttention(fn, normalised).double(), random(2, 5, 6), random(2, 2, 5, 3)

    def restated(value: Tensor) -> Tensor:
        return model(value, Tensor.detach)

    explained = compile_for_lrp(model, composite)
    _, tape = explained.run(x)
    assert patterns_in(explained, x) == {"linear_attention": 2}
    expected = explained_by_autograd(restated, x, seed)
    assert agreement(explained, x, tape.relevance(seed), expected, "constant maps by detach") <= FLOAT64
    assert max(row.relative_gap for row in tape.ledger(seed).rows) <= CONSERVING


@pytest.mark.parametrize("reference", [False, True])
def test_linear_attention_shared_evenly(reference: bool) -> None:
    """AttnLRP: half of q s to either side, half of what reaches s = k^T v to either side."""
    q, k, v, seed = random(2, 5, 3), random(2, 5, 3), random(2, 5, 4), random(2, 5, 4)

    class Products(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return products(q, k, v)

    found = compile_for_lrp(Products(), "attnlrp", reference=reference).run(q, k, v)[1].relevance(seed)
    leaves = [value.clone().requires_grad_() for value in (q, k, v)]
    states = leaves[1].mT @ leaves[2]
    shared = states / 2 + (states / 2).detach()
    out = leaves[0] @ shared
    grads = torch.autograd.grad(out / 2 + (out / 2).detach(), leaves, seed)
    for (name, relevance), value, grad in zip(found.items(), (q, k, v), grads, strict=True):
        assert relative_error(relevance, value * grad) <= FLOAT64, name


def test_quadratic_products_are_no_linear_attention() -> None:
    """(q k^T) v is the same product of three; there attention weights meet values, and nothing is marked."""

    class Quadratic(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT) @ v

    inputs = (torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.randn(2, 5, 3))
    assert not patterns_in(compile_for_lrp(Quadratic(), "cp_lrp"), *inputs)


def test_half_shares_evenly() -> None:
    """The restatement's own half rule: both factors get half of the product's relevance."""
    left, right = random(4).requires_grad_(), random(4).requires_grad_()
    grads = torch.autograd.grad(half(left, right).sum(), (left, right))
    for value, grad in zip((left, right), grads, strict=True):
        torch.testing.assert_close(value * grad, left * right / 2)
