"""Explain two digit classifiers: heat maps in demo/digits.png and a table that compares composites.

In a ReLU network "epsilon 0" is input times gradient, so their rows must agree; a real epsilon differs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from lrp_compiler import Composite, Ledger, compile_for_lrp, composites

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH=1 leaves a script's own folder out

from digit_models import Digits, accuracy, load_data, progress_bars, trained_models
from perturbation import abpc

COMPOSITES: dict[str, dict[str, Composite]] = {
    "CNN": {"epsilon 0": composites.epsilon(), "epsilon 0.25": composites.epsilon(0.25)},
    "ViT": {"attnlrp": composites.attnlrp(), "cp_lrp": composites.cp_lrp()},
}
SHOWN_DIGITS = (0, 2, 3, 5, 8)
HEAT = "RdBu_r"
CAPTION = """logit: mean explained logit; gap: |logit - pixels - sinks| / logit
in pixels: their share of the logit, the rest is in sinks such as biases
ABPC: area between pixel removal curves, ± standard error, higher is better"""


@dataclass(frozen=True)
class Explanation:
    """Relevance of held-out images for their predicted classes, (images, 1, 8, 8), and its ledger if any."""

    relevance: Tensor
    ledger: Ledger | None = None


@dataclass(frozen=True)
class Explained:
    """A trained model, its held-out probabilities (images, classes), and its explanations by method."""

    name: str
    model: nn.Module
    probabilities: Tensor
    explanations: dict[str, Explanation]

    @property
    def heat_maps(self) -> dict[str, Tensor]:
        """The relevance of the composites under study, without the baselines."""
        return {name: self.explanations[name].relevance for name in COMPOSITES[self.name]}


def explain(model: nn.Module, composite: Composite, inputs: Tensor, classes: Tensor) -> Explanation:
    """Relevance of ``inputs`` (images, 1, 8, 8) for ``classes`` (images,), with its ledger."""
    with torch.no_grad():
        _, tape = compile_for_lrp(model, composite).run(inputs)
    return Explanation(tape.relevance(classes, at="input"), tape.ledger(classes))


def explain_model(name: str, model: nn.Module, inputs: Tensor, progress: Progress) -> Explained:
    """Explain ``model`` with its two composites and two baselines: input times gradient and a random map."""
    with torch.no_grad():
        probabilities = model(inputs).softmax(1)
    methods = {**COMPOSITES[name], "input x grad": composites.input_x_gradient()}
    explanations = {
        method: explain(model, composite, inputs, probabilities.argmax(1))
        for method, composite in progress.track(methods.items(), description=f"explaining {name}")
    }
    torch.manual_seed(0)
    explanations["random order"] = Explanation(torch.rand_like(inputs))
    return Explained(name, model, probabilities, explanations)


def ledger_cells(ledger: Ledger | None, images: int) -> tuple[str, str, str]:
    """The mean explained logit; relative to it, the gap of logit = pixels + sinks and the pixels' share."""
    if ledger is None:
        return "-", "-", "-"
    gap, share = abs(ledger.gap / ledger.seed), ledger.inputs / ledger.seed
    return f"{ledger.seed / images:.2f}", f"{gap:.0e}", f"{share:.1%}"


def results_table(found: list[Explained], data: Digits, progress: Progress) -> Table:
    """Accuracy, conservation and ABPC (mean and standard error over held-out images) by model and method."""
    images = len(data.test_labels)
    table = Table(title=f"{images} held-out digits, explained for the predicted class", caption=CAPTION)
    for heading in ("model", "method"):
        table.add_column(heading)
    for heading in ("accuracy", "logit", "gap", "in pixels", "ABPC"):
        table.add_column(heading, justify="right", no_wrap=True)
    for explained in found:
        correct = f"{accuracy(explained.model, data):.1%}"
        rows = progress.track(explained.explanations.items(), description=f"removing pixels, {explained.name}")
        for method, one in rows:
            areas = abpc(explained.model, data.test_inputs, one.relevance, torch.zeros_like(data.mean))
            score = f"{areas.mean():+.3f} ± {areas.std() / images**0.5:.3f}"
            table.add_row(explained.name, method, correct, *ledger_cells(one.ledger, images), score)
        table.add_section()
    return table


def shown_images(explained: Explained, labels: Tensor) -> list[int]:
    """The first held-out image of a few digits, then the one this model is least sure of."""
    first = [int((labels == digit).nonzero()[0]) for digit in SHOWN_DIGITS]
    return [*first, int(explained.probabilities.max(1).values.argmin())]


def draw_image(axes: Axes, image: Tensor, heat: bool) -> None:
    """An (8, 8) image: ink on paper, or relevance on a red-blue scale symmetric about zero."""
    limit = image.abs().max().item()
    scale = {"cmap": HEAT, "vmin": -limit, "vmax": limit} if heat else {"cmap": "gray_r", "vmin": 0, "vmax": 1}
    axes.imshow(image.numpy(), **scale)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_model(panel: SubFigure, explained: Explained, data: Digits) -> None:
    """One row per image: the digit with its prediction, then a heat map per composite."""
    panel.suptitle(f"{explained.name}, {accuracy(explained.model, data):.1%} test accuracy", fontweight="bold")
    chosen = shown_images(explained, data.test_labels)
    maps = {"input": data.test_pixels, **explained.heat_maps}
    grid = panel.subplots(len(chosen), len(maps), squeeze=False)
    for axes, name in zip(grid[0], maps, strict=True):
        axes.set_title(name)
    for row, index in zip(grid, chosen, strict=True):
        for axes, (name, images) in zip(row, maps.items(), strict=True):
            draw_image(axes, images[index, 0], heat=name != "input")
        probability, predicted = explained.probabilities[index].max(0)
        truth = data.test_labels[index]
        note = "least certain:\n" if index == chosen[-1] else ""
        label = f"{note}predicted {predicted} ({probability:.0%})\ntrue {truth}"
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", color="k" if predicted == truth else "crimson")


def draw_figure(found: list[Explained], data: Digits, path: Path) -> None:
    """Both models side by side over one legend, written to ``path``."""
    figure = Figure(figsize=(13, 12.2), layout="constrained")
    (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[1, 0.08])
    figure.suptitle("Which pixels speak for the predicted digit?", fontsize=17)
    panels = top.subfigures(1, len(found), squeeze=False, wspace=0.04)[0]
    for panel, explained in zip(panels, found, strict=True):
        draw_model(panel, explained, data)
    bar = bottom.colorbar(
        ScalarMappable(Normalize(-1, 1), HEAT),
        cax=bottom.add_axes((0.3, 0.62, 0.4, 0.22)),
        orientation="horizontal",
        ticks=[-1, 0, 1],
    )
    bar.set_ticklabels(["against (-max)", "none", "for (+max)"])
    bar.set_label("relevance of a pixel for the logit of the predicted class; every map has its own maximum")
    figure.savefig(path, dpi=130)


def run(folder: Path, console: Console) -> Path:
    """Train, explain, print the table, draw the figure; returns its path in ``folder``."""
    data = load_data()
    models = trained_models(data, console)
    with progress_bars(console) as progress:
        found = [explain_model(name, model, data.test_inputs, progress) for name, model in models.items()]
        table = results_table(found, data, progress)
    console.print(table)
    path = folder / "digits.png"
    draw_figure(found, data, path)
    return path


def main() -> None:
    """Write demo/digits.png."""
    folder = Path("demo")
    folder.mkdir(exist_ok=True)
    print(f"wrote {run(folder, Console())}")


if __name__ == "__main__":
    main()
