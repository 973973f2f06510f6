"""Train a digit classifier not to look at an artefact, by penalising the relevance it gives to it.

A corner of every training image spells out its label in bright pixels. A network that is trained as ever reads the
corner, and fails where that is blank or wrong. With the corner's relevance added to the loss (Ross et al. 2017, LRP in
place of the gradient) it learns the digits instead, from the same images.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH=1 leaves a script's own folder out

from digit_models import BATCH, CLASSES, SIDE, Digits, load_data

CORNER = 2
BRIGHTNESS = 3.0
COMPOSITE = "epsilon_plus"
STRENGTH = 100.0
EPOCHS = 15


def marked(pixels: Tensor, labels: Tensor) -> Tensor:
    """The images with the binary digits of ``labels`` (images,) in the four pixels of the first corner."""
    bits = (labels.unsqueeze(1) >> torch.arange(CORNER * CORNER)) & 1
    pixels = pixels.clone()
    pixels[:, 0, :CORNER, :CORNER] = BRIGHTNESS * bits.view(-1, CORNER, CORNER)
    return pixels


def network() -> nn.Module:
    """Two convolutions and a dense layer: (batch, 1, 8, 8) to (batch, 10) logits."""
    pooled = SIDE // 2
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * pooled * pooled, CLASSES),
    )


def in_corner(relevance: Tensor) -> Tensor:
    """The part of (images, 1, 8, 8) that lies in the corner, (images, 4)."""
    return relevance[:, 0, :CORNER, :CORNER].flatten(1)


def train(inputs: Tensor, labels: Tensor, strength: float) -> nn.Module:
    """A network trained on ``inputs`` (images, 1, 8, 8); relevance in the corner weighs ``strength`` in its loss."""
    torch.manual_seed(0)
    model = network()
    explained = compile_for_lrp(model, COMPOSITE)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    steps = len(labels) // BATCH
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels))[: steps * BATCH].split(BATCH):
            logits, tape = explained.run(inputs[batch])
            loss = F.cross_entropy(logits, labels[batch])
            if strength:
                # Of any class: what speaks against one speaks for the others.
                relevance = tape.relevance(torch.randint(CLASSES, (len(batch),)), create_graph=True)
                loss = loss + strength * in_corner(relevance).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """The share of images that ``model`` classifies correctly."""
    return (model(inputs).argmax(1) == labels).double().mean().item()


def corner_share(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """How much of |relevance| for the right class lies in the corner, a sixteenth of the image."""
    relevance = compile_for_lrp(model, COMPOSITE).attribute(inputs, labels).abs()
    return (in_corner(relevance).sum() / relevance.sum()).item()


def results(data: Digits) -> dict[str, tuple[float, float, float, float]]:
    """By kind of training: accuracy by what the corner says (label, nothing, another), relevance in it."""
    given = marked(data.train_pixels, data.train_labels)
    mean, labels = given.mean(0), data.test_labels
    blank = data.test_pixels.clone()
    blank[:, 0, :CORNER, :CORNER] = 0
    spelled = marked(data.test_pixels, labels)
    others = (labels + torch.arange(len(labels)) % (CLASSES - 1) + 1) % CLASSES
    misleading = marked(data.test_pixels, others)
    runs = {
        "as ever": (given, 0.0),
        "with a penalty": (given, STRENGTH),
        "on clean images": (data.train_pixels, 0.0),
    }
    found = {}
    for name, (pixels, strength) in runs.items():
        model = train(pixels - mean, data.train_labels, strength)
        accuracies = [accuracy(model, tests - mean, labels) for tests in (spelled, blank, misleading)]
        found[name] = (*accuracies, corner_share(model, spelled - mean, labels))
    return found


def main() -> None:
    """Train the three networks and print the table.

    On one thread: networks this small gain nothing from more, and the numbers do not depend on that of cores.
    """
    torch.set_num_threads(1)
    table = Table(title="accuracy on held-out digits by their corner", caption=f"relevance by {COMPOSITE}")
    for heading in ("trained", "label", "blank", "wrong label", "|relevance| there"):
        table.add_column(heading, justify="left" if heading == "trained" else "right")
    for name, numbers in results(load_data()).items():
        table.add_row(name, *(f"{number:.1%}" for number in numbers))
    Console().print(table)


if __name__ == "__main__":
    main()
