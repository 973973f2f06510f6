"""Norms restated by explicit matrices: the LN-rule (CP-LRP, see matrix_form)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from matrix_form import Restatement, Tensors, ratio
from torch import Tensor, nn


def normalised_rows(weight: Tensor, bias: Tensor, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The LN-rule of CP-LRP on rows of x: y = diag(w / std) (I - 11^T / n) x + b with std a constant."""

    def restatement(x: Tensor, relevance: Tensor) -> Tensor:
        size = x.shape[-1]
        centring = torch.eye(size) - torch.ones(size, size) / size
        found = torch.empty_like(x)
        for row in range(x.shape[0]):
            std = torch.sqrt(x[row].var(unbiased=False) + eps)
            weights = torch.diag(weight / std) @ centring
            share = ratio(relevance[row], weights @ x[row] + bias)
            found[row] = x[row] * (weights.T @ share)
        return found

    return restatement


def random_affine(norm: nn.Module) -> nn.Module:
    """The norm with random weight and bias instead of ones and zeros."""
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def layer_norm_restatement(norm: nn.LayerNorm) -> Restatement:
    """``normalised_rows`` over the last dimensions."""
    size = math.prod(norm.normalized_shape)
    weight = torch.ones(size) if norm.weight is None else norm.weight.detach().flatten()
    bias = torch.zeros(size) if norm.bias is None else norm.bias.detach().flatten()
    rows = normalised_rows(weight, bias, norm.eps)

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        (x,) = inputs
        return (rows(x.reshape(-1, size), relevance.reshape(-1, size)).view(x.shape),)

    return restatement
