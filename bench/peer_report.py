"""What the comparison with peers writes: a CSV, tables generated from it, and a plot."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import get_type_hints

from harness import markdown, spread, write, write_csv
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from providers.bars import INPUT_X_GRADIENT, PLAIN


@dataclass(frozen=True)
class Measured:
    """One provider on one model, as its worker answered; sizes in bytes, None where nothing could be said."""

    provider: str
    calls: tuple[float, ...]
    first: float
    peak: int | None = None
    resident: int | None = None
    conservation: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of the CSV: times in milliseconds, memory in MB above the loaded model, ratios within one run."""

    device: str
    model: str
    batch: int
    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    x_forward: float
    x_input_x_gradient: float
    peak_mb: float | None
    peak_x_input_x_gradient: float | None
    resident_mb: float | None
    first_call_ms: float
    conservation: float | None
    calls: int


def rows_of(device: str, model: str, batch: int, run: Sequence[Measured]) -> list[Row]:
    """The lines of providers that took turns; both bars must be among them, and ratios are to their medians."""
    medians = {measured.provider: spread(measured.calls)[0] for measured in run}
    peaks = {measured.provider: measured.peak for measured in run}
    bar = peaks[INPUT_X_GRADIENT]
    rows = []
    for measured in run:
        ratios = [medians[measured.provider] / medians[name] for name in (PLAIN, INPUT_X_GRADIENT)]
        memory = (
            in_megabytes(measured.peak),
            measured.peak / bar if measured.peak is not None and bar else None,
            in_megabytes(measured.resident),
        )
        where = (device, model, batch, measured.provider)
        last = (measured.first, measured.conservation, len(measured.calls))
        rows.append(Row(*where, *spread(measured.calls), *ratios, *memory, *last))
    return rows


def in_megabytes(size: int | None) -> float | None:
    """Bytes as MB."""
    return None if size is None else size / 1e6


HEADER = (
    "provider",
    "median ms",
    "p20",
    "p80",
    "x forward",
    "x input x gradient",
    "peak MB",
    "x input x gradient",
    "resident MB",
    "first call ms",
    "unaccounted",
)


def cells(row: Row) -> list[str]:
    """One line of a table."""
    return [
        row.provider,
        *(figure(value, ".1f") for value in (row.median_ms, row.p20_ms, row.p80_ms)),
        *(figure(value, ".2f") for value in (row.x_forward, row.x_input_x_gradient)),
        figure(row.peak_mb, ".0f"),
        figure(row.peak_x_input_x_gradient, ".2f"),
        figure(row.resident_mb, ".0f"),
        figure(row.first_call_ms, ".0f"),
        figure(row.conservation, ".1e"),
    ]


def figure(value: float | None, form: str) -> str:
    """A number, or nothing where there is none."""
    return "" if value is None else format(value, form)


def panels(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """The lines of each model, batch size and device, with a title."""
    return [(title, list(group)) for title, group in groupby(rows, key=title_of_row)]


def title_of(model: str, batch: int, device: str) -> str:
    """What the section of a model is called."""
    return f"{model}, batch {batch}, {device}"


def title_of_row(row: Row) -> str:
    """The title of the section that a line stands in."""
    return title_of(row.model, row.batch, row.device)


@dataclass
class Section:
    """All that is known of one model, batch size and device; ``origin`` says which command found it, and where."""

    title: str
    origin: str = ""
    rows: list[Row] = field(default_factory=list)
    gate: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"## {self.title}", self.origin, markdown(HEADER, map(cells, self.rows))]
        for heading, lines in (("Agreement:", self.gate), ("Left out:", self.left_out)):
            if lines:
                parts.append("\n".join([heading, "", *(f"* {line}" for line in lines)]))
        return "\n\n".join(parts)


