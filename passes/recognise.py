"""recognise: groups of ops that are one thing are found once and marked; the graph stays as it is.

A Pattern acts as one op to relevance: the last op of its group is marked with what it stands for, since replacing the
ops would change the forward's rounding. A Structure only says what a group is, and hides nothing from the rules. All
are found by ops and dataflow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lrp_compiler.passes.dataflow import Flow
from lrp_compiler.passes.program import Program
from lrp_compiler.passes.recognise_activations import recognise_activations
from lrp_compiler.passes.recognise_attention import recognise_attention
from lrp_compiler.passes.recognise_gates import recognise_gates
from lrp_compiler.passes.recognise_norms import recognise_norms
from lrp_compiler.passes.recognise_pooling import recognise_pooling
from lrp_compiler.passes.recognise_rotary import recognise_rotary
from lrp_compiler.passes.recognise_routing import recognise_routing
from lrp_compiler.passes.recognise_scan import recognise_scans
from lrp_compiler.passes.recognise_state_products import recognise_state_products


@dataclass(frozen=True)
class Recogniser:
    """One search: what it finds, the kinds that it marks, as patterns or as structures."""

    finds: str
    search: Callable[[Flow], None]
    patterns: tuple[str, ...] = ()
    structures: tuple[str, ...] = ()


RECOGNISERS = (
    Recogniser("norms spelled out, and of parameters", recognise_norms, ("rms_norm", "layer_norm"), ("weight_norm",)),
    Recogniser("tanh GELU and c tanh(x / c)", recognise_activations, ("gelu_tanh", "softcap")),
    Recogniser("unrolled linear recurrences", recognise_scans, ("scan", "state_product")),
    Recogniser(
        "chunked state spaces, linear attention", recognise_state_products, ("state_product", "linear_attention")
    ),
    Recogniser("rotations by constant angles", recognise_rotary, structures=("rotary",)),
    Recogniser("what attention is made of", recognise_attention, structures=("position_bias", "grouped_heads")),
    Recogniser("act(gate) times up", recognise_gates, structures=("gated_mlp",)),
    Recogniser("expert outputs times routing weights", recognise_routing, structures=("routing",)),
    Recogniser("means over unmasked tokens", recognise_pooling, structures=("masked_mean",)),
)
"""In the order they run: what is one op to relevance is found before the structures made of such ops."""


def recognise(program: Program) -> Program:
    """The same graph; the last node of each recognised group carries its Pattern or Structure."""
    program = program.fork()
    flow = Flow(program)
    for recogniser in RECOGNISERS:
        recogniser.search(flow)
    return program
