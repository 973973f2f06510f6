"""Sums of relevance and of its magnitude, as the ledger keeps them."""

from __future__ import annotations

import torch

from lrp_compiler.kernels.linear import masked_product


def total_of(edge: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(sum(a c), sum |a c|) in float64, for the ledger."""
    return total(masked_product(widest(edge), widest(value)))


def widest(x: torch.Tensor) -> torch.Tensor:
    """``x`` in double precision, complex or not."""
    return x.to(torch.complex128) if x.is_complex() else x.double()


def total(relevance: torch.Tensor) -> torch.Tensor:
    """(sum(R), sum |R|) in float64."""
    return torch.stack([relevance.double().sum(), relevance.double().abs().sum()])
