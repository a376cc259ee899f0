"""Every ``auto`` of a plan decided: for this machine, for the ranks of a launcher, or for a simulated cluster."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manyhands.communication import futex
from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import Mesh
from manyhands.contract import Strategy
from manyhands.models import losses, optimizers, schedules
from manyhands.models.update_rules import served
from manyhands.plan import Facts, Plan, Resolved, resolve
from manyhands.plan.compressing import AUTO
from manyhands.task import Task
from manyhands.training import environment
from manyhands.training.gather import first_decides
from manyhands.verbs.building import the_users

if TYPE_CHECKING:
    from manyhands.cluster import Cluster

#: Of all verbs alike: a study says what is noted here once, and not at each of its runs.
log = logging.getLogger(__package__)


def resolved(task: Task, plan: Plan, *, nodes: int | None = None) -> Resolved:
    """The plan with every ``auto`` decided for this machine; raises `InvalidPlan` with all problems of both.

    ``nodes``: for a simulated cluster of so many instead.
    """
    found = resolve(plan, facts(task, nodes=nodes))
    if plan.compress == AUTO:  # what the strategy decides depends on what is going to be chosen
        return dataclasses.replace(found, plan=dataclasses.replace(found.plan, strategy=plan.strategy))
    return found


def resolved_on(cluster: Cluster, task: Task, plan: Plan) -> Resolved:
    """As `resolved`, for as many nodes of ``cluster`` as the plan's workers fill."""
    alone = resolved(task, plan, nodes=1).plan
    assert alone.workers is not None
    return resolved(task, plan, nodes=cluster.nodes_for(alone.workers))


def facts(task: Task, *, nodes: int | None = None) -> Facts:
    """What any plan for ``task`` is checked against; raises for what is wrong with the task itself."""
    task.check()
    started = environment.launched() if nodes is None else None
    with the_users("loss", task.loss):
        losses.build(task.loss)
    with the_users("optimizer", task.optimizer):
        trial = optimizers.trial(task.optimizer)
    with the_users("schedule", task.schedule):
        schedules.build(task.schedule, trial, steps=task.steps or 100)
    return Facts(
        cores=futex.cores(),
        gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        shared_memory=environment.shared_memory_works(),
        launched=started.size if started else None,
        launcher=started.launcher if started else None,
        elementwise=optimizers.is_elementwise(trial),
        stateless=optimizers.is_stateless(trial),
        optimizer_problem=optimizers.gradients_problem(trial),
        clip=task.clip is not None,
        served=served(trial),
        batch_size=task.batch_size,
        memory_B=environment.memory_B() if nodes is None else None,
        nodes=nodes,
    )


def with_compressor(
    task: Task,
    asked: Plan,
    found: Resolved,
    model: torch.nn.Module,
    *,
    on: Cluster | None = None,
    resumed: Path | None = None,
    comm: Communicator | None = None,
) -> Resolved:
    """``compress=auto`` decided: by the links of a cluster, by the ranks of ``comm`` (collective), or by workers that
    try the plan's transport here for a moment. A run that is taken up goes on with what it has.
    """
    from manyhands.modelling import compression

    def settled(compress: str) -> Resolved:
        said = dataclasses.replace(asked, compress=compress)
        return resolved(task, said) if on is None else resolved_on(on, task, said)

    def by_the_first(decide: Callable[[], Any]) -> Any:
        return decide() if comm is None else first_decides(comm, decide)

    kept = by_the_first(lambda: None if resumed is None else compression.kept(resumed))
    if kept is not None:
        return compression.with_note(settled(kept), f"compress=auto: {kept}, with which this run began")
    plan, shapes = found.plan, compression.shapes_of(model)
    assert isinstance(plan.mesh, Mesh)
    size, n_B = plan.mesh["data"], 4 * sum(map(math.prod, shapes))
    among = compression.allowed(settled) if size > 1 else []
    decided = settled(among[0]).plan.strategy if among else None  # as it will be with a compressor
    strategy = decided if isinstance(decided, Strategy) else None
    asked_for = compression.messages(strategy, shapes, size, among)
    price: compression.Price = lambda operation: 0.0  # noqa: E731
    if on is not None:
        price = compression.priced(on, size)
    elif comm is not None:
        price = compression.tried(comm, n_B, asked_for)
    elif among:
        price = compression.probed(plan.transport, size, plan.threads, n_B, plan.timeout_s, asked_for)
    where = f"on {plan.transport if on is None else on.name}"

    def chosen() -> list[str]:
        choice = compression.choose(
            shapes, size, price, where, among, strategy=strategy, adaptive=compression.adaptive(task, strategy)
        )
        return [choice.compress, choice.note]

    compress, note = by_the_first(chosen)
    return compression.with_note(settled(compress), note)


def this_machine() -> tuple[Cluster, list[str]]:
    """As `calibrate` has measured it; else assumed figures, and a note that says so."""
    from manyhands.cluster import load
    from manyhands.modelling import calibration

    found = calibration.look()
    if found.cluster is not None:
        return found.cluster, []
    return load("laptop"), [f"communication is priced by assumed figures: {found.reason}"]
