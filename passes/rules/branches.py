"""The mark of a torch.cond: its relevance follows the rules of the ops in the branch that was taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lrp_compiler.passes.rules.base import Rule


@dataclass(frozen=True)
class OfBranches(Rule):
    """The rules inside; ``insert_branches`` writes them for both branches, and a call runs those of one."""

    name: ClassVar[str] = "of its branches"
