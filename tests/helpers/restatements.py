"""Independent restatements of the dialect in float64, one table; they share no code with the product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from restated_convolutions import RESTATED_CONVOLUTIONS
from restated_epsilon import RESTATED_EPSILON
from restated_norms import RESTATED_NORMS
from restated_signsplit import RESTATED_SIGNSPLIT

RESTATED: dict[str, Callable[..., Any]] = {
    **RESTATED_NORMS,
    **RESTATED_SIGNSPLIT,
    **RESTATED_EPSILON,
    **RESTATED_CONVOLUTIONS,
}
"""Op of the dialect -> its formula, written down as plainly as can be; takes and gives float64 tensors."""
