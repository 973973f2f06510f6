"""What every test starts from: offline, two threads in all, a fixed seed, reproducible examples in CI."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import catalogue
import pytest
import torch
from hypothesis import settings

QUICK = 3
"""How many cases of a test ``make test`` runs."""

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # Triton decides at its import whether its own functions are for the interpreter.
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton.language")
torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") else 2)


def pytest_configure(config: pytest.Config) -> None:
    """CI draws the same examples every time, elsewhere every run searches anew: longer where slow tests run too."""
    examples = 10 if "not slow" in config.option.markexpr else 60
    settings.register_profile("here", deadline=None, derandomize=bool(os.environ.get("CI")), max_examples=examples)
    settings.load_profile("here")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of each test with many cases a few, evenly spaced, are quick; the others run in CI and with make test-full."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cases in tests.values():
        quick = {round(place * (len(cases) - 1) / (QUICK - 1)) for place in range(QUICK)}
        for place, case in enumerate(cases):
            if len(cases) > QUICK and place not in quick:
                case.add_marker("thorough")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--catalogue", help="write what the tests showed of every rule to this file")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--catalogue")
    if path and exitstatus == pytest.ExitCode.OK:
        Path(path).write_text(catalogue.table(), encoding="utf-8")


@pytest.fixture(scope="session")
def mended_interpreter() -> Iterator[None]:
    """The interpreter rounds bfloat16 as a GPU does, and calls are quicker."""
    with pytest.MonkeyPatch.context() as patch:
        mended = importlib.import_module("interpreter")
        mended.round_to_nearest(patch)
        mended.replace_once(patch)
        yield


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Kernels run on CPU tensors, in Triton's interpreter; on a machine with a GPU they run compiled."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        request.getfixturevalue("mended_interpreter")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)
    yield
