"""Relevance patching (RelP): what replacing activations would do to a metric, without running every replacement.

Activation patching runs the model once per patched site: AP = M(run with a_n := a_n') - M(run). To first order that is
(a_n' - a_n) times a coefficient of the original run; attribution patching takes the gradient, RelP the LRP coefficient
(RULES.md section 6). All sites cost two forward passes and one relevance pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lrp_compiler.kernels.linear import relevance_of
from lrp_compiler.module import LRPModule
from lrp_compiler.passes.errors import ArgumentError, SiteWithoutRelevanceError
from lrp_compiler.seeds import Target
from lrp_compiler.tape import Tape

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]
Direction = Literal["denoise", "noise"]
Reduction = Literal["none", "last"]


def patch_effects(
    explained: LRPModule,
    clean: Inputs,
    corrupted: Inputs,
    metric: Target,
    sites: list[str],
    *,
    direction: Direction = "denoise",
    reduce: Reduction = "last",
) -> dict[str, Tensor]:
    """First-order effect on ``metric`` of patching each site: (a_patch - a_orig) * c_orig.

    ``clean`` and ``corrupted`` are calls of one shape (a tensor, a tuple of arguments or a dict of keywords);
    "denoise" patches clean values into the corrupted run, "noise" the other way. ``metric`` is any target. Per site the
    effect has the activation's shape, or with ``reduce="last"`` is summed over the last dimension (hidden units).
    The composite of ``explained`` decides what the coefficients are: "relp" for RelP, "gradient" for attribution
    patching.
    """
    original, patch = _ordered(clean, corrupted, direction)
    run_original, run_patch = _tape(explained, original, sites), _tape(explained, patch, sites)
    coefficients = run_original.coefficients(metric, at=sites)
    before, after = run_original.activations(sites), run_patch.activations(sites)
    return {site: _effect(after[site] - before[site], c, reduce) for site, c in coefficients.items()}


def patch_edge_effects(
    explained: LRPModule,
    clean: Inputs,
    corrupted: Inputs,
    metric: Target,
    upstream: list[str],
    downstream: list[str],
    *,
    direction: Direction = "denoise",
    reduce: Reduction = "last",
) -> dict[tuple[str, str], Tensor]:
    """First-order effect of patching each edge u -> v: what u's new value does to the metric by way of v alone.

    (a_u' - a_u) times the coefficient that v, with its own coefficient for the metric, sends back to u on paths past no
    other site of ``downstream``. Pairs without such a path are left out. Arguments and results as in ``patch_effects``;
    the work is one relevance pass per downstream site, each compiled at its first use.
    """
    original, patch = _ordered(clean, corrupted, direction)
    sites = list(dict.fromkeys([*upstream, *downstream]))
    run_original, run_patch = _tape(explained, original, sites), _tape(explained, patch, sites)
    coefficients = run_original.coefficients(metric, at=downstream)
    before, after = run_original.activations(upstream), run_patch.activations(upstream)
    effects = {}
    for v, start in coefficients.items():
        others = tuple(other for other in coefficients if other != v)
        for u in (u for u in before if u != v):
            with contextlib.suppress(SiteWithoutRelevanceError):
                c = run_original.coefficients_from({v: start}, u, blocked=tuple(o for o in others if o != u))
                effects[u, v] = _effect(after[u] - before[u], c, reduce)
    return effects


def _effect(difference: Tensor, c: Tensor, reduce: Reduction) -> Tensor:
    """The product, summed over hidden units in float32 or wider if asked."""
    product = relevance_of(c, difference)
    if reduce == "none":
        return product
    return product.sum(-1, dtype=torch.promote_types(product.dtype, torch.float32))


def true_patch_effects(
    model: nn.Module,
    clean: Inputs,
    corrupted: Inputs,
    metric: Callable[[Any], Tensor],
    sites: list[str],
    *,
    direction: Direction = "denoise",
) -> dict[str, Tensor]:
    """Activation patching itself, to check against: per site and position, the metric after minus before.

    One forward pass per position of each site, a submodule whose output is (batch, positions, hidden); ``metric``
    maps the model's output to one number per sample. Results are (batch, positions).
    """
    original, patch = _ordered(clean, corrupted, direction)
    with torch.no_grad():
        base = metric(_call(model, original))
        effects = {}
        for site in sites:
            module = model.get_submodule(site)
            values = _recorded(model, module, patch)
            columns = [
                metric(_patched(model, module, original, values, position)) - base
                for position in range(values.shape[1])
            ]
            effects[site] = torch.stack(columns, 1)
    return effects


def _explained(model: LRPModule) -> LRPModule:
    """``model`` if it explains itself; raises ArgumentError."""
    if not isinstance(model, LRPModule):
        cause = "it is what compile_for_lrp(model) returns"
        raise ArgumentError(function="lrp_compiler.patch_effects", name="explained", value=model, cause=cause)
    return model


def _ordered(clean: Inputs, corrupted: Inputs, direction: str) -> tuple[Inputs, Inputs]:
    """(the run whose metric changes, the run values are taken from)."""
    if direction not in ("denoise", "noise"):
        cause = "it is 'denoise' or 'noise'"
        raise ArgumentError(function="lrp_compiler.patch_effects", name="direction", value=direction, cause=cause)
    return (corrupted, clean) if direction == "denoise" else (clean, corrupted)


def _call(model: nn.Module, inputs: Inputs) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _tape(explained: LRPModule, inputs: Inputs, sites: list[str]) -> Tape:
    args = () if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
    kwargs = inputs if isinstance(inputs, dict) else {}
    with torch.no_grad():
        return _explained(explained).run(*args, at=sites, **kwargs)[1]


def _recorded(model: nn.Module, module: nn.Module, inputs: Inputs) -> Tensor:
    """The output of ``module`` in a run of ``model``."""
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    try:
        _call(model, inputs)
    finally:
        handle.remove()
    return found[-1]


def _patched(model: nn.Module, module: nn.Module, inputs: Inputs, values: Tensor, position: int) -> Any:
    """The output of ``model`` with one position of ``module``'s output replaced."""

    def replace(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, position] = values[:, position]
        return changed

    handle = module.register_forward_hook(replace)
    try:
        return _call(model, inputs)
    finally:
        handle.remove()
