"""Where relevance runs: as ATen calls, or with the Triton kernels of the relevance dialect."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import fx

from lrp_compiler.kernels.spec import Refusal, Supported, runs_kernels
from lrp_compiler.passes.errors import OptionValueError
from lrp_compiler.passes.program import value_of

Backend = Literal["auto", "eager", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def takes_kernels(graph: fx.Graph, backend: Backend) -> Supported:
    """Whether the relevance of ``graph`` is to run kernels, or why not.

    "auto" takes them on CUDA. "triton" demands them, and raises OptionValueError where Triton has no device: neither a
    GPU nor its interpreter.
    """
    if backend == "eager":
        return Refusal("backend='eager' keeps ATen ops")
    devices = sorted({value.device.type for node in graph.nodes if (value := _input(node)) is not None})
    if backend == "auto":
        return devices == ["cuda"] or Refusal(f"kernels run on CUDA, and these values are on {' and '.join(devices)}")
    if not all(runs_kernels(torch.device(device)) for device in devices):
        cause = (
            f"Triton has no device here for values on {' and '.join(devices)}: move model and inputs to CUDA, or start"
            " python with TRITON_INTERPRET=1 to run kernels in Triton's interpreter, slowly"
        )
        raise OptionValueError(name="backend", value=backend, cause=cause)
    return True


def _input(node: fx.Node) -> torch.Tensor | None:
    value = value_of(node) if node.op == "placeholder" else None
    return value if isinstance(value, torch.Tensor) else None
