"""What stands against what in charts and comparisons: a plan on a task, over all its seeds and repeats.

A line is a cell, and another seed is another cell. A contender is all the lines that differ in nothing but the seed, so
that its runs are as many as there are seeds × repeats. Two contenders are compared run by run, each with the other's of
the same seed and round: neither the seed's luck nor a machine that drifts from round to round is in the ratio.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from manyhands.contract import StepParts
from manyhands.studies.fits import Estimate, student_t
from manyhands.studies.grid import PER_WORKER
from manyhands.studies.row import Row
from manyhands.studies.summary import Line, counted, quiet

#: One run of a contender: its seed and its round.
Run = tuple[int, int]

#: Seeds from which on their means are a sample; with two Student's t is 12.7, and nothing would differ.
SEEDS = 3

#: Of a plan, what a label says by itself.
_SAID = ("strategy", "workers", "threads", "transport", "mesh")

#: An interval whose ends lie further apart than this factor is of no use to anybody.
WIDE = 10


@dataclass(frozen=True)
class Contender:
    """One plan on one task. At least one of its runs is done; those that are not have no part in any figure."""

    lines: tuple[Line, ...]
    rows: Mapping[Run, Row] = field(repr=False)
    name: str = ""  # as sentences and charts call it, among the others of its study
    short: str = ""  # the same without its task, which a chart of one task says in its title
    group: str = ""  # its task among the others', empty where there is one only

    @property
    def strategy(self) -> str:
        """With its options."""
        return self.lines[0].strategy

    @property
    def workers(self) -> int:
        """How many."""
        return self.lines[0].workers or 1

    @property
    def threads(self) -> int:
        """Of each worker."""
        return self.lines[0].threads or 1

    @property
    def cores_used(self) -> int:
        """Workers × threads."""
        return self.lines[0].cores_used

    @property
    def oversubscribed(self) -> bool:
        """Whether that is more than there are: right, and no basis for a statement about speed."""
        return any(line.oversubscribed for line in self.lines)

    @property
    def alone(self) -> bool:
        """One process: plain SGD, whatever the strategy is called."""
        return self.workers == 1

    @property
    def batch(self) -> int:
        """Samples of a step, over all workers."""
        return next(line.measured.global_batch for line in self.lines if line.measured is not None)

    @property
    def step_s(self) -> float:
        """Median over seeds of the lines' medians."""
        return statistics.median(line.step_s.median for line in self.lines if line.step_s is not None)

    @property
    def samples_per_s(self) -> float:
        """At that step time."""
        return self.batch / self.step_s if self.step_s > 0 else 0.0

    @property
    def parts_s(self) -> StepParts:
        """Of a step, medians over seeds."""
        found = [line.parts_s for line in self.lines if line.parts_s is not None]
        return StepParts(
            *(statistics.median(getattr(p, k) for p in found) for k in ("compute", "communicate", "wait", "update"))
        )

    @property
    def sent_B_per_step(self) -> float:
        """Payload that one worker sends."""
        return statistics.median(line.sent_B_per_step for line in self.lines if line.sent_B_per_step is not None)

    @property
    def peak_memory_B(self) -> int:
        """The largest of any run."""
        return max(m.peak_memory_B for m in (r.measurement for r in self.rows.values()) if m is not None)

    @property
    def accuracies(self) -> dict[Run, float]:
        """At the end of each run; empty where the task has none."""
        found = {run: r.measurement.test_accuracy for run, r in self.rows.items() if r.measurement is not None}
        return {run: value for run, value in found.items() if value is not None}

    @property
    def speeds(self) -> dict[Run, float]:
        """Samples per second of each run, at its median step."""
        found = {}
        for run, row in self.rows.items():
            assert row.measurement is not None
            if row.measurement.step_s.median > 0:
                found[run] = row.measurement.global_batch / row.measurement.step_s.median
        return found

    @property
    def noisy(self) -> frozenset[Run]:
        """Runs that other work disturbed."""
        return frozenset(run for run, row in self.rows.items() if row.noisy)

    @property
    def failures(self) -> int:
        """Runs that came to nothing."""
        return sum(line.failures for line in self.lines)


def contenders(lines: Sequence[Line], rows: Iterable[Row]) -> tuple[Contender, ...]:
    """Those that have a run to show, in the order of the lines."""
    by_cell: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == "done" and row.measurement is not None and row.measure == "train":
            by_cell.setdefault(row.cell, []).append(row)
    pooled: dict[str, list[Line]] = {}
    for line in lines:
        if line.measured is not None and line.cell.id in by_cell:
            pooled.setdefault(plan_of(line), []).append(line)
    found = []
    for alike in pooled.values():
        runs = {
            (_seed(line), row.repeat): row
            for line in alike
            for row in sorted(by_cell[line.cell.id], key=lambda r: r.repeat)
        }
        found.append(Contender(tuple(alike), runs))
    return _named(found)


def _seed(line: Line) -> int:
    seed = line.cell.task.get("seed", 0)
    return seed if isinstance(seed, int) else 0


def task_of(of: Contender) -> dict[str, Any]:
    """The task's table without the seed."""
    return {k: v for k, v in of.lines[0].cell.task.items() if k != "seed"}


def plan_of(line: Line) -> str:
    """What lines of one contender have in common: all but the seed."""
    task = {k: v for k, v in line.cell.task.items() if k != "seed"}
    return repr((sorted(task.items()), sorted(line.cell.plan.items())))


