"""The random numbers of one forward pass, which later passes over the same inputs draw again."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lrp_compiler.kernels.randomness import DrawNotRepeatedError, generator_state, set_generator_state
from lrp_compiler.passes.errors import RandomNumbersError

DRAWING = threading.RLock()
"""Held while a forward pass draws: the default generators belong to all threads."""

States = dict[torch.device, Tensor]


class RandomNumbers:
    """States of the default generators of some devices, in front of a forward pass and behind it."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = tuple(dict.fromkeys(devices))
        self._before: States = {}
        self._behind: States = {}

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """A context for the forward pass, which draws while no other one does."""
        with DRAWING:
            self._before = self._states()
            yield
            self._behind = self._states()

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """A context that draws the same numbers and leaves the generators as they were.

        Raises RandomNumbersError when they end in another state than at first, as other threads drew from them too.
        """
        with DRAWING:
            outer = self._states()
            _set(self._before)
            try:
                yield
                found = self._states()
            finally:
                _set(outer)
        if not all(torch.equal(state, self._behind[device]) for device, state in found.items()):
            raise RandomNumbersError

    def _states(self) -> States:
        return {device: generator_state(device) for device in self._devices}


@contextmanager
def draws_repeated() -> Iterator[None]:
    """A context for code that repeats single draws; raises RandomNumbersError where it cannot."""
    try:
        yield
    except DrawNotRepeatedError:
        raise RandomNumbersError from None


def devices_of(values: Iterable[Any]) -> Iterator[torch.device]:
    """The devices of tensors, and the CPU."""
    yield torch.device("cpu")
    for value in values:
        if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta"):
            yield value.device


def _set(states: States) -> None:
    for device, state in states.items():
        set_generator_state(device, state)
