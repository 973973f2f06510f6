"""Which backend runs the code of a call, why, and what compiling it took so far."""

from __future__ import annotations

from dataclasses import dataclass

from lrp_compiler.passes.codegen import Executable

UNCOMPILED = "calls that record gradients, and several targets at once, run the eager code"


@dataclass(frozen=True)
class BackendReport:
    """``name`` of the backend and the ``reason`` for it.

    ``seconds`` lists what each compilation by torch.compile took so far, as (pass, seconds) in the order of requests;
    ``refusals`` why a pass was left to the eager code after all; ``goes_through_compiler`` whether there is any.
    """

    name: str
    reason: str
    cuda_graphs: bool
    goes_through_compiler: bool
    seconds: tuple[tuple[str, float], ...] = ()
    refusals: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The lines of the report."""
        graphs = ", CUDA graphs" if self.cuda_graphs else ""
        lines = [f"  backend   {self.name}{graphs} ({self.reason})"]
        if self.goes_through_compiler:
            made = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds)
            lines.append(f"  compiled  {made or 'at the first call'}; {UNCOMPILED}")
        lines += [f"  eager     {refusal}" for refusal in self.refusals]
        return lines


def backend_report(executable: Executable, others: tuple[Executable, ...]) -> BackendReport:
    """What runs ``executable``, and what was compiled of all code for the same call, in ``others``."""
    seconds: list[tuple[str, float]] = []
    refusals: list[str] = []
    for made in others:
        for name, code in (("forward", made.forward), ("relevance", made.relevance)):
            if code is not None and code.compiled is not None:
                seconds += [(name, taken) for taken in code.compiled.seconds]
                refusals += [f"{name}: {refusal}" for refusal in code.compiled.refusals]
    choice = executable.choice
    through = choice.compiler is not None
    return BackendReport(
        choice.name, choice.reason, choice.cuda_graphs, through, tuple(seconds), tuple(dict.fromkeys(refusals))
    )