def by_task(found: Iterable[Contender]) -> dict[str, list[Contender]]:
    """By the name of the task among the study's."""
    groups: dict[str, list[Contender]] = {}
    for each in found:
        groups.setdefault(each.group, []).append(each)
    return groups


# -- names -------------------------------------------------------------------------------------------------------------


def _named(found: Sequence[Contender]) -> tuple[Contender, ...]:
    """Each with the shortest name that tells it from the others."""
    tasks = _varying([task_of(each) for each in found])
    plans = [k for k in _varying([dict(each.lines[0].cell.plan) for each in found]) if k not in _SAID]
    several = len({each.strategy for each in found if each.alone}) > 1
    threads = len({each.threads for each in found if not each.alone}) > 1
    transports = len({each.lines[0].transport for each in found if not each.alone}) > 1
    named = []
    for each in found:
        short = _short(each, several=several, threads=threads, transports=transports, plans=plans)
        group = ", ".join(_said(k, task_of(each).get(k)) for k in tasks)
        name = (
            f"{short} at {group}"
            if tasks in (["batch_size"], [PER_WORKER])
            else f"{short} ({group})"
            if group
            else short
        )
        named.append(Contender(each.lines, each.rows, name, short, group))
    return tuple(named)


def _short(of: Contender, *, several: bool, threads: bool, transports: bool, plans: Sequence[str]) -> str:
    plan = of.lines[0].cell.plan
    if of.alone and not several:
        text = f"one process with {counted(of.threads, 'thread')}"
    else:
        text = f"{of.strategy} with {counted(of.workers, 'worker')}"
        if threads or (of.alone and of.threads > 1):
            text += f" of {counted(of.threads, 'thread')}"
    if transports and not of.alone:
        text += f" on {of.lines[0].transport}"
    return ", ".join([text, *(f"{k}={plan[k]}" for k in plans if k in plan)])


def _varying(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(k for table in tables for k in table)
    return [k for k in keys if len({repr(table.get(k)) for table in tables}) > 1]


def _said(key: str, value: Any) -> str:
    if key == "batch_size":
        return f"batch {value}"
    return f"{value} samples a worker" if key == PER_WORKER else f"{key.replace('_', ' ')} {value}"


# -- ratios ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio(Estimate):
    """How many times as much, and what that rests on."""

    pairs: int = 0  # of runs
    seeds: Mapping[int, float] = field(default_factory=dict, hash=False)  # each seed's own mean

    @property
    def over(self) -> str:
        """What the interval is one over."""
        return (
            counted(len(self.seeds), "seed") if len(self.seeds) >= SEEDS else f"{counted(self.pairs, 'pair')} of runs"
        )

    @property
    def surely_more(self) -> bool:
        """Whether the interval lies above 1; of fewer than `SEEDS` seeds each must say the same by itself."""
        each = len(self.seeds) >= SEEDS or all(mean > 1 for mean in self.seeds.values())
        return self.low is not None and self.low > 1 and each


def useless(of: Estimate) -> bool:
    """Whether the interval of what is above 0 is so wide that its ends say nothing."""
    return of.low is not None and of.high is not None and of.high > WIDE * of.low


def ratio(
    of: Mapping[Run, float], to: Mapping[Run, float], *, noisy: Collection[Run] = (), plans: int = 1
) -> Ratio | None:
    """The geometric mean of of/to over the runs that both have, with Student's 95 % interval; None without any.

    The interval is one of the logarithms (see `mean_of`), so that a ratio and its inverse say the same. ``noisy`` runs
    are left out where two others remain. ``plans``: from how many the best was picked, of which this is the ratio.
    """
    both = [run for run in of if run in to and of[run] > 0 and to[run] > 0]
    logs = {run: math.log(of[run] / to[run]) for run in quiet(both, noisy)}
    found = mean_of(logs, plans=plans)
    if found is None:
        return None
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    seeds = {seed: math.exp(mean) for seed, mean in by_seed(logs).items()}
    return Ratio(math.exp(found.value), low, high, pairs=len(logs), seeds=seeds)


def mean_of(
    values: Mapping[Run, float],
    *,
    form: Callable[[float], float] = float,
    back: Callable[[float], float] = float,
    plans: int = 1,
) -> Estimate | None:
    """The mean and Student's 95 % interval, ``form`` being what is normal; one value has no interval, none no mean.

    Of three seeds or more it is an interval over the seeds' means. Of fewer it is one over runs: those of one seed
    count as independent then, so that it says how times repeat and not what another seed would do.

    Of the best of m ``plans`` the interval has 1 − 0.05/m instead of 95 % (Bonferroni): all m hold together then.
    """
    if not values:
        return None
    formed = {run: form(value) for run, value in values.items()}
    seeds = by_seed(formed)
    sample = list(seeds.values() if len(seeds) >= SEEDS else formed.values())
    mean = statistics.fmean(sample)
    if len(sample) == 1:
        return Estimate(back(mean))
    t = student_t(len(sample) - 1, 1 - 0.025 / max(plans, 1))
    half = t * statistics.stdev(sample) / math.sqrt(len(sample))
    return Estimate(back(mean), back(mean - half), back(mean + half))


def by_seed(values: Mapping[Run, float]) -> dict[int, float]:
    """The mean of each seed's runs."""
    seeds: dict[int, list[float]] = {}
    for (seed, _), value in values.items():
        seeds.setdefault(seed, []).append(value)
    return {seed: statistics.fmean(each) for seed, each in seeds.items()}
