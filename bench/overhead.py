"""What a call costs beside the code that the compiler generated for it: python that runs every time.

    python bench/overhead.py [--out FOLDER] [--repeats N]

Transformers of 12 layers and tiny width, so that tensors cost next to nothing. Of every call, the time inside generated
functions, and what is left, which is ours; beside it some of the steps which that consists of, and how many functions
run outside of generated code. Calls take turns, each behind one of its kind, as in a loop; medians with p20 and p80,
and the least. Of the generated functions, how many ops they call and what one costs. What torch.compile does at a call,
beside running the graph that it was given, is measured alike: the guards by which it knows that its code still holds.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import transformers
from harness import command, in_turns, machine, markdown, of_this_machine, show, spread, write, write_csv
from torch import Tensor, fx, nn
from workloads import Logits

from lrp_compiler import LRPModule, compile_for_lrp
from lrp_compiler.captured_call import BoundCall
from lrp_compiler.passes.codegen import Code

LAYERS, WIDTH, TOKENS, TARGET = 12, 16, 4, 1
HEADER = ("model", "call", "ours us", "p20", "p80", "least", "python calls", "generated code us", "its least")
CODE_HEADER = ("model", "generated function", "ops", "us", "us an op")
Call = Callable[[], object]


@dataclass(frozen=True)
class Tiny:
    """A transformer of 12 layers whose tensors are as small as they can be."""

    name: str
    model: nn.Module
    target: int | tuple[int, ...]

    @property
    def x(self) -> Tensor:
        """Embeddings of a few tokens, the same every time."""
        return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def bert() -> Tiny:
    """BERT, one class."""
    config = transformers.BertConfig(
        hidden_size=WIDTH,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        vocab_size=50,
        max_position_embeddings=4 * TOKENS,
        num_labels=4,
    )
    return Tiny("BERT", Logits(transformers.BertForSequenceClassification(config), "inputs_embeds"), TARGET)


def gpt2() -> Tiny:
    """GPT-2, the last token's logit."""
    config = transformers.GPT2Config(
        n_embd=WIDTH,
        n_head=2,
        n_layer=LAYERS,
        vocab_size=50,
        n_positions=4 * TOKENS,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = Logits(transformers.GPT2LMHeadModel(config), "inputs_embeds", use_cache=False)
    return Tiny("GPT-2", model, (-1, TARGET))


def encoder() -> Tiny:
    """torch's own encoder, one class."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
    stack = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    return Tiny("nn.TransformerEncoder", nn.Sequential(stack, nn.Flatten(), nn.Linear(TOKENS * WIDTH, 4)), TARGET)


class ByTorch:
    """A forward pass of torch.compile, whose backend runs the graph as it is; ``spent`` are its microseconds."""

    def __init__(self, tiny: Tiny) -> None:
        self.spent: list[float] = []
        self._x = tiny.x
        torch.compiler.reset()
        self._compiled = torch.compile(tiny.model, backend=self._timed, fullgraph=True)

    def __call__(self) -> object:
        return self._compiled(self._x)

    def _timed(self, graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        run = graph.forward

        def timed(*values: Any) -> object:
            start = time.perf_counter()
            result = run(*values)
            self.spent.append(1e6 * (time.perf_counter() - start))
            return result

        return timed


class Stopwatch:
    """Splits the time of calls into that inside of generated functions and the rest, in microseconds."""

    def __init__(self) -> None:
        self.ours: list[float] = []
        self.generated: list[float] = []
        self.functions: dict[Code, list[float]] = {}

    def __call__(self, call: Call) -> None:
        """Time a call, behind one of the same kind."""
        call()
        spent: list[float] = call.spent if isinstance(call, ByTorch) else []
        spent.clear()
        with self._noting(spent):
            start = time.perf_counter()
            call()
            whole = 1e6 * (time.perf_counter() - start)
        self.generated.append(sum(spent))
        self.ours.append(whole - sum(spent))

    @contextlib.contextmanager
    def _noting(self, spent: list[float]) -> Iterator[None]:
        kept = Code.__call__, Code.consume

        def consume(code: Code, sizes: Any, values: list[Any]) -> tuple[Any, ...]:
            values[:0] = sizes.of(code.sizes)
            start = time.perf_counter()
            result = code.function(values) if code.takes_list else code.function(*values)
            spent.append(1e6 * (time.perf_counter() - start))
            self.functions.setdefault(code, []).append(spent[-1])
            return result

        def run(code: Code, sizes: Any, *values: Any) -> tuple[Any, ...]:
            return consume(code, sizes, list(values))

        Code.__call__, Code.consume = run, consume  # type: ignore[method-assign]
        try:
            yield
        finally:
            Code.__call__, Code.consume = kept  # type: ignore[method-assign]


class Counter:
    """Counts the python functions that run outside of generated code."""

    def __init__(self) -> None:
        self._count = 0
        self._depth = 0

    def __call__(self, call: Call) -> int:
        """How many functions ``call`` runs."""
        self._count = 0
        sys.setprofile(self._note)
        try:
            call()
        finally:
            sys.setprofile(None)
        return self._count

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "return") and frame.f_code.co_filename.startswith("<eval_with_key>"):
            self._depth += 1 if event == "call" else -1
        elif event == "call" and not self._depth:
            self._count += 1


def calls(tiny: Tiny, explained: LRPModule) -> dict[str, Call]:
    """Every kind of call that is measured, by name; what one needs of another is made beforehand."""
    x = tiny.x
    _, tape = explained.run(x)
    return {
        "forward": lambda: explained(x),
        "run": lambda: explained.run(x),
        "relevance": lambda: tape.relevance(tiny.target),
        "attribute": lambda: explained.attribute(x, tiny.target),
        "torch.compile, forward": ByTorch(tiny),
    }


def steps(tiny: Tiny, explained: LRPModule) -> dict[str, Call]:
    """Some of what calls do beside running generated code."""
    x, captures = tiny.x, explained.compiler.captures
    _, tape = explained.run(x)

    def find() -> BoundCall:
        return captures.bound(tiny.model, (x,), {}, frozenset(), True)

    return {
        "step: read the model and find the program": find,
        "step: collect the graph's inputs": find().inputs,
        "step: check that nothing changed since": tape._recording.check_fresh,
    }


def rows(tiny: Tiny, repeats: int) -> tuple[list[list[str]], list[list[str]]]:
    """One line per kind of call and step, and one per generated function."""
    explained = compile_for_lrp(tiny.model.eval().requires_grad_(False), "attnlrp")
    timed = {**calls(tiny, explained), **steps(tiny, explained)}
    watches = {name: Stopwatch() for name in timed}
    in_turns({name: lambda name=name, call=call: watches[name](call) for name, call in timed.items()}, repeats)  # type: ignore[misc]
    lines = []
    for name, watch in watches.items():
        code = ["", ""]
        # The first call warms up.
        ours, generated = watch.ours[1:], watch.generated[1:]
        if any(generated):
            code = [f"{statistics.median(generated):.0f}", f"{min(generated):.0f}"]
        figures = [f"{value:.0f}" for value in (*spread(ours), min(ours))]
        lines.append([tiny.name, name, *figures, str(Counter()(timed[name])), *code])
    functions = zip(("forward", "relevance"), watches["attribute"].functions.items(), strict=True)
    return lines, [code_row(tiny, name, code, min(spent)) for name, (code, spent) in functions]


def code_row(tiny: Tiny, name: str, code: Code, least: float) -> list[str]:
    """The ops of one generated function and what one costs; their tensors are too small to count."""
    graph = code.function.__self__.graph  # type: ignore[attr-defined]
    ops = sum(node.op == "call_function" for node in graph.nodes)
    return [tiny.name, name, str(ops), f"{least:.0f}", f"{least / ops:.2f}"]


def main() -> None:
    """Measure, print, and write files if asked."""
    parser = command(
        __doc__,
        "also write overhead.csv, overhead_code.csv and overhead.md into a folder of this machine's in here",
        of_this_machine,
    )
    parser.add_argument("--repeats", type=int, default=101)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    lines: list[list[str]] = []
    code: list[list[str]] = []
    with torch.no_grad():
        for make in (bert, gpt2, encoder):
            found, functions = rows(make(), options.repeats)
            lines, code = [*lines, *found], [*code, *functions]
    where = f"{machine()}, {LAYERS} layers, width {WIDTH}, {TOKENS} tokens"
    show(where, HEADER, lines)
    show("generated code", CODE_HEADER, code)
    if options.out:
        tables = f"{markdown(HEADER, lines)}\n\n{markdown(CODE_HEADER, code)}"
        write(options.out / "overhead.md", f"{tables}\n\n{where}\n")
        write_csv(options.out / "overhead.csv", ("machine", *HEADER), ([where, *line] for line in lines))
        write_csv(options.out / "overhead_code.csv", ("machine", *CODE_HEADER), ([where, *line] for line in code))


if __name__ == "__main__":
    main()
