"""A simulated run from its parts: checked and priced, run, and summed up in the record of a real run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from manyhands.checks import is_positive, is_whole
from manyhands.cluster import Cluster
from manyhands.communication.topology import Mesh
from manyhands.contract import Measurement, Spread, StepParts, Strategy
from manyhands.data import Splits
from manyhands.errors import BadInput, InvalidPlan, Problem
from manyhands.models import optimizers
from manyhands.partition.tensor import axis_of
from manyhands.plan import Plan
from manyhands.simulation import sizes, values
from manyhands.simulation.failures import Failures, Wall, wall
from manyhands.simulation.outcome import Outcome
from manyhands.simulation.pace import StepCost
from manyhands.simulation.prices import Prices
from manyhands.simulation.replica import sizes_of
from manyhands.simulation.stragglers import Delays, Stragglers
from manyhands.simulation.trace import Spans
from manyhands.task import Task, described
from manyhands.training import memory
from manyhands.training.conclusion import versions


@dataclass(frozen=True)
class Options:
    """What a simulation is told beside task, plan and cluster.

    ``compute_s`` and ``update_s``: of a worker's step on its whole share (the largest, where they differ), None:
    measured here (an update of a given ``compute_s`` takes none unless it is said).
    """

    stragglers: tuple[Stragglers, ...] = ()
    failures: Failures | None = None
    compute_s: float | None = None
    update_s: float | None = None
    sizes: bool = False
    evaluate: str | int = "epoch"
    traced: bool = False

    def check(self) -> None:
        """Raise `InvalidPlan` for figures that cannot be."""
        found = [
            Problem(f"{name}={value!r}", "what computing costs is a number of seconds from 0.", f"E.g. {name}=0.01.")
            for name, value in (("compute_s", self.compute_s), ("update_s", self.update_s))
            if not (value is None or value == 0 or is_positive(value))
        ]
        if self.update_s is not None and self.compute_s is None:
            found.append(
                Problem(
                    f"update_s={self.update_s!r} without compute_s",
                    "a step is measured whole or given whole.",
                    "Give compute_s, too, or neither.",
                )
            )
        if self.evaluate not in ("epoch", "never") and not is_whole(self.evaluate, 1):
            found.append(
                Problem(
                    f"evaluate={self.evaluate!r} in a simulation",
                    "it is epoch, never, or every so many steps.",
                    "E.g. evaluate=100.",
                )
            )
        if found:
            raise InvalidPlan(found)


@dataclass(frozen=True)
class Simulation:
    """What `simulate` gives back; ``summary`` and ``history`` are those of a real run, in virtual seconds.

    ``how``: ``values``; without numbers ``folded`` (one rank for all), ``vectors`` (one rank with everybody's clock) or
    ``ranks``. ``took_s``: real seconds of this process. ``state`` is the final ``state_dict``, of values.
    """

    plan: Plan
    cluster: str
    summary: Measurement
    history: list[dict[str, Any]]
    how: str
    took_s: float
    cost: StepCost
    failures: Wall | None = None
    notes: tuple[str, ...] = ()
    state: Mapping[str, Any] = field(default_factory=dict, repr=False)
    trace: Spans | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: the summary, and what is said of a simulation beside it."""
        return {
            **self.summary.as_dict(),
            "cluster": self.cluster,
            "how": self.how,
            "took_s": self.took_s,
            "compute_s": self.cost.compute_s,
            "update_s": self.cost.update_s,
            "history": self.history,
            "failures": None if self.failures is None else self.failures.as_dict(),
            "notes": list(self.notes),
        }


def simulated(
    task: Task, plan: Plan, cluster: Cluster, options: Options, model: torch.nn.Module, splits: Splits
) -> Simulation:
    """``plan`` is decided; ``model`` and ``splits`` are built from ``task``."""
    began = time.perf_counter()
    _refuse_cuts(plan)
    assert plan.workers is not None
    strategy = plan.strategy
    assert isinstance(strategy, Strategy)
    workers, shares_memory = plan.workers, cluster.nodes_for(plan.workers) == 1
    optimizer = optimizers.build(task.optimizer, model.parameters())
    pieces = sizes_of(model, optimizer, numbers=not options.sizes)
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.threads or 1)
    try:
        cost = _cost(task, plan, splits, options, sum(p.numel for p in pieces))
        delays = Delays(options.stragglers, workers, task.seed)
        spans = Spans() if options.traced else None
        if options.sizes:
            what = sizes.Sized(
                strategy,
                workers,
                pieces,
                optimizer,
                max(len(splits.train), task.batch_size),
                task.batch_size,
                task.length,
                cost,
                delays,
                shares_memory,
                task.clip,
            )
            outcome = sizes.run(what, lambda: Prices(cluster, workers), spans)
        else:
            valued = values.Valued(task, plan, splits, cost, delays, shares_memory, options.evaluate)
            outcome = values.run(valued, Prices(cluster, workers), spans)
    finally:
        torch.set_num_threads(threads)
    broken = None
    if options.failures is not None:
        broken = wall(max(outcome.clocks.last), options.failures, workers, task.seed)
        for record in outcome.history:
            record["wall_s"] = broken.at(record["train_s"])
    summary = summed_up(task, plan, splits, outcome, sum(p.numel() for p in model.parameters()), broken)
    took_s = time.perf_counter() - began
    return Simulation(
        plan,
        cluster.name,
        summary,
        outcome.history,
        outcome.how,
        took_s,
        cost,
        broken,
        tuple(outcome.notes),
        outcome.state,
        spans,
    )


