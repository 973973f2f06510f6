"""Pairs of parameters: by default so many that each side has met the other's every kind, all in make test-full."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def covering(rows: Iterable[Any], columns: Sequence[Any]) -> list[Any]:
    """All pairs (row, column); those of a row with the first column and with one of the others, in turn, are not slow.

    With at least as many rows as other columns, every column is met.
    """
    found = []
    for place, row in enumerate(rows):
        chosen = (columns[0], columns[1:][place % (len(columns) - 1)])
        found += [pytest.param(row, one, marks=() if one in chosen else pytest.mark.slow) for one in columns]
    return found
