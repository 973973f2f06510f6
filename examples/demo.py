"""What ``make demo`` runs: explain two digit classifiers and a sentence model."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH=1 leaves a script's own folder out

import digits
import sentences

FOLDER = Path("demo")


def main() -> None:
    """Run both parts and say where the files are."""
    FOLDER.mkdir(exist_ok=True)
    console = Console()
    console.rule("Images")
    written: list[Path | None] = [digits.run(FOLDER, console)]
    console.rule("Sentences")
    written.append(sentences.run(FOLDER, console))
    console.rule("Files")
    for path in written:
        if path is not None:
            console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
