"""The 15 architectures of DynamicLRP's tables at full size, without weights: coverage, promises, buffers and time.

    python bench/coverage.py [--out FILE] [--only NAME ...]

Builds every model of ``published.py`` on fake tensors, compiles one call of it for ``attnlrp`` down to code of both
graphs, and prints (or writes) the tables beside those of arXiv 2512.07010. An op without a rule is an error, so a table
that is there shows full coverage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from compile_time import COMPOSITE, compiled, where
from harness import command, markdown, write
from published import FINE_TUNED, THE_15, Published
from torch import fx

from lrp_compiler import Report, compile_for_lrp
from lrp_compiler.passes.demand import Demand, demands
from lrp_compiler.passes.operation import Operation
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.program import Program, facts, forward_nodes

NONE = "not given"


@dataclass(frozen=True)
class Theirs:
    """What arXiv 2512.07010 reports of one model: table 5, then table 4 where it has a row, then table 6."""

    covered: str
    unique: str
    promises: str = NONE
    internal: str = NONE
    delta: str = NONE
    density: str = NONE
    total: str = NONE
    uncovered: str = "none"


THEIRS = {
    "VGG16": Theirs("90/90", "9/9", "32", "0", "32", "0.356", "90"),
    "ResNet-50": Theirs("339/339", "10/10"),
    "ViT-b-16": Theirs("779/779", "16/16", "224", "27", "227", "0.288", "779"),
    "EfficientNetv2-medium": Theirs("1,526/1,526", "12/12"),
    "SigLIP-2-So400m-base14-384": Theirs("2,178/2,178", "19/19"),
    "Wav2Vec2-xls-r-300m": Theirs("2,021/2,022", "18/19", uncovered="WeightNormInterface x 1"),
    "whisper-small": Theirs("2,729/2,729", "22/22"),
    "GPT-2": Theirs("885/885", "19/19"),
    "RoBERTa-large": Theirs("1,461/1,461", "14/14", "243", "48", "438", "0.166", "1,465"),
    "Llama3.2-1B": Theirs("1,787/1,787", "24/24"),
    "Gemma-3-270m-it": Theirs("2,482/2,482", "24/24"),
    "Qwen3-0.6B": Theirs("2,590/2,590", "18/18"),
    "Flan-T5-large": Theirs("5,713/5,713", "24/24", "798", "348", "980", "0.140", "5,713"),
    "DePlot": Theirs("2,863/2,863", "23/23"),
    "Mamba-130m": Theirs("3,397/3,421", "25/26", uncovered="SplitWithSize x 24"),
    "Flan-T5-large (FT)": Theirs(NONE, NONE, "847", "1,524", "2,972", "0.0777", "10,897"),
}


@dataclass(frozen=True)
class Measured:
    """What one compiled call showed; ``spent`` is processor time in milliseconds per pass."""

    published: Published
    size: str
    parameters: int
    report: Report
    demands: tuple[Demand, ...]
    live: Counter[str]
    uncovered: Counter[str]
    spent: dict[str, float]


def measure(published: Published) -> Measured:
    """Build and compile one model."""
    call = published.weightless_call()
    with torch.no_grad():
        _, spent = compiled(call.model, call.args, call.kwargs)
        explained = compile_for_lrp(call.model, COMPOSITE)
        report = explained.report(*call.args, **call.kwargs)
        program = explained.explained_call(call.args, dict(sorted(call.kwargs.items()))).program
    sizes = {id(parameter): parameter.numel() for parameter in call.model.parameters()}
    live = [node for node in forward_nodes(program) if node.op == "call_function" and facts(node).live]
    return Measured(
        published=published,
        size=call.size,
        parameters=sum(sizes.values()),
        report=report,
        demands=demands(program),
        live=Counter(map(op_name, live)),
        uncovered=Counter(op_name(node) for node in without_rule(program, live)),
        spent=spent,
    )


def without_rule(program: Program, live: list[fx.Node]) -> list[fx.Node]:
    """Live ops that relevance can flow into and that neither a rule nor a recognised group takes care of."""
    nodes = program.nodes_by_name()
    taken = {name for found in program.sources.values() for name in found}
    for node in live:
        pattern = facts(node).pattern
        taken.update(pattern.members if pattern is not None else ())
    waiting = [node for node in live if node.name not in taken and facts(node).rule is None]
    return [node for node in waiting if Operation(node, nodes).flowing]


def covered(counts: Counter[str], missing: Counter[str]) -> str:
    """Covered of all, as in table 5."""
    total = counts.total()
    return f"{total - missing.total():,}/{total:,}"


def coverage_row(m: Measured) -> list[str]:
    theirs = THEIRS[m.published.name]
    unique = f"{len(m.live) - len(m.uncovered)}/{len(m.live)}"
    ours = [f"{m.report.forward_ops:,}", covered(m.live, m.uncovered), unique, f"{m.report.relevance_ops:,}"]
    size = f"{m.parameters / 1e6:,.1f}M"
    return [m.published.name, m.published.modality, m.size, size, theirs.covered, theirs.unique, *ours]


COVERAGE = (
    "model",
    "modality",
    "input",
    "parameters",
    "theirs: covered nodes",
    "theirs: unique ops",
    "ours: forward ops",
    "ours: live ops covered",
    "ours: unique live ops",
    "ours: relevance ops",
)


def promise_row(m: Measured) -> list[str]:
    theirs, report = THEIRS[m.published.name], m.report
    kinds = Counter(buffer.kind for buffer in report.buffers)
    between = {name for demand in m.demands for name in demand.between}
    before = [f"{report.demanded:,}", f"{len(between):,}", f"{report.delta:,}", f"{report.rho:.3f}"]
    after = [f"{report.still_demanded:,}", f"{report.still_demanded / report.forward_ops:.3f}"]
    kept = [*(f"{kinds[kind]:,}" for kind in KINDS), f"{report.saved_bytes / 2**20:,.1f}"]
    figures = [theirs.promises, theirs.internal, theirs.delta, theirs.density, theirs.total]
    return [m.published.name, str(m.published.d_model), m.published.depth, *figures, *before, *after, *kept]


KINDS = ("saved", "compressed", "recomputed", "view", "free")
"""What promises are lowered to (``Buffer`` in ``passes/buffers.py``)."""

PROMISES = (
    "model",
    "d_model",
    "depth",
    "theirs: promises",
    "internal nodes",
    "δ",
    "ρ",
    "total nodes",
    "ours, before: demanded",
    "internal nodes",
    "δ",
    "ρ",
    "ours, after: demanded",
    "ρ",
    f"values read: {KINDS[0]}",
    *KINDS[1:],
    "kept MiB",
)


def time_row(m: Measured) -> list[str]:
    total, capture, code = sum(m.spent.values()), m.spent["capture"], m.spent["codegen"]
    nodes = m.report.forward_ops + m.report.relevance_ops
    figures = (nodes, capture, total - capture - code, code, total)
    return [m.published.name, *(f"{figure:,.0f}" for figure in figures)]


TIME = ("model", "forward + relevance ops", "capture", "passes", "codegen", "total")


def uncovered_row(m: Measured) -> list[str]:
    ours = ", ".join(f"{name} x {count}" for name, count in m.uncovered.items()) or "none"
    return [m.published.name, THEIRS[m.published.name].uncovered, ours]


TEXT = """# Coverage at full size

