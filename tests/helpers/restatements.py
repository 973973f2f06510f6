"""Independent restatements of the dialect in float64, one table; they share no code with the product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from restated_attention import RESTATED_ATTENTION
from restated_norms import RESTATED_NORMS

RESTATED: dict[str, Callable[..., Any]] = {**RESTATED_NORMS, **RESTATED_ATTENTION}
"""Op of the dialect -> its formula, written down as plainly as can be; takes and gives float64 tensors."""
