"""Kernels run compiled where there is a GPU, else in Triton's interpreter; memory that nobody wrote holds nan."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, so before any test imports one.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def mended_interpreter() -> Iterator[None]:
    """Where kernels are interpreted, bfloat16 is rounded as on a GPU, and calls are quicker."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            # Imports Triton, which has to come after TRITON_INTERPRET is set.
            mended = importlib.import_module("interpreter")
            mended.round_to_nearest(patch)
            mended.replace_once(patch)
        yield


@pytest.fixture
def device() -> torch.device:
    """Where kernels run in these tests."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty and its like are filled with nan, and with the largest number where they hold integers."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
