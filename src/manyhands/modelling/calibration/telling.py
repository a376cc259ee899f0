"""How far a calibration is: a bar on a terminal, a line for each block elsewhere, nothing where nobody looks."""

from __future__ import annotations

import contextlib

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Telling:
    """Told after each block; a context manager. ``of_s``: how long all of it may take."""

    def __init__(self, console: Console | None, of_s: float) -> None:
        self._console, self._of_s, self._bar = console, of_s, None
        if console is not None and console.is_terminal and not console.is_dumb_terminal:
            self._bar = Bar(
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                TextColumn(f"of {of_s:.0f} s at most"),
                TextColumn("{task.description}", markup=False),
                console=console,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bar.add_task("", total=of_s)

    def __enter__(self) -> Telling:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str, at_s: float) -> None:
        """A block is done, ``at_s`` seconds after the beginning."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=min(at_s, self._of_s), description=text)
        elif self._console is not None:
            with contextlib.suppress(OSError, ValueError):  # nobody is looking any more
                self._console.file.write(f"{at_s:5.1f} s  {text}\n")
                self._console.file.flush()
