"""Kernel forms of the transposes of norms: the same functions as in kernels/norm.py, computed by norm_bwd."""

from __future__ import annotations

import torch
from torch import Tensor

from lrp_compiler.kernels.dialect.norm import NORM_BWD
from lrp_compiler.kernels.spec import NotSupportedError


def layer_norm_form(c: Tensor, weight: Tensor | None, rstd: Tensor, normalised_dims: int) -> Tensor:
    """As layer_norm_transpose."""
    rows = c.flatten(-normalised_dims).flatten(0, -2)
    gain = None if weight is None else weight.flatten()
    made: Tensor = NORM_BWD(rows, gain, rstd.flatten(), None, True, 0, False)
    return made.view(c.shape)


def group_norm_form(c: Tensor, weight: Tensor | None, rstd: Tensor, groups: int) -> Tensor:
    """As group_norm_transpose: each group of each sample is a row."""
    made: Tensor = NORM_BWD(c.reshape(c.shape[0] * groups, -1), weight, rstd.flatten(), None, True, groups, False)
    return made.view(c.shape)


def rms_norm_form(c: Tensor, scale: Tensor, divides: bool, dtype: torch.dtype) -> Tensor:
    """As rms_norm_transpose, for norms over the last dimension."""
    return centred_norm_form(c, scale, divides, dtype, None)


def centred_norm_form(
    c: Tensor, scale: Tensor, divides: bool, dtype: torch.dtype, dims: tuple[int, ...] | None
) -> Tensor:
    """As centred_norm_transpose, for norms over the last dimension; without ``dims`` no mean is taken."""
    if c.dtype != dtype or scale.shape != (*c.shape[:-1], 1) or dims not in (None, (-1,), (c.dim() - 1,)):
        raise NotSupportedError("the kernel is for norms over the last dimension in one dtype")
    made: Tensor = NORM_BWD(c.reshape(-1, c.shape[-1]), None, scale.flatten(), None, dims is not None, 0, divides)
    return made.view(c.shape)
