"""Promises become buffers: the same bits as when every value is kept whole, in as few bytes as can be said by hand."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from whole import FREE_CALLS, KEEP_NOTHING, PricedCompiler, joint, priced, table, whole_results

from lrp_compiler.baselines import reference_inputs
from lrp_compiler.captures import Captures
from lrp_compiler.compiled import ExplainedCall
from lrp_compiler.passes.prices import Prices
from lrp_compiler.passes.program import graph_inputs, value_of
from lrp_compiler.passes.request import Request
from lrp_compiler.passes.sizes import Sizes, value_of_sizes
from lrp_compiler.recording import Question, Recording

DEAR = Prices(call=0, kept_byte=64, flop=1e3)
"""Memory is dear, and products are dearer: all that has a small form is kept in the smallest."""
PRICES = {"free calls": FREE_CALLS, "keep nothing": KEEP_NOTHING, "small forms": DEAR}
STATE = 5056
"""Bytes of the state of torch's generator on CPU."""


@dataclass
class Given:
    """A model with a call, traced once for all that is done with it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_large: bool = False
    captures: Captures = field(default_factory=Captures)


def convolutional() -> nn.Module:
    """Max and average pools, overlapping windows, an in-place ReLU, a residual."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        zoo.ResidualBlock(6, 8),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    )


class Volumes(nn.Module):
    """Pools and padding in one and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.volume, self.row = nn.Conv3d(1, 4, 2), nn.Conv1d(4, 6, 3, dilation=2)
        self.back, self.head = nn.ConvTranspose1d(6, 4, 3, stride=2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        v = F.max_pool3d(torch.tanh(self.volume(x)), 2, 1, ceil_mode=True)
        v = F.adaptive_avg_pool3d(F.avg_pool3d(F.leaky_relu(v, 0.1), 2, 1), (3, 2, 3)).flatten(2)
        r = F.max_pool1d(F.avg_pool1d(F.pad(self.row(F.pad(v, (2, 2), "reflect")), (1, 1), "replicate"), 2), 2, 1)
        return self.head(F.elu(self.back(r)).mean(-1))


class Norms(nn.Module):
    """Every kind of norm, RMSNorm as Llama spells it too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.group, self.instance = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
        self.rms, self.layer = nn.RMSNorm(8, eps=1e-5), nn.LayerNorm(8)
        self.weight, self.head = nn.Parameter(torch.rand(8)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.instance(F.gelu(self.group(self.conv(x))))).flatten(2).transpose(1, 2)
        x = F.silu(self.layer(self.rms(x)))
        return self.head(self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))).mean(1)


class Dropped(nn.Module):
    """Dropout of values that are large beside a generator's state, once of a transposed one, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.first(x)), 0.3, self.training).transpose(1, 2)
        x = F.dropout(torch.tanh(self.norm(x)), 0.6, self.training)
        return self.second(x.mean(-1))


class GatedMLP(nn.Module):
    """SwiGLU, twice, with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(8, 12) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(8, 12) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(12, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for gate, up, down in zip(self.gates, self.ups, self.downs, strict=True):
            x = x + down(F.silu(gate(x)) * up(x))
        return x


class Attention(nn.Module):
    """Attention with a bool mask, fused and written out with a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        scores = (query @ key.transpose(-1, -2) / 2).masked_fill(~mask, -torch.inf).softmax(-1)
        return self.head(self.out((mixed + scores @ value).transpose(1, 2).flatten(2)))[:, -1]


class Switch(nn.Module):
    """A branch with a ReLU and dropout, and one with a norm and a gate; the input's sum says which."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 300), nn.Linear(300, 5)
        self.other, self.norm, self.head = nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        made = torch.cond(
            x.sum() > 0,
            lambda v: self.down(self.dropout(torch.relu(self.up(v)))),
            lambda v: self.norm(v) * torch.tanh(self.other(v)),
            (h,),
        )
        return self.head(made + h)


def images(*shape: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(*shape),), {}


def switched(sign: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(6, 4).abs() * sign,), {}


def masked() -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    mask[1, :, :, :1] = False
    mask[1, :, 0, 0] = True
    return (torch.randn(2, 6, 8), mask), {}


Call = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
MODELS: dict[str, tuple[Callable[[], nn.Module], Call, bool]] = {
    "convolutional": (convolutional, lambda: images(2, 3, 14, 14), False),
    "convolutional, training": (convolutional, lambda: images(3, 3, 14, 14), True),
    "volumes": (Volumes, lambda: images(2, 1, 6, 5, 7), False),
    "norms": (Norms, lambda: images(2, 3, 6, 6), False),
    "dropped": (Dropped, lambda: images(4, 40, 8), True),
    "gated": (GatedMLP, lambda: images(3, 8), False),
    "attention": (Attention, masked, False),
    "switch, one": (Switch, lambda: switched(1), False),
    "switch, other": (Switch, lambda: switched(-1), False),
    "switch, training": (Switch, lambda: switched(1), True),
}
CASES = [
    *(("convolutional", name) for name in ("attnlrp", "epsilon_gamma_box", "excitation_pullback", "deep_lift")),
    ("convolutional, training", "epsilon_alpha2_beta1"),
    *(("volumes", name) for name in ("attnlrp", "deep_lift")),
    *(("norms", name) for name in ("attnlrp", "deep_lift")),
    *(("dropped", name) for name in ("attnlrp", "deep_lift")),
    *(("gated", name) for name in ("attnlrp", "deep_lift")),
    *(("attention", name) for name in ("attnlrp", "relp")),
    *((f"switch, {side}", "attnlrp") for side in ("one", "other", "training")),
    *((name, "attnlrp") for name in ("gpt2", "llama")),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("convolutional", "guided_backprop"),
            ("norms", "input_x_gradient"),
            ("dropped", "epsilon_plus"),
            ("gated", "cp_lrp"),
            ("t5", "attnlrp"),
        )
    ),
]
"""Models and composites; attnlrp with the whole ledger on small models."""


