"""How far a study is: a bar on a terminal, a line for each run elsewhere, nothing where nobody looks."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from manyhands.studies.row import Row


class TimeLeft:
    """What the runs to come will take: each as long as its own cell took so far, else as long as the mean cell."""

    def __init__(self, cells: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._left = Counter(cells)
        self._took: dict[str, list[float]] = {}
        self._clock = clock
        self._began = clock()

    def starts(self) -> None:
        """A run begins."""
        self._began = self._clock()

    def ends(self, cell: str) -> None:
        """It has ended, repetitions included."""
        self._took.setdefault(cell, []).append(self._clock() - self._began)
        self._left[cell] -= 1
        self.starts()

    def seconds(self) -> float | None:
        """From now on, the run under way included; None before the first has ended."""
        if not self._took:
            return None
        means = {cell: statistics.fmean(took) for cell, took in self._took.items()}
        other = statistics.fmean(means.values())
        total = sum(n * means.get(cell, other) for cell, n in self._left.items())
        return max(0.0, total - (self._clock() - self._began))


class _Left(ProgressColumn):
    max_refresh = 0.5

    def __init__(self, left: TimeLeft) -> None:
        self._seconds = left.seconds
        super().__init__()

    def render(self, task: Task) -> Text:
        seconds = self._seconds()
        shown = "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))
        return Text(f"left {shown}", style="progress.remaining")


class StudyProgress:
    """Told before and after each run of ``cells``, one entry a run; a context manager."""

    def __init__(self, cells: Sequence[str], console: Console | None) -> None:
        self._runs, self._ended, self._failed = len(cells), 0, 0
        self._left = TimeLeft(cells)
        self._console = console
        self._bar: Bar | None = None
        if console is not None and console.is_terminal and not console.is_dumb_terminal:
            self._bar = Bar(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                _Left(self._left),
                TextColumn("{task.description}", markup=False),
                console=console,
                transient=True,
            )
            self._bar.add_task("", total=self._runs)

    def starts(self, what: str) -> None:
        """A run begins."""
        self._left.starts()
        if self._bar is not None:
            failed = f"{self._failed} failed · " if self._failed else ""
            self._bar.update(self._bar.task_ids[0], description=failed + what)

    def ends(self, what: str, row: Row) -> None:
        """It has ended."""
        self._left.ends(row.cell)
        self._ended += 1
        self._failed += row.status == "failed"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._ended)
        elif self._console is not None:
            width = len(str(self._runs))
            line = f"[{self._ended:{width}}/{self._runs}] {what}: {_outcome(row)}"
            self._console.print(Text(line), soft_wrap=True)

    def __enter__(self) -> StudyProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _outcome(row: Row) -> str:
    took = f"({row.seconds:.1f} s)"
    if row.noise is not None:
        return f"variance of the update {row.noise['variance']:.3g} {took}"
    if row.measurement is None:
        return f"{row.status}: {row.reason.splitlines()[0] if row.reason else ''}"
    m = row.measurement
    right = f", {100 * m.test_accuracy:.1f} % right" if m.test_accuracy is not None else ""
    busy = f", machine {row.disturbance:.1f} times slower than at best" if row.noisy and row.disturbance else ""
    return f"{1e3 * m.step_s.median:.3g} ms a step{right}{busy} {took}"
