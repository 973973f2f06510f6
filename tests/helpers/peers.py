"""The peer libraries our relevances are compared with, imported side by side.

Two of them cannot be imported plainly: zennit imports torchvision, which has no build for this torch, and
``lxt.efficient`` imports patched models of an older transformers. The stand-ins in ``sys.modules`` that benchmarks
use too let the parts that we need import as they are, and are taken out again.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

_SPEC = importlib.util.spec_from_file_location(
    "stand_ins", Path(__file__).resolve().parents[2] / "bench/providers/stand_ins.py"
)
assert _SPEC is not None and _SPEC.loader is not None
_stand_ins: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_stand_ins)

with _stand_ins.in_place_of(_stand_ins.empty_torchvision()):
    zennit_attribution: Any = importlib.import_module("zennit.attribution")
    zennit_canonizers: Any = importlib.import_module("zennit.canonizers")
    zennit_composites: Any = importlib.import_module("zennit.composites")
    zennit_core: Any = importlib.import_module("zennit.core")
    zennit_layer: Any = importlib.import_module("zennit.layer")
    zennit_rules: Any = importlib.import_module("zennit.rules")
    zennit_types: Any = importlib.import_module("zennit.types")

with _stand_ins.in_place_of(_stand_ins.lxt_without_models()):
    lxt_rules: Any = importlib.import_module("lxt.efficient.rules")
    lxt_patches: Any = importlib.import_module("lxt.efficient.patches")

lxt_functional: Any = importlib.import_module("lxt.explicit.functional")
lxt_explicit_rules: Any = importlib.import_module("lxt.explicit.rules")
captum: Any = importlib.import_module("captum.attr")