Written by `python bench/coverage.py --out bench/results/coverage.md`. Every model has its published size and no
weights: it is built on fake tensors, one call of it is captured, every pass is run for `{composite}`, and the code of
the forward and the relevance graph is generated. "Theirs" are the figures of DynamicLRP, tables 4 to 6 of Lee & Arias,
*A Model-Agnostic Solution To Layer-Wise Relevance Propagation*, arXiv 2512.07010.

Machine: {machine}.

## Coverage (their table 5)

{coverage}

All 15: theirs 31,440/31,465; ours {sum_covered} live ops of {sum_forward} forward ops.

The counts differ because the graphs do. Theirs is autograd's graph: it has a node for every parameter
(`AccumulateGrad`), for every transposed weight (`TBackward`) and for the views around a batched matrix product, and
nothing for what needs no gradient. Ours is the ATen graph of the call: one `linear`, attention as the one kernel that
eager runs, no node for parameters. A live op depends on an attributed input; the other forward ops (positions, masks,
rotary tables) have no relevance to propagate. Ops inside a recognised group count as covered by the group's rule.

## Uncovered ops (their table 6)

{uncovered}

The compiler refuses a graph with an uncovered live op, so a finished run has none.

## Promises (their table 4)

{promises}

Theirs counts the branches of promises that their pass over relevance creates: one for each term that an addition, a
bias, a concatenation, a sum, a mean or a softmax needs and autograd does not keep. "Before" is the same count on our
graph (`lrp_compiler/passes/demand.py`): what propagating relevance would ask for. "After" is how many of those values
our coefficients still read. Internal nodes lie between an op and the value it asks for, δ is the sum of the distances,
ρ the number asked for per op of the graph (theirs: per autograd node). {agreement}
Elsewhere the graphs differ: attention is one kernel here, which keeps its own statistics, where theirs may see its
sums and softmax one by one; and their paths run through the views that autograd puts around matrix products. Their
figure for RoBERTa-large is less than two branches for each of its 24 x (6 biases + 2 residual sums); we cannot say why.

