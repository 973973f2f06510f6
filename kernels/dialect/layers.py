"""What ops of linear layers share: which shapes fit together, and the layers that samples and workloads are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrp_compiler.kernels.spec import Refusal, Supported


@dataclass(frozen=True)
class Layer:
    """A linear layer of a real model, and the leading dimensions of what it is given."""

    model: str
    leading: tuple[int, ...]
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.leading))} {self.inputs}->{self.outputs} ({self.model})"


LAYERS = (
    Layer("ViT-B/16", (8, 197), 768, 3072),
    Layer("Llama 8B", (2048,), 4096, 14336),
    Layer("BERT", (8, 512), 768, 768),
)


def fits_linear(out: Tensor, x: Tensor, weight: Tensor) -> Supported:
    """Whether ``out`` (..., N), ``x`` (..., K) and ``weight`` (N, K) fit together."""
    if weight.dim() != 2 or 0 in (out.dim(), x.dim()):
        return Refusal(f"a linear map has a matrix, not a weight of shape {tuple(weight.shape)}")
    fits = x.shape[-1] == weight.shape[1] and out.shape == (*x.shape[:-1], weight.shape[0])
    shapes = ", ".join(str(tuple(value.shape)) for value in (out, x, weight))
    return fits or Refusal(f"output, input and weight of shapes {shapes} do not fit together")


def linear_operands(
    dtype: torch.dtype, device: torch.device, leading: tuple[int, ...], inputs: int, outputs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c, x, weight, bias) of a layer, its terms of similar size.

    A few large terms leave an output with next to none of one sign, and then all error is what that one divides by.
    """
    c = torch.randn(*leading, outputs, device=device)
    x, weight = _similar((*leading, inputs), device), _similar((outputs, inputs), device) / max(inputs, 1) ** 0.5
    bias = torch.randn(outputs, device=device) / 4
    return c.to(dtype), x.to(dtype), weight.to(dtype), bias.to(dtype)


def _similar(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers of either sign between 1/2 and 3/2 in size."""
    return (torch.rand(shape, device=device) + 0.5) * (torch.randint(2, shape, device=device) * 2 - 1)


def columns_first(value: Tensor) -> Tensor:
    """A matrix with the strides of its transpose; a vector as it is."""
    return value.t().contiguous().t() if value.dim() == 2 else value
