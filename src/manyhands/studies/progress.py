"""How far a study is: a bar on a terminal, a line for each run elsewhere, nothing where nobody looks."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from manyhands.studies.rows import Row


class StudyProgress:
    """Told before and after each run; a context manager."""

    def __init__(self, runs: int, console: Console | None) -> None:
        self._runs, self._ended, self._failed = runs, 0, 0
        self._console = console
        self._bar: Bar | None = None
        if console is not None and console.is_terminal and not console.is_dumb_terminal:
            self._bar = Bar(
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
                console=console,
                transient=True,
            )
            self._bar.add_task("", total=runs)

    def starts(self, what: str) -> None:
        """A run begins."""
        if self._bar is not None:
            failed = f" · {self._failed} failed" if self._failed else ""
            self._bar.update(self._bar.task_ids[0], description=what + failed)

    def ends(self, what: str, row: Row) -> None:
        """It has ended."""
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
    if row.measurement is None:
        return f"{row.status}: {row.reason.splitlines()[0] if row.reason else ''}"
    m = row.measurement
    right = f", {100 * m.test_accuracy:.1f} % right" if m.test_accuracy is not None else ""
    return f"{1e3 * m.step_s.median:.3g} ms a step{right} ({row.seconds:.1f} s)"
