"""Kernels run compiled where there is a GPU, else in Triton's interpreter; memory that nobody wrote holds nan."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
import torch


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Kernels that tests name or define are read as they run: a module's import decides for all of its kernels."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        return (yield)


@pytest.fixture(autouse=True)
def _on_kernels(interpreted: None) -> None:
    """Every test here runs kernels."""


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
