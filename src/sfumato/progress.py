"""Progress of long work: a bar with time left on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

SECONDS_BETWEEN_PLAIN_LINES = 10.0


class Progress:
    """Context manager that shows how far a stage has come.

    >>> with Progress("dp-sgd", total=100, unit="steps") as progress:
    ...     progress.advance(1, note="loss 0.31")

    Notes must be public values: what is shown may be logged anywhere. Of several processes started together
    (torchrun) only the first shows anything.
    """

    def __init__(self, description: str, total: int, unit: str = "") -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.note = 0, ""
        self._bar = None
        self._silent = os.environ.get("RANK", "0") != "0"

    def __enter__(self) -> Progress:
        self._start = self._last_line = time.monotonic()
        if sys.stderr.isatty() and not self._silent:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(self.unit),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total, note="")
        return self

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more units of work as done; `note` replaces the text behind the bar."""
        self.done += n
        self.note = note or self.note
        if self._bar is not None:
            self._bar.update(self._task, advance=n, note=self.note)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_PLAIN_LINES:
            self._last_line = now
            self._print_line(now)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._print_line(time.monotonic())

    def _print_line(self, now: float) -> None:
        if self._silent:
            return
        elapsed = now - self._start
        left = elapsed / self.done * (self.total - self.done) if self.done else float("nan")
        tail = f", {left:.0f} s left" if self.done < self.total else ""
        note = f", {self.note}" if self.note else ""
        print(
            f"{self.description}: {self.done}/{self.total} {self.unit} in {elapsed:.0f} s{tail}{note}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
