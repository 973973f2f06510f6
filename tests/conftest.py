"""What every test starts from: offline, two threads, a fixed seed, reproducible examples in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(2)
# CI draws the same examples every time; elsewhere every run searches anew.
settings.register_profile("here", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("here")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)
    yield
