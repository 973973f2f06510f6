"""What became of a group of relevance ops that a kernel might compute."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelUse:
    """The relevance of the forward op ``op`` by ``function``: the kernels that compute it, or why none does."""

    op: str
    function: str
    kernels: tuple[str, ...]
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.op}: {', '.join(self.kernels) or 'torch'}" + (f" ({self.reason})" if self.reason else "")
