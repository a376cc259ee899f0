"""What the steps of a run cost this rank: times, their parts, bytes."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from manyhands.communication.compression.meter import Meter
from manyhands.contract import Spread, StepParts
from manyhands.training.run import Run

#: Of a long run every step time is kept up to this many, which is plenty for a median.
STEP_TIMES = 200_000
#: Steps before times count: allocators, caches and the kernel's page tables settle.
WARM_UP = 5


@dataclass
class Cost:
    """What the steps of this process cost this rank; begun before the first of them, `measured` after the last."""

    first_step: int
    began: float
    trained_before_s: float
    sent_before_B: int
    parts_before: tuple[float, ...]
    parts_from: int = 0  # steps before the parts count
    times: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)  # in a pipeline: of each step the part without compute or update
    busy_before_s: float = 0.0
    seen: int = 0  # samples, of all ranks
    moved_B: int = 0
    compressed_before: Meter = field(default_factory=Meter)
    compressed_logged: Meter = field(default_factory=Meter)
    logged_step: int = 0

    @classmethod
    def begun(cls, run: Run) -> Cost:
        """Now."""
        sent_B = _sent_B(run)
        step, now, meter = run.cursor.step, time.perf_counter(), run.comm.counters.compression
        begun = cls(step, now, run.trained_s, sent_B, _spent(run), busy_before_s=_busy_s(run))
        begun.compressed_before, begun.compressed_logged, begun.logged_step = meter.copy(), meter.copy(), step
        return begun

    def took(self, run: Run, step_s: float) -> None:
        """One more step; parts count from the end of the warm-up, as times do."""
        if len(self.times) < STEP_TIMES:
            self.times.append(step_s)
            if run.comm.mesh["pipeline"] > 1:
                busy_s = _busy_s(run)
                self.idle.append(1 - (busy_s - self.busy_before_s) / step_s)
                self.busy_before_s = busy_s
            if len(self.times) == WARM_UP:
                self.parts_before, self.parts_from = _spent(run), WARM_UP

    @contextlib.contextmanager
    def aside(self, run: Run) -> Iterator[None]:
        """What is spent inside, in an evaluation or a checkpoint, is no part of a step."""
        before, sent_B = _spent(run), _sent_B(run)
        yield
        self.sent_before_B += _sent_B(run) - sent_B
        spent = (now - then for now, then in zip(_spent(run), before, strict=True))
        self.parts_before = tuple(x + s for x, s in zip(self.parts_before, spent, strict=True))
        self.busy_before_s = _busy_s(run)

    def compressing(self, run: Run) -> dict[str, float]:
        """What compressing has come to since this was last asked; error and kept mass if they were looked at since."""
        since, steps = run.comm.counters.compression - self.compressed_logged, run.cursor.step - self.logged_step
        self.compressed_logged, self.logged_step = run.comm.counters.compression.copy(), run.cursor.step
        return {k: v for k, v in _compressed(since, steps).items() if v is not None}

    def measured(self, run: Run, wall_s: float) -> dict[str, Any]:
        """The figures of the summary that are about cost."""
        steps = run.cursor.step - self.first_step
        trained_s = run.trained_s - self.trained_before_s
        sent_B = _sent_B(run) - self.sent_before_B
        return {
            "samples_per_s": self.seen / trained_s if steps else 0.0,
            "step_s": Spread.of(self.times[self.parts_from :] or self.times),
            "step_parts_s": _parts(run, self.parts_before, max(steps - self.parts_from, 1)),
            "sent_B_per_step": sent_B / steps if steps else 0.0,
            "moved_B_per_step": self.moved_B / steps if steps and run.comm.counts_moved else None,
            "wall_s": wall_s,
            "bubble_by_worker": self._bubble(),
            **_compressed(run.comm.counters.compression - self.compressed_before, steps),
        }

    def _bubble(self) -> list[float]:
        """This rank's, of a step's time; nothing where there is no pipeline."""
        idle = self.idle[self.parts_from :] or self.idle
        return [statistics.median(idle)] if idle else []


def _compressed(meter: Meter, steps: int) -> dict[str, float | None]:
    """The summary's figures of compression."""
    return {
        "compression_ratio": meter.ratio,
        "compression_error": meter.error,
        "compression_kept": meter.kept,
        "compression_s": meter.coding_s / steps if meter.used and steps else None,
    }


def _busy_s(run: Run) -> float:
    """What this rank has computed and updated so far."""
    return run.replica.compute_s + run.replica.update_s


def _sent_B(run: Run) -> int:
    """Payload of the strategy, and of the cut where there is one."""
    return sum(run.comm.counters.sent_B(purpose) for purpose in ("step", "cut"))


def _spent(run: Run) -> tuple[float, float, float, float]:
    counters, replica = run.comm.counters, run.replica
    return replica.compute_s, counters.communicate_s, counters.wait_s, replica.update_s


def _parts(run: Run, before: tuple[float, ...], steps: int) -> StepParts:
    return StepParts(*((now - then) / steps for now, then in zip(_spent(run), before, strict=True)))
