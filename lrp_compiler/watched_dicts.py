"""What tells whether any of many dicts has changed, read from all of them at once.

CPython gives a dict another version at every change (PEP 509) and keeps it, and the number of items, in the object.
Of the 2,000 dicts of a transformer's modules these take longer to ask for, one by one, than all else that a call does
in python: their words are gathered from memory in one call of numpy instead.
"""

from __future__ import annotations

import ctypes
import sys
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from torch._C._dynamo.guards import dict_version

WORD = 8
"""Bytes of a machine word."""

LENGTH, VERSION = 2, 3
"""Which words of a dict, or of an object of a subclass, hold its number of items and its version."""

Dict = dict[Any, Any]


class WatchedDicts:
    """The versions of some dicts and the lengths of others; keeps all of them alive, whose addresses it holds."""

    def __init__(self, versioned: Sequence[Dict], counted: Sequence[Dict]) -> None:
        self._versioned, self._counted = tuple(versioned), tuple(counted)
        self._words = _Words(self._versioned, self._counted) if are_in_known_places() else None

    def read(self) -> bytes:
        """Every version, then every length, 8 bytes each: the same as long as these stay."""
        if self._words is not None:
            return self._words.read()
        return array("Q", (*map(dict_version, self._versioned), *map(len, self._counted))).tobytes()


class _Words:
    """Words of objects that the caller keeps alive, as places in an array that spans them all."""

    def __init__(self, versioned: Sequence[Dict], counted: Sequence[Dict]) -> None:
        addresses = [id(one) + VERSION * WORD for one in versioned] + [id(one) + LENGTH * WORD for one in counted]
        first, last = min(addresses, default=0), max(addresses, default=0)
        span = (ctypes.c_uint64 * ((last - first) // WORD + 1)).from_address(first)
        self._memory: np.ndarray[Any, np.dtype[np.uint64]] = np.ctypeslib.as_array(span)
        self._places = (np.array(addresses, dtype=np.intp) - first) // WORD

    def read(self) -> bytes:
        return self._memory.take(self._places).tobytes()


@cache
def are_in_known_places() -> bool:
    """Whether this interpreter keeps lengths and versions of dicts in the words LENGTH and VERSION."""
    if sys.implementation.name != "cpython":
        return False
    probes: list[Dict] = [{}, {1: 2, 3: 4, 5: 6}, OrderedDict(a=1, b=2)]
    told = array("Q", (*map(dict_version, probes), *map(len, probes))).tobytes()
    return _Words(probes, probes).read() == told
