"""The error of relevance in the dtype it is computed in, against float64 on the user's own input."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrp_compiler.passes.errors import ArgumentError
from lrp_compiler.seeds import Predicted, Target
from lrp_compiler.sites import Names

if TYPE_CHECKING:
    from lrp_compiler.module import LRPModule

REPORT = "lrp_compiler.LRPModule.report"


@dataclass(frozen=True)
class MeasuredError:
    """Norm of the difference from relevance in float64, over the norm of that; over all attributed inputs.

    ``relative`` is that of the dtype asked for, ``own`` that of the same model without ``relevance_dtype``. Both have
    what the forward pass loses in the model's dtype.
    """

    relative: float
    own: float


def measured_error(
    module: LRPModule, args: tuple[Any, ...], kwargs: dict[str, Any], wrt: Names, target: Target
) -> MeasuredError:
    """Run the call once more in the model's own dtype and once on a copy of the model in float64.

    ``target`` None is each sample's largest output. Ops that cast to float32 by name do so in the copy, too. Raises
    ArgumentError for a model that draws random numbers or does not run in float64, and NoValuesError.
    """
    options = replace(module.options, relevance_dtype=None, verify="off")
    if module.compiler.call(module.original, args, dict(sorted(kwargs.items()))).is_random:
        raise _refused("the model draws random numbers, which differ between dtypes; put it into eval mode")
    with torch.no_grad():
        found, seed = _relevances(module, args, kwargs, wrt, Predicted() if target is None else target)
        own, _ = _relevances(module.with_options(options), args, kwargs, wrt, seed)
        try:
            exact = module.with_options(options, copy.deepcopy(module.original).double())
            expected, _ = _relevances(exact, _doubled(args), _doubled(kwargs), wrt, _doubled(seed))
        except RuntimeError as error:
            raise _refused(f"the model does not run in float64 ({str(error).splitlines()[0]})") from error
    size = float(expected.norm())
    return MeasuredError(*(float((one - expected).norm()) / size if size else 0.0 for one in (found, own)))


def _relevances(
    module: LRPModule, args: tuple[Any, ...], kwargs: dict[str, Any], wrt: Names, target: Target
) -> tuple[Tensor, Target]:
    """Relevance of the attributed inputs in one float64 vector, and the target with its choices made."""
    _, tape = module.run(*args, wrt=wrt, **kwargs)
    seeds = tape.questions.seeds(target, None)
    # A seed at the one explained output says the same to every copy; what reads several outputs is asked anew.
    asked: Target = next(iter(seeds.values())) if len(seeds) == 1 else target
    found = tape.relevance(asked)
    parts = list(found.values()) if isinstance(found, dict) else [found]
    return torch.cat([part.double().flatten() for part in parts]), asked


def _doubled(values: Any) -> Any:
    """Float tensors among ``values`` in float64."""
    return pytree.tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, values
    )


def _refused(cause: str) -> ArgumentError:
    return ArgumentError(function=REPORT, name="measure_error", value=True, cause=cause)
