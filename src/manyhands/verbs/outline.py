"""Outline: a plan with everything decided, and nothing started (`manyhands plan`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.plan import Plan
from manyhands.plan.compressing import AUTO
from manyhands.task import Task
from manyhands.training.rehearsal import rehearsed
from manyhands.verbs.building import built
from manyhands.verbs.deciding import resolved, with_compressor

if TYPE_CHECKING:
    from manyhands.training.outline import Outline


def outlined(task: Task, plan: Plan | None = None, *, data_dir: str | os.PathLike[str] | None = None) -> Outline:
    """The plan with everything decided, and what each worker would hold and send; nothing is started (but workers
    that try the transport for a moment, under ``compress=auto``).

    mh.verbs.outlined(mh.Task(model="cnn"), mh.Plan(mesh="pipeline=2")).parts[0].cut_B
    """
    from manyhands.training.outline import outline

    places = None if data_dir is None else Path(data_dir)
    asked = plan or Plan()
    decided = resolved(task, asked)
    model, splits = built(task, places)
    if asked.compress == AUTO:
        decided = with_compressor(task, asked, decided, model)
    decided = rehearsed(decided, model, task, splits.train)
    return outline(task, decided.plan, decided.notes, model, splits)
