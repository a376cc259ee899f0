"""From rows to one line a cell: medians over repeats, and how each compares with one worker.

    step time     median over repeats of each run's median, tenth and ninetieth percentile
    samples/s     global batch / step time
    speed-up      samples/s over those of the base; a ratio for each repeat, and the median of the ratios
    efficiency    speed-up / (cores used / cores used by the base),  cores used = workers × threads

Repeats go round all cells in turn, so two runs of the same repeat lie close in time, and their ratio is steadier than
either on a machine whose speed drifts. A repeat that other work disturbed (`Row.noisy`) is left out of the ratios where
two quiet ones remain. The base is one worker of the same strategy at the same task and batch (the same batch per worker
where the study fixes that: weak scaling), with the fewest threads. One worker is plain SGD under every strategy, so
another strategy's will do where there is none of its own.

Step time and speed-up have a 95 % interval by the bootstrap over repeats (`manyhands.studies.fits`), where there are
two or more. A cell that measures its update's noise has that, and no times.

A plan that uses more cores than there are is oversubscribed: right, and no basis for a statement about speed.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from manyhands.contract import Measurement, Spread, StepParts
from manyhands.studies.fits import CannotFit, Estimate, bootstrap, bootstrap_ratio
from manyhands.studies.grid import PER_WORKER, Cell
from manyhands.studies.row import Row, Status

_K = TypeVar("_K")

#: What a base may differ in: these are what is compared.
_COMPARED = ("strategy", "workers", "threads", "transport", "mesh", "shard")


@dataclass(frozen=True)
class Line:
    """One cell of a study, over all its repeats."""

    cell: Cell
    status: Status  # done if any repeat is
    strategy: str
    workers: int | None
    threads: int | None
    transport: str | None
    cores: int
    repeats: int  # done
    failures: int
    reason: str = ""
    noisy: int = 0  # runs that were beyond the bound on disturbance, also when repeated
    noisy_repeats: frozenset[int] = frozenset()  # which
    disturbance: float | None = None  # the highest of a run that counts
    measured: Measurement | None = None  # of the first repeat, for what does not vary: data, parameters, global batch
    step_s: Spread | None = None
    step_interval: Estimate | None = None  # of the median step, with its 95 % interval
    medians_s: tuple[tuple[int, float], ...] = ()  # (repeat, median step)
    parts_s: StepParts | None = None
    accuracy: float | None = None
    sent_B_per_step: float | None = None
    moved_B_per_step: float | None = None  # None where the transport does not know it
    peak_memory_B: float | None = None  # of the largest worker
    staleness_mean: float | None = None
    staleness_max: int | None = None
    compression_ratio: float | None = None  # see `contract.Measurement`; None where nothing was compressed
    compression_error: float | None = None
    compression_kept: float | None = None
    compression_s: float | None = None
    wait_s: float | None = None  # of the worker that waits longest, a step
    predicted_step_s: float | None = None  # before it was run
    prediction_error: float | None = None  # its error bar, relative
    unpredicted: str = ""  # why there is none
    simulated_on: str = ""
    base: Line | None = None
    speed_up: float | None = None
    speed_up_interval: Estimate | None = None
    noise: tuple[Mapping[str, float], ...] = ()  # of a noise cell: a `gradient_noise.Noise` for each repeat

    @property
    def cores_used(self) -> int:
        """Workers × threads."""
        return (self.workers or 1) * (self.threads or 1)

    @property
    def oversubscribed(self) -> bool:
        """Whether that is more than there are; of simulated workers each has its own."""
        return self.cores_used > self.cores and self.cell.measure != "simulate"

    @property
    def samples_per_s(self) -> float | None:
        """At the median step time."""
        return _speed(self, self.step_s.median) if self.step_s else None

    @property
    def sent_B_per_sample(self) -> float | None:
        """By all workers together."""
        if self.measured is None or self.sent_B_per_step is None:
            return None
        return self.sent_B_per_step * self.measured.workers / self.measured.global_batch

    @property
    def efficiency(self) -> float | None:
        """Speed-up for each core that is used beyond the base's."""
        if self.speed_up is None or self.base is None:
            return None
        return self.speed_up * self.base.cores_used / self.cores_used

    @property
    def prediction_off(self) -> float | None:
        """Predicted over measured step, less 1."""
        if self.predicted_step_s is None or self.step_s is None or not self.step_s.median:
            return None
        return self.predicted_step_s / self.step_s.median - 1

    @property
    def name(self) -> str:
        """How sentences call it."""
        return called(self.cell, self.workers, self.threads, self.transport)


