"""Relevance with create_graph: derivatives of every rule against finite differences, in float64, away from kinks.

Rules that choose (by sign, by size) are piecewise smooth: a derivative exists almost everywhere, and random inputs keep
clear of the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from differentiable import Explanation, assert_differentiable, relevance_for
from functions import ACTIVATIONS, WITH_OFFSET, Op
from state_space import MambaBlock, as_hugging_face
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import Composite, composites, fit_patterns
from lrp_compiler.captures import Captures
from lrp_compiler.kernels.gates import GATES
from lrp_compiler.kernels.offset_gates import OFFSET_GATES
from lrp_compiler.rules import WSquare

pytestmark = pytest.mark.usefixtures("float64")

FUNCTIONS = {**ACTIVATIONS, **WITH_OFFSET}
FLOAT32_SIXTH = 1e-7
"""torch's derivative of hardsigmoid has 1/6 rounded to float32, in float64 too."""


def assert_all_differentiable(model: nn.Module, names: tuple[str, ...], *inputs: Tensor, **bounds: float) -> None:
    """Relevance for output 1 under several composites, traced once."""
    captures = Captures()
    for name in names:
        assert_differentiable(Explanation(model, name, relevance_for(1), captures=captures), *inputs, **bounds)


def images() -> nn.Module:
    """Convolutions with and without batch norm, both kinds of pooling, dense layers."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    for _ in range(3):
        model(torch.randn(8, 2, 4, 4))
    return model.eval()


def fitted(model: nn.Module, name: str) -> Composite:
    """A composite with patterns estimated for ``model``."""
    patterns = fit_patterns(model, [torch.randn(16, 2, 4, 4)])
    return composites.pattern_net(patterns) if name == "pattern_net" else composites.pattern_attribution(patterns)


VARIANTS: dict[str, Composite] = {
    "epsilon 0.1": composites.epsilon(0.1),
    "z-box": composites.epsilon_gamma_box(-3.0, 3.0),
    "w_square": composites.epsilon_plus().override((composites.FIRST_LINEAR, WSquare())),
    "top relevance": composites.keep_top(composites.epsilon(), 0.4),
}
PATTERNS = ("pattern_net", "pattern_attribution")


def test_composites_on_a_convolutional_network() -> None:
    """Every composite by name, and variants of some; deconvnet and guided backpropagation are piecewise constant."""
    model, x, captures = images(), torch.randn(2, 2, 4, 4), Captures()
    for name in (*composites.COMPOSITES, *VARIANTS):
        composite: str | Composite = fitted(model, name) if name in PATTERNS else VARIANTS.get(name, name)
        question = relevance_for(torch.tensor([2, 0]))
        assert_differentiable(Explanation(model, composite, question, captures=captures), x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations(name: str) -> None:
    """Gates, gates with an offset, relevance edges, torch's own derivatives, quotients of differences."""
    model = nn.Sequential(nn.Linear(3, 4), Op(FUNCTIONS[name]), nn.Linear(4, 2))
    names = ("attnlrp", "linear_interpreter", "input_x_gradient", "deep_lift")
    bounds = {"rounding": FLOAT32_SIXTH} if name == "aten::hardsigmoid" else {}
    assert_all_differentiable(model, names, torch.randn(2, 3), **bounds)


def test_every_gate_is_tested() -> None:
    """prelu once more, its slope a parameter."""
    assert FUNCTIONS.keys() == {*GATES, *OFFSET_GATES}
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2))
    assert_differentiable(Explanation(model, "attnlrp", relevance_for(1)), torch.randn(2, 3))


EVEN = ("tanh", "sin", "sinh", "asinh", "atan", "erf", "sigmoid", "softshrink")
SLOPED = ("expm1", "log1p", "softplus", "log_sigmoid", "exp", "cos", "cosh", "gelu", "silu", "mish")


