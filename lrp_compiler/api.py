"""compile_for_lrp: the one function most users call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lrp_compiler.interop.zennit import is_zennit_composite, translate
from lrp_compiler.module import LRPModule
from lrp_compiler.options import parse_options
from lrp_compiler.passes.errors import CompositeError, NotAModelError
from lrp_compiler.passes.rules.base import Composite
from lrp_compiler.registry import REGISTRY


def compile_for_lrp(model: nn.Module, composite: str | Composite | Any = "auto", **options: Any) -> LRPModule:
    """Wrap ``model`` in a drop-in module that explains its outputs by Layer-wise Relevance Propagation.

    ``composite`` is a name of ``composites.COMPOSITES``, a Composite, or "auto", which picks by what the graph
    contains; a zennit Composite is translated for this model. A compiled module may stand for its model: the two then
    share what was traced, so that comparing composites traces each call once. Options: ``output`` (name of the output
    to explain), ``rules`` ({op: rule function or Rule}), ``verify`` ("off" or "ledger"), ``reference`` (run the slow
    relevance-space interpreter), ``dynamic`` (False to trace every distinct shape for itself), ``backend`` ("auto",
    "eager", "inductor" or "triton": what runs the code), ``cuda_graphs`` (True to replay calls on CUDA as one),
    ``relevance_dtype`` (torch.bfloat16, or "high" for float32 and wider: what relevance is computed in),
    ``prepare_weights`` (True to keep what weights alone decide from call to call: faster, for a copy or two of each).

    Nothing is traced before the first call. Raises NotAModelError, UnknownCompositeError,
    CompositeError, UnknownOptionError, OptionValueError.
    """
    if not isinstance(model, nn.Module):
        raise NotAModelError(kind=f"an object of type {type(model).__name__}", cause="it is not a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise NotAModelError(kind="a TorchScript module", cause="its python code is gone; compile the original")
    captures = model.compiler.captures if isinstance(model, LRPModule) else None
    if isinstance(model, LRPModule):
        model = model.original
    chosen = translate(composite, model) if is_zennit_composite(composite) else composite
    if not isinstance(chosen, (str, Composite)):
        raise CompositeError(composite=repr(composite), cause="not a name, a Composite or a zennit Composite")
    parsed = parse_options(options)
    rules = {**REGISTRY.snapshot(), **parsed.rules}
    return LRPModule(model, chosen, replace(parsed, rules=rules), captures)
