"""What a study would do and how long it would take, without doing it: ``manyhands study --dry-run``.

    run   = start of the workers + preparation + steps · step + evaluations · evaluation / min(workers, cores)
    step  = one process's step on a worker's share · max(1, workers · threads / cores)

A few steps are timed for each model, data set and kind of step, in this process, on the smallest and the largest share
that the study's workers take; between the two a straight line. Preparation (data, model) happens in the starting
process and in every worker, the workers' side by side as far as there are cores. Each transport's workers are started
to see how long that takes. Limits on a round, and rows that are there already, are taken into account.

Assumed: communication costs nothing, predicting takes no time, cores do not slow each other down, nothing is repeated
for noise, and nothing ends early at its target. Where communication is a good part of the step the study takes
accordingly longer.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manyhands import data as data_sets
from manyhands import verbs
from manyhands.communication import futex
from manyhands.contract import Batch, Strategy
from manyhands.data import Dataset
from manyhands.errors import BadInput, ManyhandsError
from manyhands.plan import Plan
from manyhands.studies import gradient_noise, simulating
from manyhands.studies.grid import Cell, Study
from manyhands.studies.planned import Planned, names, planned
from manyhands.studies.running import Rounds, order
from manyhands.task import Task
from manyhands.training.evaluation import chunk_of, evaluate
from manyhands.training.member import Member
from manyhands.training.preparation import prepare
from manyhands.training.run import Options
from manyhands.training.sampler import steps_per_epoch
from manyhands.training.team import team

JOB, NOTHING = f"{__name__}:job", f"{__name__}:nothing"
#: A share's step is timed for so long, or for so many steps, but at least once after a first one that is not counted.
SECONDS, STEPS = 0.25, 20
#: What simulating a cell takes: its share is timed for a quarter of a second, and the model is built.
SIMULATED_S = 1.0

#: What the estimate does not know, for whoever reads it.
ASSUMED = (
    "Timed in one process and divided among the workers: communication is free, cores do not slow each other down, "
    "and no run is repeated."
)


@dataclass(frozen=True)
class Timing:
    """What one process takes for one kind of step."""

    samples: int  # of training data
    prepare_s: float
    step_s: tuple[tuple[int, float], ...]  # (share, seconds), by share
    evaluate_s: float  # the whole test set

    def step(self, share: int) -> float:
        """On a straight line between what was timed."""
        (b0, t0), (b1, t1) = self.step_s[0], self.step_s[-1]
        return t0 if b0 == b1 else max(0.0, t0 + (t1 - t0) * (share - b0) / (b1 - b0))


@dataclass(frozen=True)
class Expected:
    """A cell and what one run of it is expected to take; None: it could not be timed, or cannot work."""

    planned: Planned
    seconds: float | None = None
    refused: str = ""
    untimed: str = ""  # why there is no time

    @property
    def cell(self) -> Cell:
        """The cell itself."""
        return self.planned.cell


@dataclass(frozen=True)
class DryRun:
    """Everything the study would do."""

    study: Study
    cells: tuple[Expected, ...]
    runs: int  # that are left to be done, limit considered
    left_out: int  # that would end after the limit
    done: int  # that have a row already
    seconds: float
    first_round_s: float  # which no limit bounds
    cores: int
    load_average: float  # of the minute before

    @property
    def exit_code(self) -> int:
        """0 if anything can work."""
        return 0 if any(not each.refused for each in self.cells) else 2

    def as_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return {
            "study": self.study.name,
            "runs": self.runs,
            "left_out": self.left_out,
            "done": self.done,
            "refused": sum(bool(each.refused) for each in self.cells),
            "seconds": self.seconds,
            "minutes": self.seconds / 60,
            "first_round_s": self.first_round_s,
            "assumed": ASSUMED,
            "cores": self.cores,
            "load_average": self.load_average,
            "cells": [
                {
                    "cell": each.cell.id,
                    "grids": list(each.cell.grids),
                    "measure": each.cell.measure,
                    "task": dict(each.cell.task),
                    "plan": dict(each.cell.plan),
                    "repeats": each.cell.repeats,
                    "run_s": each.seconds,
                    "refused": each.refused,
                    "untimed": each.untimed,
                }
                for each in self.cells
            ],
        }

    def lines(self) -> list[str]:
        """A line a cell, by grid, and the sum."""
        said = [f"Study {self.study.name}: {_counted(len(self.cells), 'cell')}"]
        grids: dict[str, list[Expected]] = {}
        for each in self.cells:
            grids.setdefault((each.cell.grids or ("",))[0], []).append(each)
        called = names([each.planned for each in self.cells])
        for name, cells in grids.items():
            width = max(len(called[each.cell.id]) for each in cells)
            said += ["", f"{name}:"] if name else [""]
            said += [f"  {called[each.cell.id]:<{width}}  {_fate(each)}" for each in cells]
        refused = sum(bool(each.refused) for each in self.cells)
        said += ["", f"{_counted(self.runs, 'run')}, {_duration(self.seconds)} on this machine."]
        if refused:
            said.append(f"{_counted(refused, 'cell')} refused; the reason stands beside it.")
        if self.done:
            said.append(f"{_counted(self.done, 'run')} done already.")
        if self.left_out:
            said.append(f"{_counted(self.left_out, 'run')} left out: that would end after {self.study.limit_s:g} s.")
        if self.study.limit_s is not None and self.first_round_s > self.study.limit_s:
            said.append(
                f"The first round alone takes {_duration(self.first_round_s)}, more than the study's limit of "
                f"{self.study.limit_s:g} s: every plan is measured once, whatever the limit."
            )
        untimed = sum(bool(each.untimed) for each in self.cells)
        if untimed:
            said.append(f"{_counted(untimed, 'cell')} could not be timed and counted as nothing.")
        if self.load_average > self.cores:
            said.append(
                f"The machine is busy: load average {self.load_average:.1f} on {_counted(self.cores, 'core')}. A run "
                "that it disturbs is repeated, so that the study may take more than twice as long."
            )
        return [*said, ASSUMED]


def estimate(
    study: Study, *, data_dir: str | os.PathLike[str] | None = None, done: Collection[tuple[str, int]] = ()
) -> DryRun:
    """What ``study`` would do; ``done`` are (cell, repeat) that need not run again."""
    decided = [planned(cell, simulating.cluster_for(cell, study)) for cell in study.cells()]
    watch = _Timings([each for each in decided if not each.refused and each.cell.measure != "simulate"], data_dir)
    cells = tuple(_expected(each, watch) for each in decided)
    seconds = {each.cell.id: each.seconds or 0.0 for each in cells}
    left = [
        (repeat, cell)
        for repeat, cell in order([each.cell for each in cells if not each.refused])
        if (cell.id, repeat) not in done
    ]
    clock = watch.first_start_s if left else 0.0
    rounds, runs, first_round_s = Rounds(study.limit_s, lambda: clock), 0, 0.0
    for repeat, cell in left:
        if not rounds.may_run(repeat):
            break
        clock += seconds[cell.id]
        runs += 1
        if repeat == left[0][0]:
            first_round_s = clock
    every = sum(each.cell.repeats for each in cells if not each.refused)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return DryRun(study, cells, runs, len(left) - runs, every - len(left), clock, first_round_s, futex.cores(), load)


def _expected(each: Planned, watch: _Timings) -> Expected:
    if each.refused:
        return Expected(each, refused=each.refused)
    if each.cell.measure == "simulate":
        return Expected(each, SIMULATED_S)
    try:
        timing = watch.of(each)
        return Expected(each, _noise_s(each, timing) if each.cell.measure == "noise" else watch.run_s(each))
    except BadInput as e:
        return Expected(each, refused=str(e))
    except Exception as e:  # the study goes on over a model that breaks, and so does its estimate
        return Expected(each, untimed=f"{type(e).__name__}: {e}")


class _Timings:
    """Times each kind of step once, and each transport's start."""

    def __init__(self, able: Iterable[Planned], data_dir: str | os.PathLike[str] | None) -> None:
        self._data_dir = None if data_dir is None else os.fspath(data_dir)
        self._shares: dict[tuple[Any, ...], set[int]] = {}
        self._found: dict[tuple[Any, ...], Timing | Exception] = {}
        self._starts: dict[str, tuple[int, float]] = {}
        self.first_start_s = 0.0  # of the processes from which workers are made, once a study
        for each in able:
            self._shares.setdefault(_kind(each), set()).add(_share(each))
            transport, workers = _plan(each).transport, _plan(each).workers or 1
            if workers > 1 and each.cell.measure == "train":
                self._starts[transport] = min(workers, self._starts.get(transport, (workers, 0.0))[0]), 0.0
        for transport, (workers, _) in self._starts.items():
            first, second = (_start_s(transport, workers) for _ in range(2))
            self._starts[transport] = workers, second
            self.first_start_s += max(0.0, first - second)

    def of(self, each: Planned) -> Timing:
        """Raises what the model raised."""
        kind = _kind(each)
        if kind not in self._found:
            try:
                self._found[kind] = _timed(each, sorted(self._shares[kind]), self._data_dir)
            except Exception as e:
                self._found[kind] = e
        found = self._found[kind]
        if isinstance(found, Exception):
            raise found
        return found

    def run_s(self, each: Planned) -> float:
        """See the file's head."""
        task, plan, timing = _task(each), _plan(each), self.of(each)
        workers, threads, cores = plan.workers or 1, plan.threads, futex.cores()
        steps = _steps(task, timing.samples)
        trained_s = steps * timing.step(_share(each)) * max(1.0, workers * threads / cores)
        if task.seconds is not None:
            trained_s = min(trained_s, task.seconds)
        evaluations = {"end": 1, "never": 0, "epoch": max(1, steps // steps_per_epoch(timing.samples, task.batch_size))}
        looks = each.cell.evaluate
        times = evaluations[looks] if isinstance(looks, str) else -(-steps // looks)
        counted, second = self._starts.get(plan.transport, (1, 0.0))
        return (
            second * max(1.0, workers / counted)
            + timing.prepare_s * (1 + max(1.0, workers / cores))
            + trained_s
            + times * timing.evaluate_s / min(workers, cores)
        )


def _noise_s(each: Planned, timing: Timing) -> float:
    """The draws: workers compute one after the other. The way to the place is passed once for many cells, and cheap."""
    workers = _plan(each).workers or 1
    draws_s = gradient_noise.DRAWS * workers * timing.step(_share(each))
    return draws_s + timing.prepare_s * workers


def _task(each: Planned) -> Task:
    assert each.task is not None
    return each.task


def _plan(each: Planned) -> Plan:
    assert each.plan is not None
    return each.plan


def _kind(each: Planned) -> tuple[Any, ...]:
    """What one process's step depends on beside the share; a learning rate is no part of that."""
    task, plan = _task(each), _plan(each)
    return (
        task.model,
        task.data,
        *(str(part).partition("(")[0] for part in (task.loss, task.optimizer)),
        task.clip is None,
        plan.threads,
        plan.precision,
        plan.micro_batches,
        plan.device,
    )


def _share(each: Planned) -> int:
    """The largest share of a batch that one worker computes."""
    plan = _plan(each)
    assert isinstance(plan.strategy, Strategy)
    return _task(each).batch_size if plan.strategy.whole_batch else -(-_task(each).batch_size // (plan.workers or 1))


def _steps(task: Task, samples: int) -> int:
    if task.steps is not None:
        return task.steps
    return (task.length["epochs"] or 1) * steps_per_epoch(samples, task.batch_size)


def _start_s(transport: str, workers: int) -> float:
    """Workers that do nothing; where that does not work, the study says so at the run."""
    began = time.perf_counter()
    try:
        with team(transport, workers, threads=1) as crew:
            crew.run(NOTHING)
    except ManyhandsError:
        return 0.0
    return time.perf_counter() - began


def nothing(member: Member) -> None:
    """The job of a worker whose start alone is timed."""
    member.comm.barrier()


def _timed(each: Planned, shares: Sequence[int], data_dir: str | None) -> Timing:
    task, plan = dataclasses.replace(_task(each), schedule=None), _plan(each)
    same = {name: getattr(plan, name) for name in ("threads", "precision", "micro_batches", "device")}
    alone = verbs.resolved(task, Plan(workers=1, transport="single", allocator="plain", **same)).plan
    with team("single", 1, threads=alone.threads, allocator="plain", live=(task, alone)) as crew:
        found = crew.run(JOB, sorted({shares[0], shares[-1]}), data_dir)[0]
    assert isinstance(found, Timing)
    return found


def job(member: Member, shares: list[int], data_dir: str | None) -> Timing:
    """Prepare as a run does, then steps on each share, then some of the test set."""
    task, plan = member.live
    options = Options(data_dir=data_dir, evaluate="never", progress=False)
    data_sets.load(task.data, folder=None if data_dir is None else Path(data_dir))  # so that files are in memory
    began = time.perf_counter()
    run = prepare(member, task, plan, options)
    prepare_s = time.perf_counter() - began
    train, test = run.splits.train, run.splits.test

    def step(share: int) -> Callable[[], object]:
        inputs, target = train.rows(torch.arange(min(share, len(train))))
        return lambda: run.worker.step(Batch(inputs, target, min(share, len(train))))

    step_s = tuple((share, _median_s(step(share))) for share in shares)
    evaluate_s = 0.0
    if test is not None:
        chunk = chunk_of(max(shares, default=1))
        part = _First(test, min(chunk, len(test)))
        answer = functools.partial(evaluate, run.model, run.loss, part, run.comm, chunk=chunk)
        evaluate_s = _median_s(answer) * len(test) / len(part)
    return Timing(len(train), prepare_s, step_s, evaluate_s)


def _median_s(step: Callable[[], object]) -> float:
    step()  # the first one fills caches
    times: list[float] = []
    while not times or (sum(times) < SECONDS and len(times) < STEPS):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@dataclass(frozen=True)
class _First:
    """The first samples of a data set."""

    whole: Dataset
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> tuple[Any, Any]:
        return self.whole[index]

    def rows(self, indices: torch.Tensor) -> tuple[Any, Any]:
        return self.whole.rows(indices)


def _fate(each: Expected) -> str:
    if each.refused:
        return f"refused: {' '.join(each.refused.split())}"
    times = f"{each.cell.repeats} × " if each.cell.repeats > 1 else ""
    return f"{times}{_seconds(each.seconds)}" if each.seconds is not None else f"{times}not timed: {each.untimed}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def _duration(seconds: float) -> str:
    return f"about {seconds / 60:.1f} minutes" if seconds >= 6 else "a few seconds"


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
