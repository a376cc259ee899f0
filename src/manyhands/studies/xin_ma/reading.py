"""The study's rows by what they are an answer to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from manyhands.contract import StepParts
from manyhands.studies.fits import Estimate, SlopeFit, bootstrap, slope, student_t
from manyhands.studies.grid import PER_WORKER, Cell, Study
from manyhands.studies.row import Row
from manyhands.studies.xin_ma import SETTINGS, VARIANTS


@dataclass(frozen=True)
class Trial:
    """One finished run in the slides' words."""

    grids: tuple[str, ...]
    setting: str  # a Setting's name
    variant: str  # a Variant's name, or the strategy where it is none
    nodes: int
    batch: int  # a node's where each has its own, else the one that is divided or shared
    transport: str
    seed: int
    row: Row

    @property
    def accuracy(self) -> float | None:
        """On the test set, at the end."""
        return self.row.measurement.test_accuracy if self.row.measurement else None

    @property
    def step_s(self) -> float:
        """Median of its steps."""
        assert self.row.measurement is not None
        return self.row.measurement.step_s.median

    @property
    def parts_s(self) -> StepParts:
        """Where a step's time goes."""
        assert self.row.measurement is not None
        return self.row.measurement.step_parts_s

    @property
    def overhead(self) -> float:
        """The share of a step that is communication and waiting."""
        parts = self.parts_s
        total = parts.compute + parts.communicate + parts.wait + parts.update
        return (parts.communicate + parts.wait) / total if total else 0.0

    @property
    def oversubscribed(self) -> bool:
        """More workers than cores: no basis for a statement about time."""
        return self.nodes * (self.row.threads or 1) > self.row.cores


def trials(study: Study, rows: Iterable[Row]) -> list[Trial]:
    """Every finished run."""
    cells = {cell.id: cell for cell in study.cells()}
    return [_trial(cells[row.cell], row) for row in rows if row.status == "done" and row.cell in cells]


def _trial(cell: Cell, row: Row) -> Trial:
    own = PER_WORKER in cell.task
    batch = cell.task[PER_WORKER] if own else cell.task.get("batch_size", 0)
    strategy = str(cell.plan.get("strategy"))
    variant = next((v.name for v in VARIANTS if v.strategy == strategy and v.own_batch == own), strategy)
    squared = str(cell.task.get("loss", "")).startswith("squared_error")
    setting = next((s.name for s in SETTINGS if s.model == cell.task.get("model") and s.squared == squared), "")
    nodes = int(cell.plan.get("workers", 1))
    return Trial(
        cell.grids, setting, variant, nodes, int(batch), row.transport or "", int(cell.task.get("seed", 0)), row
    )


def of(found: Iterable[Trial], grid: str, **wanted: Any) -> list[Trial]:
    """Those of ``grid`` whose fields are as said."""
    return [t for t in found if grid in t.grids and all(getattr(t, k) == v for k, v in wanted.items())]


def settings(found: Sequence[Trial], grid: str) -> list[str]:
    """Names of the settings that ``grid`` was run for."""
    return list(dict.fromkeys(t.setting for t in found if grid in t.grids))


def median(values: Sequence[float]) -> Estimate:
    """With the bootstrap's 95 % interval over repeats."""
    found = bootstrap(list(values))
    return found if isinstance(found, Estimate) else Estimate(statistics.median(values))


def ratio_of(pairs: Sequence[tuple[float, float]]) -> Estimate:
    """The geometric mean of a/b with Student's 95 % interval, on logarithms; none for fewer than three pairs."""
    logs = [math.log(a / b) for a, b in pairs]
    middle = statistics.fmean(logs)
    if len(logs) < 3:
        return Estimate(math.exp(middle))
    half = student_t(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Estimate(math.exp(middle), math.exp(middle - half), math.exp(middle + half))


def per_doubling(points: Iterable[tuple[float, float]]) -> SlopeFit | None:
    """How much y changes with each doubling of x, or None where that cannot be said."""
    fit = slope([(math.log2(x), y) for x, y in points])
    return fit if isinstance(fit, SlopeFit) and fit.slope.low is not None else None


def with_accuracy(found: Iterable[Trial]) -> Iterator[tuple[Trial, float]]:
    """Trials that have one."""
    return ((t, t.accuracy) for t in found if t.accuracy is not None)
