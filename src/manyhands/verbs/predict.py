"""Predict: what a plan will cost, before it is run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.errors import UnknownName
from manyhands.plan import Plan
from manyhands.plan.compressing import AUTO
from manyhands.task import Task
from manyhands.training.rehearsal import rehearsed
from manyhands.verbs.building import built
from manyhands.verbs.deciding import resolved, resolved_on, this_machine, with_compressor

if TYPE_CHECKING:
    from manyhands.cluster import Cluster
    from manyhands.modelling.prediction import Prediction, Source


def predict(
    task: Task,
    plan: Plan | None = None,
    cluster: Cluster | str | os.PathLike[str] | None = None,
    *,
    compute: Source | None = None,
    memory: bool = True,
    fresh: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
) -> Prediction:
    """What ``plan`` will cost on ``cluster``, before it is run: step time in parts, memory, bytes, with an error bar.

        guess = mh.predict(mh.Task(model="cnn", data="mnist"), mh.Plan(workers=2))
        guess.summary.step_s.median, guess.error

    Without ``cluster`` it is this machine, as `calibrate` has measured it. A ready cluster's name or a file predicts
    for machines that one need not have. ``compute`` says where the time of computing comes from: ``measured``, the
    task's own step here for a quarter of a second (kept for a day, unless ``fresh``), ``operators``, this machine's
    tables, or ``roofline``, the device's specification; left out, the best of them that there is. ``memory``: in parts,
    too; a plan that does not fit is predicted all the same, with a note of by how much and of what would fit.

    Raises `BadInput` before anything is measured.
    """
    from manyhands.cluster import Cluster, load
    from manyhands.modelling import prediction
    from manyhands.modelling.given import Given

    if compute is not None and compute not in prediction.SOURCES:
        raise UnknownName("source of computing", compute, prediction.SOURCES)
    asked, notes = plan or Plan(), list[str]()
    if cluster is None:
        on, notes = this_machine()
    else:
        on = cluster if isinstance(cluster, Cluster) else load(cluster)
    here = cluster is None or on.measured is not None
    decided = resolved(task, asked) if here else resolved_on(on, task, asked)
    model, splits = built(task, None if data_dir is None else Path(data_dir))
    if asked.compress == AUTO:
        decided = with_compressor(task, asked, decided, model, on=None if here else on)
    decided = rehearsed(decided, model, task, splits.train)
    folder = None if data_dir is None else os.fspath(data_dir)
    given = Given(task, on, model, splits, here, folder)
    found = prediction.predicted(given, decided.plan, compute=compute, fresh=fresh, notes=(*notes, *decided.notes))
    return prediction.with_memory(given, found) if memory else found
