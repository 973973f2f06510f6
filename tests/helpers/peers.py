"""The peer libraries our relevances are compared with, imported side by side.

Two of them cannot be imported plainly: zennit imports torchvision, which has no build for this torch, and
``lxt.efficient`` imports patched models of an older transformers. Stand-ins in ``sys.modules`` let the parts
that we need import as they are, and are taken out again.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
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
"""The modules, and the classes in them, that zennit asks torchvision for."""


@contextlib.contextmanager
def _stand_ins(modules: dict[str, ModuleType]) -> Iterator[None]:
    """``modules`` in ``sys.modules`` for the duration."""
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def _empty_torchvision() -> dict[str, ModuleType]:
    """torchvision as far as zennit imports it: classes that no model is an instance of."""
    modules = {name: ModuleType(name) for name in TORCHVISION}
    for name, classes in TORCHVISION.items():
        for class_name in classes:
            setattr(modules[name], class_name, type(class_name, (nn.Module,), {}))
    return modules


def _lxt_without_models() -> dict[str, ModuleType]:
    """The package ``lxt.efficient`` with its path but without running its ``__init__``."""
    (folder,) = importlib.util.find_spec("lxt").submodule_search_locations  # type: ignore[union-attr, misc]
    package = ModuleType("lxt.efficient")
    package.__path__ = [str(Path(folder) / "efficient")]
    return {"lxt.efficient": package}


with _stand_ins(_empty_torchvision()):
    zennit_attribution: Any = importlib.import_module("zennit.attribution")
    zennit_canonizers: Any = importlib.import_module("zennit.canonizers")
    zennit_composites: Any = importlib.import_module("zennit.composites")
    zennit_core: Any = importlib.import_module("zennit.core")
    zennit_layer: Any = importlib.import_module("zennit.layer")
    zennit_rules: Any = importlib.import_module("zennit.rules")
    zennit_types: Any = importlib.import_module("zennit.types")

with _stand_ins(_lxt_without_models()):
    lxt_rules: Any = importlib.import_module("lxt.efficient.rules")
    lxt_patches: Any = importlib.import_module("lxt.efficient.patches")

lxt_functional: Any = importlib.import_module("lxt.explicit.functional")
lxt_explicit_rules: Any = importlib.import_module("lxt.explicit.rules")
captum: Any = importlib.import_module("captum.attr")
