"""Transposes of Fourier transforms: adjoints, as R = Re(conj(c) a) asks for, and their real part towards reals."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def multiplicity(spectrum: Tensor, dim: int, size: int) -> Tensor:
    """How many of ``size`` frequencies each bin of a one-sided spectrum stands for: 1 at both ends, else 2."""
    bins = torch.arange(spectrum.shape[dim], device=spectrum.device)
    counts = 1 + ((bins > 0) & (2 * bins != size)).to(spectrum.real.dtype)
    return counts.view([-1 if axis == dim % spectrum.dim() else 1 for axis in range(spectrum.dim())])


def real_to_complex_transpose(c: Tensor, dims: list[int], normalisation: int, onesided: bool, size: int) -> Tensor:
    """The transpose of ``_fft_r2c``: complex ``c`` of the spectrum -> real c of the signal, ``size`` along dims[-1].

    The inverse transform counts the bins of a one-sided spectrum as often as they stand for; ``c`` is asked once.
    """
    if not onesided:
        full: Tensor = aten._fft_c2c.default(c, dims, normalisation, False)
        return full.real
    given: Tensor = aten._fft_c2r.default(c / multiplicity(c, dims[-1], size), dims, normalisation, size)
    return given


def complex_to_real_transpose(c: Tensor, dims: list[int], normalisation: int) -> Tensor:
    """The transpose of ``_fft_c2r``: real ``c`` of the signal -> complex c of the one-sided spectrum."""
    spectrum: Tensor = aten._fft_r2c.default(c, dims, normalisation, True)
    return spectrum * multiplicity(spectrum, dims[-1], c.shape[dims[-1]])
