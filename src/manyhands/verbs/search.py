"""Search: which of many plans to take, and how many workers are worth it."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.communication import futex
from manyhands.contract import Strategy
from manyhands.errors import BadInput, ManyhandsError, UnknownName
from manyhands.plan import Plan, Resolved, resolve
from manyhands.task import Task
from manyhands.training import environment
from manyhands.training.rehearsal import rehearsed
from manyhands.verbs.building import built
from manyhands.verbs.deciding import facts, log, this_machine
from manyhands.verbs.train import train

if TYPE_CHECKING:
    from manyhands.cluster import Cluster
    from manyhands.modelling.prediction import Source
    from manyhands.modelling.search.engine import Samples
    from manyhands.modelling.search.ranking import Ranking

#: Seconds of training that each round of a measured plan takes, and how many rounds go over all of them in turn.
BRIEF_S, ROUNDS = 0.7, 3


def search(
    task: Task,
    cluster: Cluster | str | os.PathLike[str] | None = None,
    *,
    workers: Sequence[int] | None = None,
    strategies: Sequence[str | Strategy] | None = None,
    compressors: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    meshes: Sequence[str] | None = None,
    micro_batches: Sequence[int] | None = None,
    recompute: Sequence[bool] | None = None,
    plan: Plan | None = None,
    measure: int = 0,
    limit: int = 1000,
    price_per_worker_hour: float | None = None,
    study: Samples | None = None,
    compute: Source | None = None,
    fresh: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
) -> Ranking:
    """Which plans to take for ``task`` on ``cluster`` (default: this machine), and how many workers are worth it.

        found = mh.search(mh.Task(model="cnn", data="mnist"))
        found.choice.plan, found.ties, found.worth.knee.workers

    Looks at the product of the lists (`modelling.search.space`), each with a default; ``plan`` is what all have in
    common, ``limit`` the most plans. What cannot work or does not fit into memory is in ``refused`` with its reason.
    The others are ranked by the predicted time of an epoch; or, where ``study`` tells how many samples a strategy needs
    until the target (strategy → workers → samples, `studies.samples_to_target`), by the time that takes. ``measure``:
    the first so many are run for a few seconds each, on this machine, and put in the order of what they took. Some of
    the task's steps are measured here, a quarter of a second each, and kept for a day (but anew if ``fresh``).

    Raises `BadInput` before anything is measured; a single plan raises nothing.
    """
    from manyhands.cluster import Cluster, load
    from manyhands.modelling import prediction
    from manyhands.modelling.given import Given
    from manyhands.modelling.search import costs, engine, space

    if compute is not None and compute not in prediction.SOURCES:
        raise UnknownName("source of computing", compute, prediction.SOURCES)
    if environment.launched() is not None:
        raise BadInput("search under a launcher: it looks at any number of workers, from one process. Start it alone.")
    notes = list[str]()
    if cluster is None:
        on, notes = this_machine()
    else:
        on = cluster if isinstance(cluster, Cluster) else load(cluster)
    here = cluster is None or on.measured is not None
    engine.check(measure=measure, limit=limit, price=price_per_worker_hour, here=here, cluster=on.name, study=study)
    said = space.check(
        workers=workers,
        threads=threads,
        strategies=strategies,
        meshes=meshes,
        compressors=compressors,
        micro_batches=micro_batches,
        recompute=recompute,
    )
    base = plan or Plan()
    plans = space.asked(said, on, here=here, cores=futex.cores(), most=task.batch_size, base=base, limit=limit)
    places = None if data_dir is None else Path(data_dir)
    known = functools.lru_cache(maxsize=None)(lambda nodes: facts(task, nodes=nodes))
    known(None)
    model, splits = built(task, places)

    def decide(each: Plan) -> Resolved:
        return resolve(each, known(None if here else on.nodes_for(each.workers or 1)))

    folder = None if places is None else str(places)
    pricer = costs.Costs(Given(task, on, model, splits, here, folder), compute=compute, fresh=fresh)
    found = engine.search(
        plans,
        decide,
        pricer,
        rehearse=lambda made: rehearsed(made, model, task, splits.train),
        cluster=on.name,
        samples=study,
        price_per_worker_hour=price_per_worker_hour,
        notes=notes,
        here=here,
    )
    return engine.measured(found, functools.partial(_run_briefly, task, folder), measure) if measure else found


def _run_briefly(task: Task, data_dir: str | None, plans: Mapping[Plan, float]) -> dict[Plan, list[float]]:
    """Seconds of a step, means of short runs; by plan, given what a step is predicted to take."""
    taken: dict[Plan, list[float]] = {plan: [] for plan in plans}
    for _ in range(ROUNDS):
        for plan, step_s in plans.items():
            steps = max(20, min(round(BRIEF_S / step_s), 20_000))
            brief = dataclasses.replace(task, epochs=None, steps=steps, seconds=None, target_accuracy=None)
            try:
                said = train(brief, plan, evaluate="never", progress=False, data_dir=data_dir).summary
            except ManyhandsError as e:
                log.warning("%s could not be measured: %s", plan, e)
                continue
            if said is not None and said.samples_per_s:
                taken[plan].append(task.batch_size / said.samples_per_s)
    return {plan: times for plan, times in taken.items() if times}
