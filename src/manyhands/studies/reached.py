"""Samples to a target, from the rows of a finished study: what a `search` needs to rank by time to accuracy.

    samples(strategy, workers) = mean over runs of the samples until the target was reached (`curves`)

Rows count that learned the very task: model, data, loss, optimizer, schedule, clip and global batch. A plan of which
any run did not get there has no entry.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manyhands.errors import BadInput
from manyhands.studies.charting import LOSS_SHARE, POINT
from manyhands.studies.curves import Scale, last, reached_at, scale_of
from manyhands.studies.row import Row
from manyhands.studies.rows import read
from manyhands.task import Task

#: Of a task, what decides how much is learned from a sample.
_SAME = ("model", "data", "loss", "optimizer", "schedule", "clip")


@dataclass(frozen=True)
class Reached:
    """``samples``: strategy → workers → samples until ``target``."""

    samples: dict[str, dict[int, float]]
    target: float
    scale: Scale


def samples_to_target(folder: str | os.PathLike[str], task: Task) -> Reached:
    """What the study in ``folder`` tells of ``task``.

    The target is ``task.target_accuracy``; without one, what every run of one worker had at its end, less one point
    (a loss: and a share more). Raises `BadInput` where the study has no such runs, or none that got there.
    """
    said = task.as_table()
    every = [row for row in read(Path(folder)) if row.status == "done" and row.measure == "train" and row.measurement]
    rows = [row for row in every if _same(row, said)]
    if not rows:
        raise BadInput(
            f"{folder} has no finished run of {said['model']} on {said['data']} with {said['optimizer']} and batch "
            f"size {task.batch_size}; it has {_had(every)}. Name a study of this task, or leave study out."
        )
    target, scale = _target(rows, task, folder)
    runs: dict[tuple[str, int], list[float | None]] = {}
    for row in rows:
        assert row.measurement is not None
        at = reached_at(row.history, target, scale, "samples")
        runs.setdefault((row.measurement.strategy, row.measurement.workers), []).append(at)
    found: dict[str, dict[int, float]] = {}
    for (strategy, workers), each in runs.items():
        there = [at for at in each if at is not None]
        if len(there) == len(each):
            found.setdefault(strategy, {})[workers] = statistics.fmean(there)
    if not found:
        raise BadInput(
            f"{folder}: no plan reached {scale} {target:.4g} in every run. Give the task a target_accuracy that they "
            "reached (--target-accuracy), or leave study out."
        )
    return Reached(found, target, scale)


def _target(rows: Sequence[Row], task: Task, folder: str | os.PathLike[str]) -> tuple[float, Scale]:
    if task.target_accuracy is not None:
        return task.target_accuracy, "test_accuracy"
    scale = scale_of(rows)
    ends = [
        value
        for row in rows
        if scale is not None and row.workers == 1 and (value := last(row.history, scale)) is not None
    ]
    if scale is None or not ends:
        raise BadInput(
            f"{folder} says nothing of what one worker alone learns on this task, so there is no target. Give the task "
            "a target_accuracy (--target-accuracy), or leave study out."
        )
    return (min(ends) - POINT, scale) if scale == "test_accuracy" else (max(ends) * (1 + LOSS_SHARE), scale)


def _same(row: Row, said: dict[str, object]) -> bool:
    assert row.measurement is not None
    default = Task().as_table()
    alike = all(row.task.get(name, default.get(name)) == said.get(name) for name in _SAME)
    return alike and row.measurement.global_batch == said["batch_size"]


def _had(rows: Sequence[Row]) -> str:
    default = Task().as_table()
    had = sorted(
        {
            f"{row.task.get('model', default['model'])} on {row.task.get('data', default['data'])} with "
            f"{row.task.get('optimizer', default['optimizer'])} and batch size {row.measurement.global_batch}"
            for row in rows
            if row.measurement is not None
        }
    )
    return "; ".join(had[:3]) or "no finished run at all"