TEXT = """# Relevance: ours and every peer

Random weights, float32 throughout{dtype}. One process per provider; calls take turns within one run. Milliseconds of
forward and relevance together; ratios are to the plain forward and to eager input x gradient (parameters frozen) of
the same run. Peak is what torch's allocator hands out in one call above the loaded model, resident what the process
grows by. The first call includes compilation. Unaccounted is the share of the explained output that is found neither at
inputs nor, for ours, in sinks; peers have no sinks, so what biases absorb counts. "With outputs" returns the model's
output too, and leaves as much unaccounted; without, attributions alone. With "weights prepared" (the option
`prepare_weights`) the first call also makes what weights alone decide, up to two copies of each: they stay, as the
model does, above which memory is measured. Where rules are the same, providers agreed before anything was timed.

{sections}
"""


def text_of(sections: Iterable[str], dtype: str) -> str:
    """The generated document."""
    low = "" if dtype == "fp32" else f", relevance of ours in {dtype}"
    return TEXT.format(dtype=low, sections="\n\n".join(sections))


def sections_in(path: Path) -> dict[str, str]:
    """The sections of a document written before, by title."""
    if not path.exists():
        return {}
    _, *found = re.split(r"^(?=## )", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {text.splitlines()[0].removeprefix("## "): text.strip() for text in found}


COLOURS = {"ours": "tab:blue", "LXT": "tab:orange", "zennit": "tab:green", "Captum": "tab:purple", "Dynamic": "tab:red"}


def colour(provider: str) -> str:
    """One per family of providers."""
    return next((shade for family, shade in COLOURS.items() if provider.startswith(family)), "tab:gray")


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Bars of the ratio to input x gradient, a panel per model and batch size."""
    parts = panels(rows)
    heights = [len(group) for _, group in parts]
    page = Figure(figsize=(9, 0.8 + sum(0.24 * height + 0.6 for height in heights)), layout="constrained")
    axes = page.subplots(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, group) in zip(axes, parts, strict=True):
        names = [row.provider for row in group]
        ratios = [row.x_input_x_gradient for row in group]
        bars = axis.barh(names, ratios, color=[colour(name) for name in names])
        axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=2, fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.margins(x=0.08)
        axis.tick_params(labelsize=7)
        axis.set_title(title, fontsize=9, loc="left")
    axes[-1].set_xlabel("time of forward + relevance, in units of eager input x gradient", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(page).print_png(str(path))


def stem(batch: int, dtype: str) -> str:
    """The name of the files for one batch size and dtype of relevance."""
    parts = ["peers", f"batch-{batch}" if batch > 1 else "", dtype if dtype != "fp32" else ""]
    return "-".join(part for part in parts if part)


def write_all(folder: Path, stem: str, machine: str, found: Sequence[Section], dtype: str) -> None:
    """The CSV, the document and the plot, all of the same name; what other runs found of other models stays."""
    news = {section.title for section in found}
    known = [(where, row) for where, row in rows_in(folder / f"{stem}.csv") if title_of_row(row) not in news]
    texts = {title: text for title, text in sections_in(folder / f"{stem}.md").items() if title not in news}
    lines = [*known, *((machine, row) for section in found for row in section.rows)]
    names = [field.name for field in fields(Row)]
    write_csv(folder / f"{stem}.csv", ("machine", *names), ((where, *astuple(row)) for where, row in lines))
    write(folder / f"{stem}.md", text_of([*texts.values(), *map(str, found)], dtype))
    plot(folder / f"{stem}.png", [row for _, row in lines])


def rows_in(path: Path) -> list[tuple[str, Row]]:
    """The lines of a CSV written before, each with its machine."""
    if not path.exists():
        return []
    kinds = get_type_hints(Row)
    with path.open(encoding="utf-8", newline="") as file:
        return [
            (line.pop("machine"), Row(**{name: _as(kinds[name], text) for name, text in line.items()}))
            for line in csv.DictReader(file)
        ]


def _as(kind: object, text: str) -> str | int | float | None:
    """A cell of a CSV as a field of this type has it."""
    if kind is str:
        return text
    if kind is int:
        return int(text)
    return float(text) if text else None
