"""Peers that do not import here as they are: stand-ins in ``sys.modules`` for what they ask for but need not have."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import nn

TORCHVISION = {
    "torchvision": (),
    "torchvision.ops": ("FrozenBatchNorm2d",),
    "torchvision.models": (),
    "torchvision.models.resnet": ("Bottleneck", "BasicBlock"),
    "torchvision.models.vgg": ("VGG",),
    "torchvision.models.vision_transformer": ("VisionTransformer", "EncoderBlock"),
}
"""The modules of torchvision, which has no build for this torch, and the classes in them that zennit names."""


@contextlib.contextmanager
def in_place_of(modules: dict[str, ModuleType]) -> Iterator[None]:
    """``modules`` in ``sys.modules`` for the duration."""
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def empty_torchvision() -> dict[str, ModuleType]:
    """torchvision as far as zennit imports it: classes that no model is an instance of."""
    modules = {name: ModuleType(name) for name in TORCHVISION}
    for name, classes in TORCHVISION.items():
        for class_name in classes:
            setattr(modules[name], class_name, type(class_name, (nn.Module,), {}))
    return modules


def lxt_without_models() -> dict[str, ModuleType]:
    """The package ``lxt.efficient`` without its ``__init__``, which imports models of an older transformers."""
    spec = importlib.util.find_spec("lxt")
    assert spec is not None and spec.submodule_search_locations is not None
    package = ModuleType("lxt.efficient")
    package.__path__ = [str(Path(spec.submodule_search_locations[0]) / "efficient")]
    return {"lxt.efficient": package}


def zennit() -> Any:
    """zennit's modules, imported beside the empty torchvision."""
    parts = ("attribution", "canonizers", "composites", "layer", "rules", "types")
    with in_place_of(empty_torchvision()):
        return SimpleNamespace(**{part: importlib.import_module(f"zennit.{part}") for part in parts})


def lxt_efficient() -> Any:
    """``lxt.efficient``'s patches."""
    with in_place_of(lxt_without_models()):
        return importlib.import_module("lxt.efficient.patches")
