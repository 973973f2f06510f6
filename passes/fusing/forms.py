"""The table of kernel forms: function that rules emit -> the same function, computed by the dialect's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lrp_compiler.kernels.norm import (
    centred_norm_transpose,
    group_norm_transpose,
    layer_norm_transpose,
    rms_norm_transpose,
)
from lrp_compiler.passes.fusing.norms import centred_norm_form, group_norm_form, layer_norm_form, rms_norm_form
from lrp_compiler.passes.trace import Emission

FORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    layer_norm_transpose: layer_norm_form,
    group_norm_transpose: group_norm_form,
    rms_norm_transpose: rms_norm_form,
    centred_norm_transpose: centred_norm_form,
}
"""A form takes the arguments of its function and gives its results; it raises NotSupportedError."""


def kernel_form(emission: Emission) -> Callable[..., Any] | None:
    """The kernel form of what an emission called, if there is one."""
    return FORMS.get(emission.function)
