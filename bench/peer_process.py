"""The other end of bench/peer_worker.py: a process that is asked questions one at a time."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any


class WorkerError(Exception):
    """A worker could not answer; the message says why."""


class Worker:
    """A process that answers a line of stdin by a line of JSON on stdout; it must greet with one first.

    It loads while nobody waits for it. What it prints to stderr goes to the file ``log``. A question that is not
    answered within ``patience`` seconds ends the process.
    """

    def __init__(self, command: Sequence[str], log: Path, patience: float) -> None:
        self._log, self._patience = log, patience
        with log.open("w", encoding="utf-8") as stderr:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr}
            self._process = subprocess.Popen(command, text=True, encoding="utf-8", **pipes)

    @cached_property
    def greeting(self) -> Any:
        """What it says when it has loaded; raises WorkerError where it ends before."""
        return self._answer("start")

    def ask(self, question: str) -> Any:
        """The answer to a question; raises WorkerError for an error, silence or the end of the process."""
        assert self._process.stdin is not None and self.greeting is not None
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words("it is gone")) from None
        return self._answer(question)

    def _answer(self, question: str) -> Any:
        assert self._process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self._patience, stop)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            cause = f"no answer to {question.split()[0]!r}"
            late_cause = f"{cause} within {self._patience:.0f} s"
            raise WorkerError(late_cause if late.is_set() else self._last_words(cause))
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["value"]

    def _last_words(self, cause: str) -> str:
        code = self._process.wait()
        lines = [line for line in self._log.read_text(encoding="utf-8").splitlines() if line.strip()]
        return f"{cause}, exit status {code}: {lines[-1] if lines else 'nothing on stderr'}"

    def close(self) -> None:
        """End the process, and wait until its memory is free."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        # What was written to a process that is gone cannot be flushed.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
