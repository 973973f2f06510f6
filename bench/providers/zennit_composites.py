"""zennit (Anders et al. 2021): its epsilon rule, EpsilonPlus and EpsilonGammaBox on convolutional networks.

Hooks are registered and batch norms folded once, ahead of the calls. Hugging Face's ResNet adds its shortcuts by
``+=``, where zennit has no rule and silently takes the gradient: its blocks are canonised here as zennit canonises
torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from providers.base import Prepared, Provider, Setting, of_input_alone, on_convolutional, seed
from providers.stand_ins import zennit
from torch import Tensor, nn
from transformers.models.resnet.modeling_resnet import ResNetBottleNeckLayer
from workloads import WHITE, Workload

AGAINST_ZERO = 1e-30
"""zennit's stabiliser at sums, averages and in its epsilon rule, so that the rules are ours in the limit.

What it costs does not depend on its value.
"""


def added_by_module(block: Any, hidden: Tensor) -> Tensor:
    """A bottleneck's forward pass with its sum in a module that zennit has a rule for."""
    both = torch.stack([block.layer(hidden), block.shortcut(hidden)], -1)
    total: Tensor = block.activation(block.canonizer_sum(both))
    return total


def shortcut_attributes(make_sum: Callable[[], nn.Module], name: str, module: nn.Module) -> dict[str, Any] | None:
    """What a bottleneck is given so that zennit sees its sum."""
    if not isinstance(module, ResNetBottleNeckLayer):
        return None
    return {"forward": partial(added_by_module, module), "canonizer_sum": make_sum()}


def canonizers(library: Any) -> list[Any]:
    """Batch norms folded into the convolutions before them, shortcuts summed by a module."""
    attributes = partial(shortcut_attributes, library.layer.Sum)
    return [library.canonizers.SequentialMergeBatchNorm(), library.canonizers.AttributeCanonizer(attributes)]


def exact(library: Any) -> list[tuple[Any, Any]]:
    """Sums and averages by their shares."""
    norm = library.rules.Norm(stabilizer=AGAINST_ZERO)
    return [(library.types.AvgPool, norm), (library.layer.Sum, norm)]


def epsilon(library: Any, work: Workload) -> Any:
    """The epsilon rule on every layer with weights."""
    passed = library.rules.Pass()
    layer_map = [
        *exact(library),
        (library.types.Activation, passed),
        (library.types.BatchNorm, passed),
        (library.types.Linear, library.rules.Epsilon(epsilon=AGAINST_ZERO)),
    ]
    return library.composites.LayerMapComposite(layer_map, canonizers=canonizers(library))


def epsilon_plus(library: Any, work: Workload) -> Any:
    """EpsilonPlus."""
    return library.composites.EpsilonPlus(layer_map=exact(library), canonizers=canonizers(library))


def epsilon_gamma_box(library: Any, work: Workload) -> Any:
    """EpsilonGammaBox for the bounds that ours has by default."""
    low, high = torch.full_like(work.x, -WHITE), torch.full_like(work.x, WHITE)
    kwargs = {"layer_map": exact(library), "canonizers": canonizers(library)}
    return library.composites.EpsilonGammaBox(low, high, **kwargs)


def hooked(make: Callable[[Any, Workload], Any], setting: Setting) -> Prepared:
    """zennit's gradient attributor under a composite."""
    library, work = zennit(), setting.work
    attributor = library.attribution.Gradient(work.model, make(library, work), attr_output=partial(seed, work))
    attributor.composite.register(work.model)

    def call() -> Tensor:
        relevance: Tensor = attributor(work.x.clone().requires_grad_())[1]
        return relevance.detach()

    return of_input_alone(work, call)


COMPOSITES = {"epsilon": epsilon, "epsilon_plus": epsilon_plus, "epsilon_gamma_box": epsilon_gamma_box}


def name_of(composite: str) -> str:
    return f"zennit, {composite}"


PROVIDERS = tuple(
    Provider(name_of(composite), on_convolutional, partial(hooked, make), packages=("zennit",))
    for composite, make in COMPOSITES.items()
)
