"""Workers that a study does not have: its cells go on in virtual time, ``manyhands study scaling --simulate 2..1024``.

Beside each grid that trains, `extended` puts one of more workers whose cells are simulated (`verbs.simulate`, sizes
only) once the others are measured. What a step costs comes from the study's own measured step of one worker on the same
task. Where a simulated worker's share is smaller, the ratio of both shares' steps is measured here for a quarter of a
second each:

    compute(share) = compute measured of one worker · here(share) / here(its batch)

Approximation: no two workers of a node disturb each other, and all steps take equally long. Simulated rows are kept
apart (``measure = "simulate"``); no fit and no comparison of measured plans sees them.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from manyhands import data as data_sets
from manyhands import verbs
from manyhands.cluster import Cluster, Figure, load
from manyhands.communication import futex
from manyhands.contract import Strategy
from manyhands.errors import BadInput
from manyhands.plan import Plan
from manyhands.simulation import values
from manyhands.simulation.pace import StepCost
from manyhands.studies.circumstances import Started
from manyhands.studies.grid import Cell, Grid, Study, Value
from manyhands.studies.planned import planned
from manyhands.studies.row import Row
from manyhands.studies.summary import Line, summarize
from manyhands.studies.table import in_ms
from manyhands.task import Task

#: Between nodes like this one, when nobody names a cluster.
BETWEEN = "ethernet_10g"
#: Factors that say where real workers run.
_PLACES = ("plan.workers", "plan.transport", "plan.threads")


def counts(text: str) -> tuple[int, ...]:
    """``2..1024`` is 2, 4, 8 … 1024."""
    first, dots, last = text.partition("..")
    if not (dots and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise BadInput(
            f"simulate={text!r}: it is FIRST..LAST, numbers of workers that double. E.g. --simulate 2..1024."
        )
    found, each = [], int(first)
    while each < int(last):
        found.append(each)
        each *= 2
    return (*found, int(last))


def extended(study: Study, workers: str, cluster: str = "") -> Study:
    """The study with simulated cells of so many ``workers``; those that it had already are left out."""
    if study.analysis != "general":
        raise BadInput(
            f"simulate={workers!r} for study {study.name}: its analysis {study.analysis} shows no simulated plans. "
            "Use scaling, or a study of your own."
        )
    many = counts(workers)
    cluster_of(cluster).nodes_for(many[-1])
    measured = [grid for grid in study.grids or (Grid(),) if grid.measure != "simulate"]
    more: dict[str, Grid] = {}
    for grid in measured:
        if grid.measure == "train":
            factors: dict[str, tuple[Value, ...]] = {k: v for k, v in grid.factors.items() if k not in _PLACES}
            if "transport" in study.plan:
                factors["plan.transport"] = ("auto",)
            found = Grid({**factors, "plan.workers": many}, grid.name, 1, "simulate", timed=False)
            more.setdefault(repr(found), found)
    return dataclasses.replace(study, grids=(*measured, *more.values()), cluster=cluster)


@functools.cache
def cluster_of(name: str) -> Cluster:
    """By its name or file; without one, nodes like this machine: as calibrated, or with assumed figures."""
    if name:
        return load(name)
    from manyhands.modelling import calibration

    between, here, cores = load(BETWEEN), calibration.cached(), futex.cores()
    source = "this machine's"
    like = between if here is None else here
    outer = dataclasses.replace(between.link("between"), shared_by=Figure(cores, "count", "one port a node"))
    return dataclasses.replace(
        like,
        name=f"nodes of {cores} cores like this machine, {BETWEEN} between them",
        node=dataclasses.replace(
            like.node, devices=Figure(cores, "count", source), cores=Figure(cores, "count", source)
        ),
        links={"within": like.links.get("within", between.link("within")), "between": outer},
        nodes=None,
        measured=None,
    )


def cluster_for(cell: Cell, study: Study) -> Cluster | None:
    """What a cell is simulated on; None: it is not."""
    return cluster_of(study.cluster) if cell.measure == "simulate" else None


def rows(study: Study, measured: Iterable[Row], *, data_dir: str | os.PathLike[str] | None = None) -> Iterator[Row]:
    """A row for each simulated cell, anew: they cost little, and what they go on from may have changed."""
    cells = [cell for cell in study.cells() if cell.measure == "simulate"]
    simulator = Simulator(study, summarize(study.cells(), measured), data_dir) if cells else None
    noted = logging.getLogger(verbs.__name__)
    before = noted.level
    noted.setLevel(logging.ERROR)  # what is to be known of a plan was said when it was measured
    try:
        for cell in cells:
            assert simulator is not None
            started = Started.now(study.name, cell, 1)
            each = planned(cell, cluster_of(study.cluster))
            try:
                yield started.row("refused", reason=each.refused) if each.refused else simulator.row(started, cell)
            except Exception as e:
                yield started.not_done(e, plan=each.plan)
    finally:
        noted.setLevel(before)


class Simulator:
    """Simulates cells of a study whose other cells have ``lines``."""

    def __init__(self, study: Study, lines: Sequence[Line], data_dir: str | os.PathLike[str] | None) -> None:
        self._study, self._data_dir = study, data_dir
        self._lines = [line for line in lines if line.cell.measure == "train" and line.measured is not None]
        self._here: dict[tuple[str, int], StepCost] = {}

    def row(self, started: Started, cell: Cell) -> Row:
        """Of one cell; raises `BadInput` where there is nothing to go on from."""
        task, plan = cell.make()
        base = self._base(cell)
        assert base.measured is not None
        assert base.step_s is not None
        assert base.parts_s is not None
        update_s = base.parts_s.update
        compute_s = max(base.step_s.median - update_s, 0.0)  # whatever else there is of a step is every worker's, too
        whole = base.measured.global_batch
        share = task.batch_size if _sees_all(plan) else -(-task.batch_size // (plan.workers or 1))
        if share != whole:
            compute_s *= self._measured(task, plan, share).compute_s / self._measured(task, plan, whole).compute_s
        on = cluster_of(self._study.cluster)
        found = verbs.simulate(
            task,
            plan,
            on,
            compute_s=compute_s,
            update_s=update_s,
            sizes=True,
            evaluate="never",
            data_dir=self._data_dir,
        )
        said = f"{on.name}; a step of one worker, {in_ms(base.step_s.median)} ms measured"
        if share != whole:
            said += f", is {in_ms(compute_s + update_s)} ms on its share of {share}"
        return started.row("done", plan=found.plan, measurement=found.summary, simulated_on=said)

    def _base(self, cell: Cell) -> Line:
        """The measured step of one worker on the same task."""
        alone = [line for line in self._lines if line.workers == 1 and dict(line.cell.task) == dict(cell.task)]
        strategy = str(cell.plan.get("strategy", "synchronous"))
        if not alone:
            raise BadInput(
                "simulated workers take the time that one worker was measured to take on the same task, and there is "
                "no such row. Let the grid have plan.workers=1, too."
            )
        return min(alone, key=lambda line: (line.strategy != strategy, line.threads or 1))

    def _measured(self, task: Task, plan: Plan, share: int) -> StepCost:
        """One worker's step on ``share`` samples in this process."""
        one = dataclasses.replace(task, batch_size=share)
        key = str(sorted((k, str(v)) for k, v in one.as_table().items())), share
        if key not in self._here:
            alone = verbs.resolved(one, Plan(workers=1, threads=plan.threads, precision=plan.precision)).plan
            threads = torch.get_num_threads()
            torch.set_num_threads(alone.threads or 1)
            try:
                splits = data_sets.load(one.data, folder=None if self._data_dir is None else Path(self._data_dir))
                self._here[key] = values.cost_here(one, alone, splits)
            finally:
                torch.set_num_threads(threads)
        return self._here[key]


def _sees_all(plan: Plan) -> bool:
    return isinstance(plan.strategy, Strategy) and plan.strategy.whole_batch
