"""Ours: every composite as ``attribute``, which gives attributions alone, and as ``run``, which gives outputs too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from providers.base import Prepared, Provider, Setting, everywhere, on_convolutional
from torch import Tensor
from workloads import Entry

from lrp_compiler import LRPModule, compile_for_lrp

WITH_OUTPUTS = ", with outputs"
PREPARED = ", weights prepared"


def compiled(composite: str, setting: Setting, **options: Any) -> LRPModule:
    """The model explained by a composite, relevance in the dtype that was asked for."""
    if setting.relevance_dtype is not torch.float32:
        options["relevance_dtype"] = setting.relevance_dtype
    return compile_for_lrp(setting.work.model, composite, **options)


def unaccounted(module: LRPModule, setting: Setting, relevance: Tensor) -> float:
    """The share of the seed that the ledger, which computes relevance anew, finds neither at inputs nor in sinks."""
    with torch.no_grad():
        _, tape = module.run(setting.work.x)
        ledger = tape.ledger(setting.work.target)
    return abs(ledger.gap) / abs(ledger.seed)


def attributions(composite: str, setting: Setting, **options: Any) -> Prepared:
    """``attribute``."""
    module, work = compiled(composite, setting, **options), setting.work
    call = partial(module.attribute, work.x, work.target)
    return Prepared(call, lambda result: result, partial(unaccounted, module, setting))


def with_outputs(composite: str, setting: Setting) -> Prepared:
    """``run`` and then ``tape.relevance``."""
    module, work = compiled(composite, setting), setting.work

    def call() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            output, tape = module.run(work.x)
            return output, tape.relevance(work.target)

    # The ledger is that of attributions alone, and costs another compilation.
    return Prepared(call, lambda result: result[1])


def on_attention(entry: Entry) -> bool:
    """Applies to models with attention maps to hold constant."""
    return entry.kind == "transformer"


def on_state_spaces(entry: Entry) -> bool:
    """Applies to state-space models."""
    return entry.kind == "state space"


COMPOSITES: tuple[tuple[str, Callable[[Entry], bool]], ...] = (
    ("attnlrp", everywhere),
    ("epsilon", everywhere),
    ("cp_lrp", on_attention),
    ("mamba_lrp", on_state_spaces),
    ("epsilon_gamma_box", on_convolutional),
    ("epsilon_plus", on_convolutional),
)

KEEPING = ("attnlrp", "epsilon_gamma_box", "epsilon_plus")
"""Those also measured with ``prepare_weights``: one of gradients' cost, and those that make other weights of them."""


def name_of(composite: str) -> str:
    """The provider that computes attributions alone."""
    return f"ours, {composite}"


PROVIDERS = (
    *(Provider(name_of(name), applies, partial(attributions, name), own=True) for name, applies in COMPOSITES),
    *(
        Provider(name_of(name) + WITH_OUTPUTS, applies, partial(with_outputs, name), own=True)
        for name, applies in COMPOSITES
    ),
    *(
        Provider(name_of(name) + PREPARED, applies, partial(attributions, name, prepare_weights=True), own=True)
        for name, applies in COMPOSITES
        if name in KEEPING
    ),
    # What autograd gives is what this composite must give; nobody would use it for speed.
    Provider(name_of("input_x_gradient"), everywhere, partial(attributions, "input_x_gradient"), timed=False, own=True),
)