def _refuse_cuts(plan: Plan) -> None:
    assert isinstance(plan.mesh, Mesh)
    assert isinstance(plan.strategy, Strategy)
    cut = plan.mesh["data"] != plan.workers or axis_of(plan.tensor) == "data" or (plan.shard or 0) > 1
    if cut or plan.strategy.updates_within:
        raise BadInput(
            f"simulate with {plan.strategy} on {plan.mesh}, shard={plan.shard}: workers that hold parts of a model are "
            f"not simulated yet; whole replicas are. Use mesh=data={plan.workers}; `manyhands plan` tells what a cut "
            "holds and sends."
        )


def _cost(task: Task, plan: Plan, splits: Splits, options: Options, elements: int) -> StepCost:
    assert plan.workers is not None
    assert isinstance(plan.strategy, Strategy)
    if options.compute_s is None:
        return values.cost_here(task, plan, splits)
    whole = task.batch_size if options.sizes else min(task.batch_size, len(splits.train))
    share = whole if plan.strategy.whole_batch else -(-whole // plan.workers)
    return StepCost(options.compute_s, options.update_s or 0.0, share, elements)


def summed_up(
    task: Task, plan: Plan, splits: Splits, outcome: Outcome, parameters: int, broken: Wall | None
) -> Measurement:
    """The record of a run, of what a virtual one came to."""
    clocks, steps = outcome.clocks, max(outcome.steps, 1)
    trained_s = max(clocks.last)
    late = clocks.staleness
    assert plan.workers is not None
    return Measurement(
        strategy=str(plan.strategy),
        model=described(task.model),
        data=splits.name,
        workers=plan.workers,
        transport="simulated",
        device=plan.device,
        parameters=parameters,
        global_batch=task.batch_size,
        steps=outcome.steps,
        epochs=outcome.epochs,
        seed=task.seed,
        train_loss=outcome.history[-1]["train_loss"] if outcome.history else None,
        test_accuracy=outcome.history[-1]["test_accuracy"] if outcome.history else None,
        samples_per_s=outcome.samples / trained_s if trained_s else 0.0,
        step_s=Spread.of(clocks.step_s),
        step_parts_s=StepParts(
            clocks.compute_s / steps,
            clocks.communicate_s / steps,
            clocks.wait_s[0] / steps,
            clocks.update_s / steps,
        ),
        sent_B_per_step=clocks.sent_B / steps,
        moved_B_per_step=None,
        peak_memory_B=memory.peak_B(),
        wall_s=trained_s if broken is None else broken.wall_s[-1],
        versions=versions(),
        wait_s_by_worker=[wait_s / steps for wait_s in clocks.wait_s],
        staleness_mean=sum(by * n for by, n in late.items()) / late.total() if late.total() else None,
        staleness_max=max(late) if late.total() else None,
        compression_ratio=clocks.compression.ratio,
        compression_error=clocks.compression.error,
        compression_kept=clocks.compression.kept,
    )


def kinds(given: Sequence[Stragglers | str] | Stragglers | str | None) -> tuple[Stragglers, ...]:
    """What makes workers late, from one description or several."""
    from manyhands.simulation.stragglers import stragglers_from

    if given is None:
        return ()
    each = [given] if isinstance(given, str | Stragglers) else given
    return tuple(stragglers_from(one) for one in each)
