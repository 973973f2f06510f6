"""gated_mlp_bwd: coefficients through f(gate) * up with f(x) = x g(x): the half rule, and the identity rule for f."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lrp_compiler.kernels import gates
from lrp_compiler.kernels.spec import (
    KernelSpec,
    Refusal,
    Sample,
    Supported,
    all_supported,
    contiguous_like,
    known_dtypes,
    same_device,
)
from lrp_compiler.kernels.strides import walkable

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": gates.silu,
    "gelu": gates.gelu,
    "gelu_tanh": gates.gelu_tanh,
    "quick_gelu": lambda x: gates.silu(1.702 * x),
    "relu": gates.relu,
    "identity": torch.ones_like,
}
"""Activation -> its gate function g, f(x) = x g(x) (kernels/gates.py)."""


def gated_mlp_bwd(c: Tensor, gate: Tensor, up: Tensor, activation: str, share: float) -> tuple[Tensor, Tensor]:
    """(c_gate, c_up) = share c (up g(gate), gate g(gate)) for h = f(gate) up with f(x) = x g(x); no division.

    ``c``, ``gate`` and ``up`` of one shape and dtype, both results contiguous. ``share`` is 1/2 by the half rule.
    Raises KeyError for an activation that is not in ``ACTIVATIONS``. Achtibat et al. 2024, proposition 3.3; Arras et
    al. 2017.
    """
    given = c * share
    open_share = ACTIVATIONS[activation](gate)
    return (given * up * open_share).contiguous(), (given * (gate * open_share)).contiguous()


def _fake(c: Tensor, gate: Tensor, up: Tensor, activation: str, share: float) -> tuple[Tensor, Tensor]:
    return contiguous_like(c), contiguous_like(c)


def _supports(c: Tensor, gate: Tensor, up: Tensor, activation: str, share: float) -> Supported:
    given = (c, gate, up)
    one_shape = c.shape == gate.shape == up.shape
    refused = all_supported(
        (
            same_device(*given),
            known_dtypes(*given),
            activation in ACTIVATIONS or Refusal(f"no gate function of {activation!r} (of {', '.join(ACTIVATIONS)})"),
            one_shape or Refusal(f"its operands have several shapes: {[tuple(one.shape) for one in given]}"),
        )
    )
    return walkable(c.shape, given) if refused else refused


def _arguments(dtype: torch.dtype, device: torch.device, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    c, gate, up = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    return c, 3 * gate, up


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for activation in ACTIVATIONS:
        yield Sample(f"{activation} 3x5x130", (*_arguments(dtype, device, 3, 5, 130), activation, 0.5))
    c, gate, up = _arguments(dtype, device, 4, 3, 70)
    halves = torch.cat([gate, up], -1).chunk(2, -1)
    yield Sample("gate and up from one product", (c, *halves, "silu", 0.5))
    yield Sample("transposed, share 1", (c.transpose(0, 2), gate.transpose(0, 2), up.transpose(0, 2), "gelu", 1.0))
    yield Sample("other strides each", (c[..., ::2], gate[..., 1::2], up.flip(0)[..., :35].contiguous(), "silu", 0.5))
    yield Sample("one coefficient for all", (c[:1, :1, :1].expand(4, 3, 70), gate, up, "relu", 0.5))
    yield Sample("a number", (c[0, 0, 0], gate[0, 0, 0], up[0, 0, 0], "gelu_tanh", 0.5))
    yield Sample("nothing", (c[:0], gate[:0], up[:0], "silu", 0.5))
    steep = torch.linspace(-80, 80, 70, device=device).to(dtype).expand(4, 3, 70)
    yield Sample("far from zero", (c, steep, up, "silu", 0.5))


def _refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    c, gate, up = _arguments(dtype, device, 2, 3)
    yield Sample("float64", (c.double(), gate.double(), up.double(), "silu", 0.5))
    yield Sample("several dtypes", (c.float(), gate.bfloat16(), up.float(), "silu", 0.5))
    yield Sample("several shapes", (c, gate[:1], up, "silu", 0.5))
    yield Sample("an activation that is not zero at zero", (c, gate, up, "sigmoid", 0.5))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for activation, model, tokens, width in (
        ("silu", "Llama 8B", 2048, 14336),
        ("gelu_tanh", "Gemma 2B", 2048, 16384),
        ("gelu", "T5 1.1 XL", 512, 5120),
    ):
        arguments = _arguments(dtype, device, tokens, width)
        yield Sample(f"{activation} {tokens}x{width} ({model})", (*arguments, activation, 0.5))
    c, gate, up = _arguments(dtype, device, 2048, 8192)
    both = torch.cat([gate, up], -1)
    yield Sample("silu 2048x8192, gate and up from one product (Phi-3)", (c, *both.chunk(2, -1), "silu", 0.5))


def _flops(c: Tensor, *rest: object) -> int:
    return 16 * c.numel()


GATED_MLP_BWD = KernelSpec(
    name="gated_mlp_bwd",
    summary="share c (up g(gate), gate g(gate)): both operands of what a gated MLP hands to its two projections",
    source="Achtibat et al. 2024 (AttnLRP), proposition 3.3; RULES.md 1.2, 1.5",
    reference=gated_mlp_bwd,
    fake=_fake,
    supports=_supports,
    samples=_samples,
    refused=_refused,
    workloads=_workloads,
    flops=_flops,
    bound="memory",
)