@functools.cache
def given(name: str) -> Given:
    torch.manual_seed(0)
    if name in MODELS:
        make, call, training = MODELS[name]
        args, kwargs = call()
        return Given(make().train(training), args, kwargs)
    case = zoo.build(name)
    return Given(case.model, case.args, case.kwargs, is_large=True)


def everything(compiler: PricedCompiler, case: Given) -> tuple[ExplainedCall, Request]:
    """A call, and the question for relevance at its inputs for one output, for every sink and perhaps the ledger."""
    call = compiler.explain(compiler.call(case.model, case.args, case.kwargs), None)
    sites = tuple((node, "relevance") for nodes in call.program.sources.values() for node in nodes)
    ledger = compiler.composite.name == "attnlrp" and not case.is_large
    return call, Request((call.chosen_output(None),), sites, sinks=True, ledger=ledger)  # type: ignore[arg-type]


def check(compiler: PricedCompiler, case: Given) -> None:
    """Both halves of the code that is made at any prices, asked twice, against the joint graph in one go."""
    call, request = everything(compiler, case)
    program = joint(compiler.emitted(call, request)[0])
    inputs = graph_inputs(program, case.model, case.args, case.kwargs)
    inputs = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
    reference = reference_inputs(program, inputs, None)
    sizes = call.binder.bind([*pytree.tree_leaves((case.args, case.kwargs))])
    output = value_of(program.nodes_by_name()[program.outputs[request.outputs[0]]])
    seed = torch.randn(value_of_sizes(output.shape, sizes), dtype=output.dtype)
    torch.manual_seed(1)
    expected = whole_results(program, sizes, inputs, (seed,), reference)
    after = torch.get_rng_state()
    assert any(bool(value.any()) for value in expected)
    for name, prices in PRICES.items():
        recording = Recording(compiler.at(prices), call, request)
        torch.manual_seed(1)
        recording.open([value.clone() if isinstance(value, Tensor) else value for value in inputs], reference)
        recording.record()
        assert torch.equal(torch.get_rng_state(), after)
        for _ in range(2):
            results = recording.answer(Question(request, {0: seed}))
            for (result, ours), theirs in zip(results, expected, strict=True):
                assert torch.equal(ours, theirs), f"{name}: {result} differs by {(ours - theirs).abs().max()}"


@pytest.mark.parametrize(("name", "composite"), CASES)
def test_relevance_is_bitwise_that_of_values_kept_whole(name: str, composite: str) -> None:
    case = given(name)
    check(PricedCompiler(composite, FREE_CALLS, case.captures), case)


class Between(nn.Module):
    """One op between a wide linear map, which nobody wants to compute twice, and a sum with one weight."""

    def __init__(self, op: Callable[..., Tensor], module: nn.Module | None) -> None:
        super().__init__()
        self.first, self.op, self.module = nn.Conv2d(512, 4, 1), op, module
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = self.op(h) if self.module is None else self.module(self.op(h))
        return h.flatten(1).sum(1, keepdim=True) * self.weight


