"""Where code runs: as ATen calls, with the Triton kernels of the relevance dialect, or compiled by inductor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import fx

from lrp_compiler.kernels.spec import Refusal, Supported, runs_kernels
from lrp_compiler.passes.branches import programs_inside
from lrp_compiler.passes.draws import draws_numbers
from lrp_compiler.passes.errors import OptionValueError
from lrp_compiler.passes.program import Program, value_of

Backend = Literal["auto", "eager", "inductor", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)

COMPILED_ON = frozenset({"cpu", "cuda"})
"""The kinds of devices that inductor compiles for here."""


@dataclass(frozen=True)
class Choice:
    """What runs the code of a program, and why; ``cuda_graphs`` says whether its kernels are recorded and replayed."""

    name: Literal["eager", "inductor", "triton"]
    reason: str
    cuda_graphs: bool = False

    @property
    def compiler(self) -> Literal["inductor", "cudagraphs"] | None:
        """The backend of torch.compile that the code goes through."""
        if self.name == "inductor":
            return "inductor"
        return "cudagraphs" if self.cuda_graphs else None


PLAINLY = Choice("eager", "a plain call keeps the model's own bits")


def choose_backend(program: Program, backend: Backend, cuda_graphs: bool = False) -> Choice:
    """What is to run ``program``, and why.

    Code that torch.compile cannot take runs as it would without it. Raises OptionValueError where the option asks for
    a device that is not there.
    """
    kernels = takes_kernels(program.graph, backend)
    devices = _devices(program.graph)
    if cuda_graphs and devices != ["cuda"]:
        cause = f"CUDA graphs replay the kernels of a GPU, and these values are on {_listed(devices)}"
        raise OptionValueError(name="cuda_graphs", value=True, cause=cause)
    name: Literal["eager", "triton"] = "triton" if kernels else "eager"
    obstacle = _obstacle(program, devices) if backend == "inductor" or cuda_graphs else None
    if backend == "inductor":
        if obstacle is None:
            return Choice("inductor", "asked for", cuda_graphs)
        return Choice(name, f"inductor was asked for, but {obstacle}")
    reason = _reason(backend, kernels, devices)
    return Choice(name, f"{reason}; no CUDA graphs: {obstacle}" if obstacle else reason, cuda_graphs and not obstacle)


def takes_kernels(graph: fx.Graph, backend: Backend) -> Supported:
    """Whether the relevance of ``graph`` is to run kernels, or why not.

    "auto" and "inductor" take them on CUDA. "triton" demands them, and raises OptionValueError where Triton has no
    device: neither a GPU nor its interpreter.
    """
    if backend == "eager":
        return Refusal("backend='eager' keeps ATen ops")
    devices = _devices(graph)
    if backend != "triton":
        return devices == ["cuda"] or Refusal(f"kernels run on CUDA, and these values are on {_listed(devices)}")
    if not all(runs_kernels(torch.device(device)) for device in devices):
        cause = (
            f"Triton has no device here for values on {_listed(devices)}: move model and inputs to CUDA, or start"
            " python with TRITON_INTERPRET=1 to run kernels in Triton's interpreter, slowly"
        )
        raise OptionValueError(name="backend", value=backend, cause=cause)
    return True


def _reason(backend: Backend, kernels: Supported, devices: list[str]) -> str:
    if backend != "auto":
        return "asked for"
    where = f"auto: values are on {_listed(devices)}"
    # Inductor rounds otherwise than the model, and compiles for longer than most calls take.
    return where if kernels else f"{where}, where backend='inductor' has to be asked for"


def _obstacle(program: Program, devices: list[str]) -> str | None:
    """Why torch.compile is not given ``program``; None where it is."""
    if not COMPILED_ON.issuperset(devices):
        return f"these values are on {_listed(devices)}"
    if any(True for _ in programs_inside(program)):
        return "torch.cond chooses code at every call"
    if draws_numbers(program):
        return "the random numbers of the forward pass are to be those of the model"
    return None


def _devices(graph: fx.Graph) -> list[str]:
    """The kinds of devices that the inputs of ``graph`` are on."""
    return sorted({value.device.type for node in graph.nodes if (value := _input(node)) is not None})


def _listed(devices: list[str]) -> str:
    return " and ".join(devices)


def _input(node: fx.Node) -> torch.Tensor | None:
    value = value_of(node) if node.op == "placeholder" else None
    return value if isinstance(value, torch.Tensor) else None