@pytest.mark.parametrize("x", [0.0, 1e-300, -1e-12, 3e-8])
@pytest.mark.parametrize("name", [*EVEN, *SLOPED])
def test_gates_have_their_derivative_at_zero(name: str, x: float) -> None:
    """A quotient's derivative is not one there: by autograd it would be zero, NaN or noise."""
    key = f"aten::{name}"
    gate = OFFSET_GATES[key][0] if key in OFFSET_GATES else GATES[key]
    leaf, step = torch.tensor(x, requires_grad=True), 1e-4
    (found,) = torch.autograd.grad(gate(leaf), leaf)
    expected = (gate(leaf.detach() + step) - gate(leaf.detach() - step)) / (2 * step)
    assert abs(float(found - expected)) <= 1e-7


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm([4, 3]),
    "layer norm without weights": lambda: nn.LayerNorm(3, elementwise_affine=False),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "instance norm": lambda: nn.InstanceNorm1d(4, affine=True),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "batch norm in eval": lambda: nn.BatchNorm1d(4).eval(),
    "rms norm": lambda: nn.RMSNorm(3),
    "open-coded layer norm": lambda: Op(
        lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1).sqrt()
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str) -> None:
    """Their statistics depend on the input, although torch returns them as constants."""
    model = nn.Sequential(NORMS[name](), nn.Flatten(), nn.Linear(12, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    assert_all_differentiable(model, ("attnlrp", "dynamiclrp", "input_x_gradient", "deep_lift"), torch.randn(3, 4, 3))


class Attends(nn.Module):
    """Attention with 4 heads (of which keys and values have 2 in ``grouped``), by one of several spellings."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        shared = 4 if kind == "grouped" else 8
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, shared), nn.Linear(8, shared)
        self.head = nn.Linear(8, 3)
        self.bias = nn.Parameter(torch.randn(4, 5, 5)) if kind == "learned mask" else None

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = (
            layer(x).view(batch, tokens, -1, 2).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() if self.kind == "masked" else self.bias
        if self.kind == "eager":
            mixed = torch.softmax(query @ key.transpose(-2, -1) / 2**0.5, -1) @ value
        else:
            options = {"is_causal": self.kind == "causal", "enable_gqa": self.kind == "grouped"}
            mixed = F.scaled_dot_product_attention(query, key, value, mask, **options)
        return self.head(mixed.transpose(1, 2).flatten(2)).mean(1)


@pytest.mark.parametrize("kind", ["fused", "eager", "masked", "causal", "grouped", "learned mask"])
def test_attention(kind: str) -> None:
    names = ("attnlrp", "cp_lrp", "relp", "input_x_gradient", "deep_lift")
    assert_all_differentiable(Attends(kind), names, torch.randn(2, 5, 8))


PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "gated": (lambda x, v, w: F.silu(x @ v) * (x @ w), ((3, 4), (3, 4))),
    "quotient": (lambda x, v, w: (x @ v) / (2 + (x @ w).square()), ((3, 4), (3, 4))),
    "matrices": (lambda x, w: (x.unsqueeze(1) * w) @ x.unsqueeze(-1), ((4, 3),)),
    "softmax": (lambda x, w: torch.softmax(x @ w, -1) * 3, ((3, 4),)),
    "log softmax": (lambda x, w: torch.log_softmax(x @ w, -1), ((3, 4),)),
    "logsumexp": (lambda x, w: torch.logsumexp((x @ w).view(-1, 2, 2), -1), ((3, 4),)),
    "largest": (lambda x, w: (x @ w).view(-1, 2, 2).amax(-1), ((3, 4),)),
    "sums": (lambda x, w: torch.cat([(x @ w).cumsum(-1), x.mean(-1, keepdim=True), -x], -1), ((3, 4),)),
    "spectrum": (lambda x, w: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(w), n=3), ((2, 2),)),
    "deviation": (lambda x, w: (x @ w) / (1 + (x @ w).std(-1, keepdim=True)), ((3, 4),)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_reductions(name: str) -> None:
    function, shapes = PRODUCTS[name]
    names = ("attnlrp", "input_x_gradient", "deep_lift", *(("dynamiclrp",) if name != "spectrum" else ()))
    model = nn.Sequential(Op(function, *map(torch.randn, shapes)), nn.Flatten())
    assert_all_differentiable(model, names, torch.randn(2, 3))


class Reads(nn.Module):
    """A recurrent module, its last output and state."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        options: dict[str, Any] = {"num_layers": 2, "bidirectional": True} if kind == "LSTM" else {}
        self.module = getattr(nn, kind)(3, 4, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        output, state = self.module(x)
        return output.sum(1) + (state[0] if isinstance(state, tuple) else state)[0].sum()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_modules(kind: str) -> None:
    """The walk back through time is one op without a derivative, and plain ops where one is asked for."""
    assert_all_differentiable(Reads(kind), ("attnlrp", "input_x_gradient"), torch.randn(2, 4, 3))


@pytest.mark.parametrize("composite", ["mamba_lrp", "attnlrp"])
def test_scans(composite: str) -> None:
    """A Mamba block, whose recognised scan is one op without a derivative."""
    model = nn.Sequential(MambaBlock(as_hugging_face, 4), nn.Flatten(), nn.Linear(20, 2))
    assert_differentiable(Explanation(model, composite, relevance_for(1)), torch.randn(2, 5, 4))


class Mixture(nn.Module):
    """The two best of three experts, weighed by a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(4, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 5, 2))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = torch.softmax(self.scores(x), -1).topk(2)
        hidden = F.gelu(torch.einsum("bi,bkio->bko", x, self.up[chosen]))
        return (weights.unsqueeze(-1) * torch.einsum("bko,bkoj->bkj", hidden, self.down[chosen])).sum(1)


@pytest.mark.parametrize("router", ["constant", "product"])
def test_routers(router: Any) -> None:
    composite = composites.with_router(composites.attnlrp(), router)
    assert_differentiable(Explanation(Mixture(), composite, relevance_for(1)), torch.randn(3, 4))


class Rotated(nn.Module):
    """Learned positions, rotary queries and keys: what PA-LRP keeps shares of."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.maps = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 12)
        self.head = nn.Linear(4, 2)
        angles = torch.arange(5).unsqueeze(-1) * torch.tensor([1.0, 0.1, 1.0, 0.1])
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotate(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * self.cos + torch.cat([-right, left], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.maps(x + self.positions).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(self.rotate(query), self.rotate(key), value)[:, 0, -1])


@pytest.mark.parametrize("composite", ["pa_lrp", "attnlrp"])
def test_positions(composite: str) -> None:
    assert_differentiable(Explanation(Rotated(), composite, relevance_for(1)), torch.randn(2, 5, 4))


class Chooses(nn.Module):
    """torch.cond between a normalising and a gated branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.gated, self.head = (
            nn.Linear(3, 4),
            nn.LayerNorm(4),
            nn.Linear(4, 4),
            nn.Linear(4, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = torch.cond(x.sum() > 0, lambda h: self.norm(h), lambda h: F.silu(self.gated(h)), (hidden,))
        return self.head(hidden)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("sign", [1, -1])
def test_branches(sign: int) -> None:
    assert_differentiable(Explanation(Chooses(), "attnlrp", relevance_for(1)), sign * torch.rand(2, 3))


@pytest.mark.parametrize("name", ["epsilon", "epsilon_plus", "dynamiclrp", "input_x_gradient"])
def test_sinks(name: str) -> None:
    """What leaves the graph is a function of parameters like what stays."""

    def sunk(tape: Any, create_graph: bool) -> dict[str, Tensor]:
        found = tape.sinks(1, create_graph=create_graph)
        return {f"{op} {kind}": value for op, kinds in found.items() for kind, value in kinds.items()}

    assert_differentiable(Explanation(images(), name, sunk), torch.randn(2, 2, 4, 4))


def test_a_bias_of_zero_has_a_derivative() -> None:
    """Its share b c is zero, but grows with b; likewise of a weight of zero."""
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.bias)
    assert_differentiable(
        Explanation(model, "epsilon", lambda tape, on: tape.parameters(0, create_graph=on)), torch.randn(2, 3)
    )


class Padded(nn.Module):
    """Open-coded attention that adds -inf to the scores of the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.maps(x).chunk(3, -1)
        scores = query @ key.transpose(-2, -1) + torch.tensor([0.0, 0.0, -torch.inf])
        return (torch.softmax(scores, -1) @ value).sum(1)


def test_masked_scores() -> None:
    """-inf times a coefficient of zero has a derivative of zero, not NaN; in sinks too."""
    model, x = Padded(), torch.randn(2, 3, 4)
    assert_all_differentiable(model, ("attnlrp", "input_x_gradient", "deep_lift"), x)

    def sunk(tape: Any, create_graph: bool) -> Tensor:
        kinds = tape.sinks(1, create_graph=create_graph).values()
        return torch.stack([value.sum() for found in kinds for value in found.values()])

    for composite in ("attnlrp", "input_x_gradient"):
        assert_differentiable(Explanation(model, composite, sunk), x)
