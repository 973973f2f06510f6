"""Everything that needs a GPU, in one command of less than eight minutes: make gpu.

    python bench/gpu.py [--out FOLDER] [--minutes 8]

1. tests/kernels with compiled kernels; 2. every kernel in every configuration at the size of real models, against
float64; 3. bench/kernels.py; 4. bench/end_to_end.py. Each step has its share of the time and is stopped at its end;
what was measured until then is kept. Results go to bench/results/<name of the GPU>/.

Needs python with torch, triton, numpy, networkx, pytest, hypothesis, rich and matplotlib; nothing is installed, nothing
is fetched, and this package need not be installed. Exits with 1 when a step fails, with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import command, machine, machine_folder, markdown, write

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("triton", "numpy", "networkx", "pytest", "hypothesis", "rich", "matplotlib")
NO_GPU = "make gpu needs a CUDA device, and torch {torch} sees none here: run it on a machine with a GPU."

TESTS, CHECKS, KERNELS, WHOLE = 0.34, 0.2, 0.26, 0.2
"""Each step's share of the time; what one does not need goes to those after it."""


@dataclass(frozen=True)
class Step:
    """What a step was, how it ended and how long it took."""

    name: str
    outcome: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.outcome != "passed"


@contextmanager
def environment() -> Iterator[dict[str, str]]:
    """The variables of the steps: this package without the root on the path, where "kernels" is another's name."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "lrp_compiler").symlink_to(ROOT / "lrp_compiler")
        found = {
            name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONSAFEPATH")
        }
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH", ""))))
        # Without it torch warns of every product under deterministic algorithms, which fill empty memory with nan.
        found.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        yield found


def run(name: str, asked: Sequence[str], seconds: float, environ: dict[str, str]) -> Step:
    """Run a python command in the repository's root; stop it, with what it started, after ``seconds``."""
    print(f"== {name}: at most {seconds:.0f} s", flush=True)
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *asked], env=environ, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(seconds)
        outcome = "passed" if code == 0 else f"failed with exit status {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        outcome = f"stopped after its {seconds:.0f} s"
    step = Step(name, outcome, time.monotonic() - start)
    print(f"== {name}: {outcome}, {step.seconds:.0f} s", flush=True)
    return step


def tests(seconds: float, environ: dict[str, str], folder: Path) -> Step:
    """tests/kernels on the GPU, in several processes where pytest-xdist is there: compiling takes the most time."""
    several = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    # Other plugins and other versions of torch warn of other things; -P keeps the root off the path.
    asked = ["-P", "-m", "pytest", "tests/kernels", "-W", "default", "-p", "no:cacheprovider", "--tb=short", *several]
    return run("tests/kernels", asked, seconds, {**environ, "LRP_AUTOTUNE": "0"})


def checks(seconds: float, environ: dict[str, str], folder: Path) -> Step:
    """Every configuration of every op, several ops at once; the timings that follow then find it compiled."""
    return run("checks of all configurations", ["bench/kernels.py", "--check", "--jobs", "6"], seconds, environ)


def kernels(seconds: float, environ: dict[str, str], folder: Path) -> Step:
    """The microbenchmark; it stops by itself a little before its time is up."""
    files = ["--out", str(folder), "--plot", str(folder / "roofline.png")]
    return run("bench/kernels.py", ["bench/kernels.py", f"--seconds={0.8 * seconds}", *files], seconds, environ)


def whole(seconds: float, environ: dict[str, str], folder: Path) -> Step:
    """AttnLRP of whole models against eager input x gradient."""
    asked = ["bench/end_to_end.py", "--repeats", "10", "--out", str(folder)]
    return run("bench/end_to_end.py", asked, seconds, environ)


PLAN: tuple[tuple[float, Callable[[float, dict[str, str], Path], Step]], ...] = (
    (TESTS, tests),
    (CHECKS, checks),
    (KERNELS, kernels),
    (WHOLE, whole),
)


def all_steps(minutes: float, folder: Path) -> list[Step]:
    """The steps one after the other; each may use what those before it left of the time."""
    ends = time.monotonic()
    made = []
    with environment() as environ:
        for share, step in PLAN:
            ends += 60 * minutes * share
            made.append(step(max(ends - time.monotonic(), 1), environ, folder))
    return made


def missing() -> list[str]:
    """Packages that the steps need and this python lacks."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = command(__doc__, "the folder of the results (default: bench/results/<name of the GPU>)")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all steps together (default: 7.5)")
    return parser.parse_args()


def main() -> int:
    """Run the steps, tell how they ended, and leave summary.md beside their results."""
    chosen = parsed()
    if not torch.cuda.is_available():
        print(NO_GPU.format(torch=torch.__version__), file=sys.stderr)
        return 2
    if lacking := missing():
        print(f"make gpu needs {', '.join(lacking)} in {sys.executable}; nothing was run.", file=sys.stderr)
        return 2
    folder = chosen.out or ROOT / "bench/results" / machine_folder("cuda")
    folder.mkdir(parents=True, exist_ok=True)
    made = all_steps(chosen.minutes, folder)
    table = markdown(("step", "outcome", "s"), ([step.name, step.outcome, f"{step.seconds:.0f}"] for step in made))
    where = machine(torch.device("cuda"))
    write(folder / "summary.md", f"# make gpu\n\n{where}\n\n{table}\n")
    print(f"{table}\n\n{where}; results in {folder}")
    return 1 if any(step.failed for step in made) else 0


if __name__ == "__main__":
    sys.exit(main())
