"""Random numbers drawn a second time, from the state that the generator had at the first."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


class DrawNotRepeatedError(RuntimeError):
    """A draw began with another state than was noted: other threads used torch's generator in between."""


def generator_state(device: torch.device) -> Tensor:
    """The state of a device's default generator: uint8, 5,056 bytes on CPU, 16 on CUDA."""
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def bytes_of_state(device: torch.device) -> int:
    """How many bytes ``generator_state`` takes, asked of no generator: a device without memory (meta) counts as CPU."""
    return 5056 if device.type in ("cpu", "meta") else 16


def set_generator_state(device: torch.device, state: Tensor) -> None:
    """Give a device's default generator a state that ``generator_state`` found."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def checksum_of_generator(device: torch.device) -> Tensor:
    """A checksum of ``generator_state``, int64 of no dimension on the CPU: what tells that no draw came between."""
    return _checksum(generator_state(device))


def _checksum(state: Tensor) -> Tensor:
    return torch.tensor(zlib.crc32(state.numpy().tobytes()))


def bernoulli_again(
    state: Tensor,
    checksum: Tensor,
    p: float,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """What ``bernoulli`` drew with the generator in ``state``, by a generator of its own, so that none is disturbed.

    ``checksum`` is that of the generator behind the draw; raises DrawNotRepeatedError where it is another one now.
    """
    generator = torch.Generator(device)
    generator.set_state(state)
    drawn = torch.empty_strided(shape, stride, dtype=dtype, device=device).bernoulli_(p, generator=generator)
    if not torch.equal(_checksum(generator.get_state()), checksum):
        raise DrawNotRepeatedError
    return drawn
