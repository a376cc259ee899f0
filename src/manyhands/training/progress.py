"""How far a run is, on standard error: a bar on a terminal, a line now and then otherwise.

Standard output is never touched; it belongs to ``--json``. Whether there is a terminal, and what it can show, is rich's
to find out. `Progress.update` stands in the hot loop: it looks at the clock and returns (0.13 µs), and draws twice a
second at most (0.2 ms each).
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import SupportsFloat

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

logger = logging.getLogger(__name__)

#: Seconds between drawings of the bar, and between lines where there is none.
BAR_EVERY_S, LINE_EVERY_S = 0.5, 5.0
#: Drawings that the shown speed is the mean of: the last 5 s of a bar.
WINDOW = 10


class Progress:
    """Shows epoch, step, loss, samples/s and the time left; on every rank but 0 it shows nothing.

    ``first_step`` is where a resumed run begins, so that speed and time left are this run's own.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        epochs: int | None = None,
        first_step: int = 0,
        rank: int = 0,
        console: Console | None = None,
    ) -> None:
        self._total, self._epochs, self._first = total_steps, epochs, first_step
        self._began = time.monotonic()
        self._marks = deque([(self._began, first_step, 0)], maxlen=WINDOW)
        self._last: tuple[int, int, int, SupportsFloat] | None = None
        self._console = console or Console(stderr=True)
        self._bar: Bar | None = None
        self._every_s, self._next = LINE_EVERY_S, math.inf
        if rank == 0:
            if self._console.is_terminal and not self._console.is_dumb_terminal:
                self._every_s = BAR_EVERY_S
                self._bar = _bar(self._console, total_steps, first_step)
            self._next = self._began + self._every_s

    def update(self, step: int, epoch: int, samples: int, loss: SupportsFloat) -> None:
        """Say where the run is: ``step`` steps are done, the last of them in ``epoch`` (from 0).

        ``samples`` counts those of this process's life; a 0-dim tensor as ``loss`` is read only when it is drawn.
        """
        self._last = (step, epoch, samples, loss)
        if time.monotonic() >= self._next:
            self._draw()

    def close(self) -> None:
        """Take the bar away and leave the last state as a line. Further calls do nothing."""
        if self._next == math.inf:
            return
        self._next = math.inf
        self._guarded(self._finish)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _draw(self) -> None:
        self._next = time.monotonic() + self._every_s
        self._guarded(self._show)

    def _guarded(self, show: Callable[[], None]) -> None:
        try:
            show()
        except (OSError, ValueError) as e:  # a closed pipe or file; nobody is looking any more
            self._next = math.inf
            logger.debug("progress is no longer shown: %s", e)

    def _show(self) -> None:
        if self._last is None:
            return
        step, epoch, samples, loss = self._last
        now = time.monotonic()
        then, step_then, samples_then = self._marks[0]
        self._marks.append((now, step, samples))
        elapsed_s = max(now - then, 1e-9)
        left_s = (self._total - step) * elapsed_s / max(step - step_then, 1e-9)
        state = self._state(step, epoch, float(loss), (samples - samples_then) / elapsed_s)
        text = f"{state}  {_clock(left_s)} left" if step > step_then else state
        if self._bar is None:
            self._line(text)
        else:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text, refresh=True)

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._last is not None:
            step, epoch, samples, loss = self._last
            elapsed_s = max(time.monotonic() - self._began, 1e-9)
            self._line(f"{self._state(step, epoch, float(loss), samples / elapsed_s)}  {_clock(elapsed_s)} taken")

    def _state(self, step: int, epoch: int, loss: float, samples_per_s: float) -> str:
        of_epochs = "" if self._epochs is None else f"/{self._epochs}"
        where = f"epoch {epoch + 1}{of_epochs}  step {step:,}/{self._total:,}"
        return f"{where}  loss {loss:.4g}  {samples_per_s:,.0f} samples/s"

    def _line(self, text: str) -> None:
        self._console.file.write(text + "\n")
        self._console.file.flush()


def _bar(console: Console, total_steps: int, first_step: int) -> Bar:
    # No refreshing thread beside the workers, and the user's own standard output stays where it is.
    bar = Bar(
        BarColumn(bar_width=20),
        TextColumn("{task.description}", markup=False),
        console=console,
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bar.add_task("starting", total=total_steps, completed=first_step)
    bar.start()
    return bar


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