What is still read after is what relevance that passed a sigmoid gate is divided by when it becomes a coefficient again.

The remaining columns are all forward values that the relevance graph reads: most of them (gates of activations, factors
of products, statistics of norms) autograd keeps as well. Free ones are inputs, parameters and outputs, and views of
what is kept cost nothing; of a compressed one less is kept (a bit for each sign, say), a recomputed one is made once
more for relevance. Kept is what saved and compressed ones take.

## Processor time, milliseconds

{time}

From the call to both functions ready, after the imports, in one process; the first model pays for what torch imports
late. Capture is `torch.export`; each pass's time includes the check of what it made. A state-space model is unrolled
over its {tokens}. How time grows with the network is in `amd-epyc-2-cores/compile_time.md`.
"""


def document(rows: list[Measured]) -> str:
    """The whole file."""
    the_15 = [m for m in rows if m.published is not FINE_TUNED]
    missing, live = sum(m.uncovered.total() for m in the_15), sum(m.live.total() for m in the_15)

    def made(header: tuple[str, ...], row: Callable[[Measured], list[str]], of: list[Measured]) -> str:
        return markdown(header, [row(m) for m in of])

    same = [m.published.name for m in rows if f"{m.report.demanded:,}" == THEIRS[m.published.name].promises]
    return TEXT.format(
        composite=COMPOSITE,
        machine=where(),
        coverage=made(COVERAGE, coverage_row, the_15),
        sum_covered=f"{live - missing:,}/{live:,}",
        sum_forward=f"{sum(m.report.forward_ops for m in the_15):,}",
        uncovered=made(("model", "theirs", "ours"), uncovered_row, the_15),
        promises=made(PROMISES, promise_row, rows),
        agreement=f"The two counts agree for {' and '.join(same)}." if same else "",
        time=made(TIME, time_row, rows),
        tokens=next((m.size for m in rows if m.published.modality == "state space"), "tokens"),
    )


def main() -> None:
    """Measure, and print or write the tables."""
    names = [published.name for published in (*THE_15, FINE_TUNED)]
    parser = command(__doc__, "write the tables to this file")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="models by name")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [measure(published) for published in (*THE_15, FINE_TUNED) if published.name in options.only]
    if options.out:
        write(options.out, document(rows))
    else:
        print(document(rows))


if __name__ == "__main__":
    main()
