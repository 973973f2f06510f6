"""Captum's LRP with its epsilon rule, where it is right: it refuses norms, and takes the gradient at shortcuts."""

from __future__ import annotations

import importlib

from providers.base import Prepared, Provider, Setting, of_input_alone
from providers.zennit_composites import AGAINST_ZERO
from torch import Tensor, nn
from workloads import Entry

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
    # All that it has the epsilon rule for, and what it has no rule for: a reshaped value hands all on by that one.
    kinds = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten)
    ruled = [layer for layer in work.model.modules() if isinstance(layer, kinds)]
    lrp = captum.LRP(work.model)

    def call() -> Tensor:
        for layer in ruled:
            # A call takes given rules away.
            layer.rule = rules.EpsilonRule(AGAINST_ZERO)
        relevance: Tensor = lrp.attribute(work.x.clone().requires_grad_(), work.target)
        return relevance.detach()

    return of_input_alone(work, call)


def is_a_stack(entry: Entry) -> bool:
    """Applies to networks without shortcuts."""
    return entry.kind == "convolutional" and entry.key != "resnet50"


PROVIDERS = (Provider(EPSILON, is_a_stack, epsilon, packages=("captum",)),)
