"""The published engine of DynamicLRP (arXiv 2512.07010), from a checkout: it is not packaged.

Written for commit 0535f39 of github.com/keeinlev/dynamicLRP, whose README says how to call it; a checkout that looks
different is refused. Parameters keep asking for gradients, as in its README: without them its graph has no weights.
The input is marked by its identity op create_checkpoint: for a leaf with several readers it returns unfinished objects.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from functools import partial
from pathlib import Path
from typing import Any

from providers.base import Prepared, Provider, Setting, everywhere, of_input_alone, on_convolutional, seed
from torch import Tensor

NEEDED = ("starting_relevance", "use_gamma")
DEPTH = 100_000
"""Its walk over the graph recurses once a node."""


def library_of(checkout: Path) -> Any:
    """The package lrp_engine of a checkout; raises ValueError where it is not the one that this was written for."""
    source = checkout / "src"
    if not (source / "lrp_engine" / "lrp.py").is_file():
        raise ValueError(f"{checkout} is no checkout of DynamicLRP: it has no src/lrp_engine/lrp.py")
    sys.path.append(str(source))
    library = importlib.import_module("lrp_engine")
    missing = [name for name in ("LRPEngine", "create_checkpoint") if not hasattr(library, name)]
    if not missing:
        missing = sorted(set(NEEDED) - set(inspect.signature(library.LRPEngine).parameters))
    if missing:
        raise ValueError(f"lrp_engine of {checkout} is another version: it has no {', '.join(missing)}")
    return library


def relevance_in(result: Any, x: Tensor) -> Tensor:
    """The input's relevance in what ``run`` returned; raises RuntimeError for the errors that it returns instead."""
    if not isinstance(result, tuple) or len(result) != 2 or not result[0]:
        causes = [str(part) for part in (result if isinstance(result, tuple) else ()) if isinstance(part, Exception)]
        raise RuntimeError(f"the engine stopped: {'; '.join(causes) or 'no relevance at the input'}")
    found = result[0][0]
    if not isinstance(found, Tensor) or found.shape != x.shape:
        raise RuntimeError(f"the engine returned {type(found).__name__} where the input's relevance should be")
    return found.detach()


def published(options: dict[str, Any], setting: Setting) -> Prepared:
    """One engine, kept between calls, which is how it is fast."""
    assert setting.dynamic_lrp is not None
    sys.setrecursionlimit(DEPTH)
    work, library = setting.work, library_of(setting.dynamic_lrp)
    work.model.requires_grad_(True)
    engine = library.LRPEngine(**options)

    def call() -> Tensor:
        output = work.model(library.create_checkpoint(work.x.clone().requires_grad_()))
        engine.starting_relevance = seed(work, output)
        return relevance_in(engine.run(output), work.x)

    return of_input_alone(work, call)


PROVIDERS = (
    Provider("DynamicLRP", everywhere, partial(published, {}), packages=("einops",), needs_checkout=True),
    Provider(
        "DynamicLRP, gamma",
        on_convolutional,
        partial(published, {"use_gamma": True}),
        packages=("einops",),
        needs_checkout=True,
    ),
)