BATCH, CHANNELS, HEIGHT, WIDTH = 3, 4, 6, 7
COUNT = BATCH * CHANNELS * HEIGHT * WIDTH
BITS = (COUNT + 7) // 8
ROWS = 4 * BATCH * CHANNELS * HEIGHT
KEPT: dict[str, tuple[Callable[..., Tensor], nn.Module | None, int]] = {
    "relu": (F.relu, None, COUNT),
    "leaky_relu": (lambda h: F.leaky_relu(h, 0.1), None, COUNT),
    "prelu": (lambda h: h, nn.PReLU(), COUNT),
    "abs": (torch.abs, None, 4 * COUNT),
    "where": (lambda h: torch.where(h > 0, h, 2 * h), None, COUNT),
    "masked_fill": (lambda h: h.masked_fill(h > 1, 0.0), None, COUNT),
    "clamp": (lambda h: h.clamp(-1, 1), None, 4 * COUNT),
    "max_pool2d": (lambda h: F.max_pool2d(h, (3, 2)), None, 8 * BATCH * CHANNELS * 2 * 3),
    "max_pool3d": (lambda h: F.max_pool3d(h, 2), None, 8 * BATCH * 2 * 3 * 3),
    "dropout": (lambda h: F.dropout(h.repeat(1, 1, 40, 40), 0.3), None, BITS * 1600),
    "rms_norm": (lambda h: h, nn.RMSNorm(WIDTH, eps=1e-5), ROWS),
    "rms_norm, spelled": (lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5), None, ROWS),
    "layer_norm": (lambda h: h, nn.LayerNorm(WIDTH), ROWS),
    "group_norm": (lambda h: h, nn.GroupNorm(2, CHANNELS), 4 * BATCH * 2),
    "batch_norm": (lambda h: h, nn.BatchNorm2d(CHANNELS), 4 * CHANNELS),
    "gelu": (F.gelu, None, 4 * COUNT),
    "avg_pool1d": (lambda h: F.avg_pool1d(h[:, 0], 2), None, 0),
    "avg_pool2d": (lambda h: F.avg_pool2d(h, 3, 2, 1, ceil_mode=True), None, 0),
    "avg_pool3d": (lambda h: F.avg_pool3d(h, 2), None, 0),
    "adaptive_avg_pool2d": (lambda h: F.adaptive_avg_pool2d(h, 4), None, 0),
    "adaptive_avg_pool3d": (lambda h: F.adaptive_avg_pool3d(h, 4), None, 0),
    "reflection_pad2d": (lambda h: F.pad(h, (1, 2, 3, 1), "reflect"), None, 0),
    "replication_pad2d": (lambda h: F.pad(h, (1, 2, 3, 1), "replicate"), None, 0),
    "conv1d": (lambda h: h.flatten(2), nn.Conv1d(CHANNELS, 5, 3), 0),
    "conv2d": (lambda h: h, nn.Conv2d(CHANNELS, 5, 3, 2), 0),
    "conv3d": (lambda h: h.unsqueeze(1), nn.Conv3d(1, 5, 3), 0),
    "conv_transpose2d": (lambda h: h, nn.ConvTranspose2d(CHANNELS, 5, 3), 0),
    "mean": (lambda h: h.mean(-1), None, 0),
    "ones_like": (lambda h: h + torch.ones_like(h), None, 0),
}
"""What stands between two linear maps in a model in training mode, and how many bytes are kept for it."""
KEPT_AT_LEAST = {
    **dict.fromkeys(("relu", "leaky_relu", "prelu", "where", "masked_fill"), BITS),
    "abs": 2 * BITS,
    "max_pool2d": BATCH * CHANNELS * 2 * 3,
    "max_pool3d": BATCH * 2 * 3 * 3,
}
"""The same at DEAR prices."""


@pytest.mark.parametrize(
    ("name", "prices", "expected"),
    [
        *((name, FREE_CALLS, expected) for name, (_, _, expected) in KEPT.items()),
        *((name, DEAR, expected) for name, expected in KEPT_AT_LEAST.items()),
    ],
)
def test_bytes_are_those_counted_by_hand(name: str, prices: Prices, expected: int) -> None:
    op, module, _ = KEPT[name]
    x = torch.randn(BATCH, 512, HEIGHT, WIDTH)
    explained = priced(Between(op, module).train(), "attnlrp", prices)
    buffers = table(explained, x).values()
    kept = [buffer for buffer in buffers if buffer.kind in ("saved", "compressed")]
    assert sum(buffer.bytes for buffer in kept) == expected, kept
    # What the table says is what the forward pass hands over.
    with torch.no_grad():
        tape = explained.run(x)[1]
    handed = tape._recording._saved.known
    assert {name: value.numel() * value.element_size() for name, value in handed.items()} == {
        buffer.name: buffer.bytes for buffer in kept
    }