def counted(number: int, noun: str) -> str:
    """``1 worker``, ``2 workers``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def called(cell: Cell, workers: int | None, threads: int | None, transport: str | None) -> str:
    """A cell in words, from what was decided for it."""
    text = str(cell.plan.get("strategy", "synchronous"))
    if workers is not None:
        text += f" with {counted(workers, 'worker')}"
    if (threads or 1) > 1:
        text += f" of {threads} threads"
    if transport not in (None, "single"):
        text += f" on {transport}"
    return text


def summarize(cells: Sequence[Cell], rows: Iterable[Row]) -> tuple[Line, ...]:
    """A line for each cell that has a row, in the order of the cells."""
    by_cell: dict[str, list[Row]] = {}
    for row in rows:
        by_cell.setdefault(row.cell, []).append(row)
    lines = [_line(cell, by_cell[cell.id]) for cell in cells if cell.id in by_cell]
    return tuple(_compared(line, lines) for line in lines)


def _line(cell: Cell, rows: list[Row]) -> Line:
    done = sorted((r for r in rows if r.status == "done"), key=lambda r: r.repeat)
    wrong = [r for r in rows if r.status != "done"]
    last = (done or rows)[-1]
    line = Line(
        cell=cell,
        status="done" if done else last.status,
        strategy=str(cell.plan.get("strategy", "synchronous")),
        workers=last.workers,
        threads=last.threads,
        transport=last.transport,
        cores=last.cores,
        repeats=len(done),
        failures=sum(r.status == "failed" for r in wrong),
        reason=wrong[-1].reason if wrong else "",
        noisy=sum(r.noisy for r in done),
        noisy_repeats=frozenset(r.repeat for r in done if r.noisy),
        disturbance=max((r.disturbance for r in done if r.disturbance is not None), default=None),
        noise=tuple(r.noise for r in done if r.noise is not None),
        predicted_step_s=_median(r.predicted_step_s for r in rows),
        prediction_error=_median(r.prediction_error for r in rows),
        unpredicted=last.unpredicted,
        simulated_on=last.simulated_on,
    )
    measured = [(r.repeat, r.measurement) for r in done if r.measurement is not None]
    if not measured:
        return line
    found = [m for _, m in measured]
    return dataclasses.replace(
        line,
        measured=found[0],
        step_s=Spread(*(statistics.median(getattr(m.step_s, k) for m in found) for k in ("median", "p10", "p90"))),
        step_interval=_known(bootstrap(m.step_s.median for m in found)),
        medians_s=tuple((repeat, m.step_s.median) for repeat, m in measured),
        parts_s=StepParts(
            *(statistics.median(getattr(m.step_parts_s, f.name) for m in found) for f in dataclasses.fields(StepParts))
        ),
        accuracy=_median(m.test_accuracy for m in found),
        sent_B_per_step=statistics.median(m.sent_B_per_step for m in found),
        moved_B_per_step=_median(m.moved_B_per_step for m in found),
        staleness_mean=_median(m.staleness_mean for m in found),
        staleness_max=max((m.staleness_max for m in found if m.staleness_max is not None), default=None),
        compression_ratio=_median(m.compression_ratio for m in found),
        compression_error=_median(m.compression_error for m in found),
        compression_kept=_median(m.compression_kept for m in found),
        compression_s=_median(m.compression_s for m in found),
        wait_s=_median(max(m.wait_s_by_worker, default=None) for m in found),
        peak_memory_B=statistics.median(m.peak_memory_B for m in found),
    )


def _compared(line: Line, lines: Sequence[Line]) -> Line:
    base = _base(line, lines)
    if base is None or line.oversubscribed:
        return line
    if line.cell.measure == "simulate":  # whose costs are medians over the base's runs
        return dataclasses.replace(line, base=base, speed_up=(line.samples_per_s or 0) / (base.samples_per_s or 1))
    found = _speed_up(line, base)
    return dataclasses.replace(line, base=base, speed_up=found.value if found else None, speed_up_interval=found)


def _base(line: Line, lines: Sequence[Line]) -> Line | None:
    if line.measured is None:
        return None
    candidates = [
        other
        for other in lines
        if other.measured is not None
        and other.cell.measure == "train"
        and other.workers == 1
        and not other.oversubscribed
        and _task(other) == _task(line)
        and (PER_WORKER in line.cell.task or other.measured.global_batch == line.measured.global_batch)
    ]
    return min(candidates, key=lambda other: _distance(line, other), default=None)


def _task(line: Line) -> dict[str, object]:
    return {k: v for k, v in line.cell.task.items() if k != "batch_size"}


def _distance(line: Line, other: Line) -> tuple[int, bool, bool, int]:
    keys = (line.cell.plan.keys() | other.cell.plan.keys()) - set(_COMPARED)
    differ = sum(line.cell.plan.get(k) != other.cell.plan.get(k) for k in keys)
    return differ, other.strategy != line.strategy, family(other) != family(line), other.threads or 1


def family(line: Line) -> str:
    """The strategy without its options."""
    return line.strategy.partition("(")[0]


def _speed(line: Line, step_s: float) -> float:
    assert line.measured is not None
    return line.measured.global_batch / step_s if step_s > 0 else 0.0


def _speed_up(line: Line, base: Line) -> Estimate | None:
    return _known(bootstrap_ratio((_speed(line, mine), _speed(base, its)) for mine, its in paired_s(line, base)))


def paired_s(line: Line, base: Line) -> list[tuple[float, float]]:
    """Median steps of the rounds that both have: the line's and its base's."""
    mine, theirs = dict(line.medians_s), dict(base.medians_s)
    both = [n for n, step_s in mine.items() if n in theirs and min(step_s, theirs[n]) > 0]
    return [(mine[n], theirs[n]) for n in quiet(both, line.noisy_repeats | base.noisy_repeats)]


def quiet(runs: Sequence[_K], noisy: Collection[_K]) -> list[_K]:
    """Those that nothing disturbed, if they are two at least; else all, as one run is no sample."""
    found = [run for run in runs if run not in noisy]
    return found if len(found) >= 2 else list(runs)


def _median(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _known(found: Estimate | CannotFit) -> Estimate | None:
    return found if isinstance(found, Estimate) else None
