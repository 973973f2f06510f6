"""Captum's LRP with its epsilon rule, where it is right: it refuses norms, and takes the gradient at shortcuts."""

from __future__ import annotations

import importlib

from providers.base import Prepared, Provider, Setting, of_input_alone
from torch import Tensor, nn
from workloads import Entry

from lrp_compiler.rules import Epsilon

EPSILON = "Captum, epsilon"


def epsilon(setting: Setting) -> Prepared:
    """LRP on a stack of layers."""
    captum = importlib.import_module("captum.attr")
    rules = importlib.import_module("captum.attr._utils.lrp_rules")
    work = setting.work
    for layer in work.model.modules():
        if isinstance(layer, nn.ReLU):
            # Its hooks fail on values that are overwritten.
            layer.inplace = False
    layers = list(work.model.modules())
    # Its own epsilon is another than ours; it has no rule for a reshaped value, which hands all on by its own.
    options = {layer: {"epsilon": Epsilon().epsilon} for layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear))}
    options |= {layer: {} for layer in layers if isinstance(layer, nn.Flatten)}
    lrp = captum.LRP(work.model)

    def call() -> Tensor:
        for layer, given in options.items():
            # A call takes given rules away.
            layer.rule = rules.EpsilonRule(**given)
        relevance: Tensor = lrp.attribute(work.x.clone().requires_grad_(), work.target)
        return relevance.detach()

    return of_input_alone(work, call)


def is_a_stack(entry: Entry) -> bool:
    """Applies to networks without shortcuts."""
    return entry.kind == "convolutional" and entry.key != "resnet50"


PROVIDERS = (Provider(EPSILON, is_a_stack, epsilon, packages=("captum",)),)