def test_where_memory_is_dear_a_draw_is_made_again() -> None:
    """State of the generator and a checksum of it, whatever the size of what is dropped."""
    explained = priced(Between(lambda h: F.dropout(h.repeat(1, 1, 40, 40), 0.3), None), "attnlrp", KEEP_NOTHING)
    buffers = table(explained, torch.randn(BATCH, 512, HEIGHT, WIDTH)).values()
    sizes = sorted(buffer.bytes for buffer in buffers if buffer.kind in ("saved", "compressed"))
    assert sizes == [8, STATE]


@pytest.mark.parametrize("name", ["convolutional", "attention"])
def test_several_targets_at_once_read_the_same_values(name: str) -> None:
    """Code mapped over seeds against the joint graph mapped over them."""
    case = given(name)
    compiler = PricedCompiler("attnlrp", FREE_CALLS, case.captures)
    call, request = everything(compiler, case)
    program = joint(compiler.emitted(call, request)[0])
    inputs = graph_inputs(program, case.model, case.args, case.kwargs)
    for prices in PRICES.values():
        recording = Recording(compiler.at(prices), call, request)
        recording.open(inputs, {})
        recording.record()
        seeds = torch.randn(4, *recording.outputs()[request.outputs[0]].shape)
        found = recording.answer(Question(request, {0: seeds}, is_mapped=True))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*batching rule.*")
            expected = torch.vmap(lambda seed: whole_results(program, Sizes(), inputs, (seed,), {}))(seeds)
        assert all(torch.equal(ours, theirs) for (_, ours), theirs in zip(found, expected, strict=True))


def test_open_sizes_keep_what_every_call_needs() -> None:
    """The graph of the second shape serves the third, whose small forms have other sizes again."""
    case = given("convolutional")
    captures = Captures()
    for batch, side in ((2, 14), (3, 14), (5, 14)):
        resized = Given(case.model, (torch.randn(batch, 3, side, side),), {}, is_large=True, captures=captures)
        check(PricedCompiler("epsilon_plus", FREE_CALLS, captures), resized)
    assert [compilation.form for compilation in captures.history] == ["static", "symbolic"]


def test_names_tell_the_value_whatever_was_asked() -> None:
    """What two forward passes of one call kept under one name is one value; names are the same in every process."""
    case = given("convolutional")
    compiler = PricedCompiler("attnlrp", FREE_CALLS, case.captures)
    call = compiler.explain(compiler.call(case.model, case.args, case.kwargs), None)
    sites = [("conv2d", "relevance"), ("linear", "coefficient"), ("relu", "activation")]
    kept: list[dict[str, Tensor]] = []
    for request in (Request((0,), tuple(sites[:count]), sinks=sinks) for count in (1, 2, 3) for sinks in (False, True)):  # type: ignore[arg-type]
        recording = Recording(compiler, call, request)
        recording.open(graph_inputs(call.program, case.model, case.args, case.kwargs), {})
        recording.record()
        kept.append(recording._saved.known)
    pooled = "max_pool2d_with_indices_default_output1"
    relus = (
        # Of what the first ReLU makes its pooling alone is masked.
        "getitem_is_not_zero_9f4a3fe9",
        "relu_default_1_is_not_zero_5b32342a",
        "relu_default_2_is_not_zero_22820176",
        "relu_is_not_zero_a11a4411",
    )
    assert sorted(kept[0]) == sorted([pooled, *relus])
    for one, other in itertools.combinations(kept, 2):
        shared = one.keys() & other.keys()
        assert shared
        assert all(torch.equal(one[name], other[name]) for name in shared)


def test_a_long_chain_can_be_computed_again() -> None:
    """Where nothing is kept, what a late op reads may be hundreds of ops away from the inputs."""
    explained = priced(Chain(), "gradient", KEEP_NOTHING)
    x = torch.randn(3, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(Chain()(x).sum(), x)
    with torch.no_grad():
        tape = explained.run(x)[1]
        found = tape.relevance(torch.ones(3, 4))
    assert not tape._recording._saved.known
    assert torch.equal(found, expected)


class Chain(nn.Module):
    """Hundreds of elementwise ops, each of whose derivatives reads what is before it."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(700):
            x = torch.sin(x)
        return x
