"""Ops and habits of vision models that no network of the gallery has: outputs are eager's bits, the ledger closes."""

from __future__ import annotations

from collections.abc import Callable

import gallery_images
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp

LINE, IMAGE, VOLUME = (2, 3, 7), (2, 4, 6, 5), (2, 2, 3, 4, 3)

OPS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "nearest_1d": (lambda x: F.interpolate(x, 5), LINE),
    "linear_1d": (lambda x: F.interpolate(x, scale_factor=1.7, mode="linear"), LINE),
    "nearest_exact_1d": (lambda x: F.interpolate(x, 5, mode="nearest-exact"), LINE),
    "nearest_exact_2d": (lambda x: F.interpolate(x, (5, 8), mode="nearest-exact"), IMAGE),
    "bilinear_by_factor": (lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"), IMAGE),
    "bilinear_antialiased": (lambda x: F.interpolate(x, (3, 4), mode="bilinear", antialias=True), IMAGE),
    "bicubic_antialiased": (lambda x: F.interpolate(x, (3, 4), mode="bicubic", antialias=True), IMAGE),
    "nearest_3d": (lambda x: F.interpolate(x, scale_factor=2.0), VOLUME),
    "nearest_exact_3d": (lambda x: F.interpolate(x, (2, 3, 4), mode="nearest-exact"), VOLUME),
    "trilinear": (lambda x: F.interpolate(x, (5, 2, 6), mode="trilinear", align_corners=True), VOLUME),
    "channel_shuffle": (nn.ChannelShuffle(2), IMAGE),
    "unpooled": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (2, 4, 6, 4)),
    "gated_linear_unit": (lambda x: F.glu(x, 1), IMAGE),
    "instance_norm": (lambda x: F.instance_norm(x), IMAGE),
    "local_response_norm": (lambda x: F.local_response_norm(x, 3), IMAGE),
    "shifted_windows": (lambda x: x.roll((-1, -1), (2, 3)).unfold(2, 3, 3).amax(-1), IMAGE),
    "log_sum_exp_pooling": (lambda x: x.flatten(2).logsumexp(-1), IMAGE),
}


class Block(nn.Module):
    """An op behind a mixing of channels, so that what it reads is no input."""

    def __init__(self, fn: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.fn = fn
        self.weight = nn.Parameter(torch.randn(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(torch.einsum("oc,bc...->bo...", self.weight, x)).flatten(1)


@pytest.mark.parametrize("name", OPS)
def test_op_keeps_its_bits_and_conserves(name: str) -> None:
    torch.manual_seed(0)
    fn, shape = OPS[name]
    model = Block(fn, shape[1])
    x = torch.randn(shape)
    explained = compile_for_lrp(model, "attnlrp")
    assert torch.equal(explained(x), model(x))
    model.double()
    out, tape = explained.run(x.double())
    assert torch.equal(out, model(x.double()))
    ledger = tape.ledger(torch.randn_like(out))
    assert ledger.rows and all(row.relative_gap <= 1e-10 for row in ledger.rows), ledger


def test_gated_linear_units_share_between_value_and_gate() -> None:
    """The product's half rule, and the identity rule of the sigmoid: y / 2 to either half of the input."""
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    out, tape = compile_for_lrp(nn.GLU(1), "attnlrp").run(x)
    to_value, to_gate = tape.relevance(torch.ones_like(out)).chunk(2, 1)
    torch.testing.assert_close(to_value, out / 2)
    # What passed the sigmoid is divided by the gate's input, stabilised by 1e-6.
    divisible = x[:, 3:].abs() > 0.1
    torch.testing.assert_close(to_gate[divisible], out[divisible] / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_linear_units_keep_their_bits(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(4, 8, 33)).to(dtype)
    assert torch.equal(compile_for_lrp(nn.GLU(1))(x), F.glu(x, 1))


@pytest.mark.parametrize("name", ["efficientnet_v2", "mobilenet_v3", "vgg16_batch_norm", "unet"])
def test_training_mode_is_eager_draw_by_draw(name: str) -> None:
    """Stochastic depth and dropout draw the same numbers, batch norm keeps the same statistics."""
    call = gallery_images.ENTRIES[name].build()
    call.model.train()
    state = {key: value.clone() for key, value in call.model.state_dict().items()}
    explained = compile_for_lrp(call.model, "epsilon")
    results = []
    for run in (explained, call.model):
        call.model.load_state_dict(state)
        torch.manual_seed(3)
        out = run(*call.args)
        results.append((out.detach(), {key: value.clone() for key, value in call.model.state_dict().items()}))
    (ours, our_state), (theirs, their_state) = results
    assert torch.equal(ours, theirs)
    assert all(torch.equal(our_state[key], value) for key, value in their_state.items())


def test_a_branch_that_was_dropped_gets_nothing() -> None:
    """Stochastic depth in training: relevance of a dropped sample passes the skip alone, and the ledger closes."""
    torch.manual_seed(0)
    branch = nn.Conv2d(3, 3, 3, padding=1)
    model = gallery_images.Residual(branch, skips=True, drop=0.5).double().train()
    x = torch.randn(16, 3, 4, 4, dtype=torch.float64)
    out, tape = compile_for_lrp(model, "epsilon").run(x)
    dropped = (out == x).flatten(1).all(1)
    assert dropped.any() and not dropped.all()
    seed = torch.randn_like(out)
    through = tape.relevance(seed, at="branch.0")
    assert (through[dropped] == 0).all() and (through[~dropped] != 0).flatten(1).any(1).all()
    torch.testing.assert_close(tape.relevance(seed)[dropped], (x * seed)[dropped])
    assert all(row.relative_gap <= 1e-10 for row in tape.ledger(seed).rows)
