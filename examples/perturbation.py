"""ABPC: how faithful a relevance map is, measured by removing pixels and watching the prediction.

For each image let ``c`` be the class the model predicts for the untouched image and ``p`` the softmax
probability of ``c``. Pixels are removed (set to a fill image, all channels at once) in ``steps`` equal
portions, in two orders:

- most relevant first (MoRF): a good map lets ``p`` fall early;
- least relevant first (LeRF): what speaks against ``c`` goes first, so a good map keeps ``p`` high for long.

Both curves start at the untouched image and end at the fill image. Over the fraction of removed pixels, from
0 to 1, ``ABPC = integral(LeRF - MoRF)`` by the trapezoid rule. It lies in [-1, 1]; higher is better; a random
map has 0 on average.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def removal_curve(model: nn.Module, images: Tensor, order: Tensor, fill: Tensor, steps: int) -> Tensor:
    """Probability of the predicted class while pixels go in ``order``: (images, steps + 1).

    ``images`` is (images, channels, height, width), ``order`` (images, pixels) lists pixel indices, first
    removed first, and ``fill`` (channels, height, width) is what removed pixels become.
    """
    classes = model(images).argmax(1, keepdim=True)
    removed_at = order.argsort(1).view(-1, 1, *images.shape[2:])
    counts = torch.linspace(0, order.shape[1], steps + 1).round()
    curve = [model(torch.where(removed_at < count, fill, images)).softmax(1).gather(1, classes) for count in counts]
    return torch.cat(curve, 1)


def abpc(model: nn.Module, images: Tensor, relevance: Tensor, fill: Tensor, steps: int = 32) -> Tensor:
    """The area between both removal curves, (images,); ``relevance`` has the shape of ``images``."""
    order = relevance.sum(1).flatten(1).argsort(dim=1, stable=True)
    least_first = removal_curve(model, images, order, fill, steps)
    most_first = removal_curve(model, images, order.flip(1), fill, steps)
    return torch.trapezoid(least_first - most_first, dx=1 / steps, dim=1)


def main() -> None:
    """Check the measure where the answer is known: weight times input is exact in a linear model."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 2, bias=False)
    model = nn.Sequential(nn.Flatten(), linear)
    images, fill = torch.randn(500, 1, 8, 8), torch.zeros(1, 8, 8)
    weight = linear.weight.detach()
    contrast = (weight[1] - weight[0]).view(1, 1, 8, 8) * images
    sign = model(images).argmax(1).mul(2).sub(1).view(-1, 1, 1, 1)
    maps = {"exact": sign * contrast, "random": torch.randn_like(images), "exact, negated": -sign * contrast}
    for name, relevance in maps.items():
        print(f"{name:<15} ABPC {abpc(model, images, relevance, fill).mean():+.3f}")


if __name__ == "__main__":
    main()
