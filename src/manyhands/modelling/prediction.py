"""What a plan will cost on a cluster, before it is run: the strategy's own code on priced replicas.

    step    = compute + exposed communication + wait + update (+ bubble), of rank 0 in virtual time
    error   = √(Σ (share of the step × error of where that share came from)²)

Computing is, in this order: the user's own step measured here (`profile`), operators from this machine's tables, the
roofline of a device's specification. Communication is, in this order: the calibrated curves of the plan's transport,
α + βn of the cluster's links. Strategies run as in `simulation.sizes`; a cut model, and what looks at numbers (a robust
rule, a compressor), as one rank measured among mirrors, whose exchanges meet in lock-step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from manyhands.cluster import Cluster
from manyhands.communication.communicator import reference_B
from manyhands.communication.topology import Mesh
from manyhands.communication.transports.events import Operation
from manyhands.contract import Measurement, Spread, StepParts, Strategy
from manyhands.data import Splits
from manyhands.errors import BadInput
from manyhands.modelling import operations, operators, specification
from manyhands.modelling.memory.fitting import fits, would_fit
from manyhands.modelling.memory.footprint import footprint
from manyhands.modelling.memory.parts import Memory
from manyhands.modelling.profile import Profile, profile
from manyhands.models import losses, optimizers
from manyhands.partition import cut_strategies
from manyhands.partition.pipeline import description as pipelines
from manyhands.partition.pipeline.schedule import Action, makespan
from manyhands.partition.tensor import axis_of
from manyhands.plan import Plan
from manyhands.plan.facts import SHARE_MEMORY
from manyhands.simulation import sizes
from manyhands.simulation.coding import Coding
from manyhands.simulation.outcome import Clocks, Outcome
from manyhands.simulation.pace import StepCost
from manyhands.simulation.prices import Prices
from manyhands.simulation.replica import sizes_of
from manyhands.simulation.running import summed_up
from manyhands.simulation.stragglers import Delays, Recorded
from manyhands.task import Task
from manyhands.training.sampler import steps_per_epoch

#: Where what a worker computes comes from.
Source = Literal["measured", "operators", "roofline"]
SOURCES: tuple[Source, ...] = ("measured", "operators", "roofline")

#: Relative errors that were found in validation (docs/validation.md), by where a figure comes from. A formula's is what
#: α-β forms miss by on curves that were measured; a roofline's is that of published tables without a constant.
ERRORS = {
    **{"measured": 0.03, "grid": 0.05, "operators": 0.08, "roofline": 0.6},
    **{"curve": 0.10, "extrapolated": 0.2, "formula": 0.35},
}
#: Steps that are simulated for a median; the whole run is as many of them as it has.
STEPS = 200
#: Ranks × steps at most, of strategies whose ranks run one by one.
RANK_STEPS = 40_000


#: Processes that are started for a prediction, at most.
SIDE_BY_SIDE = 8
#: Exchanges that a step's computing has in it already, or that are no part of one.
UNPRICED = ("cut", "consensus", "control", "buckets")


@dataclass(frozen=True)
class Prediction:
    """What `predict` gives back. ``summary`` is the record of a run that has not been; its loss and accuracy are None.

    ``error`` is the relative error bar of the step; ``sources`` say which share of the step came from where.
    """

    plan: Plan
    cluster: str
    summary: Measurement
    error: float
    sources: Mapping[str, float]
    #: Payload a step, over each level of the cluster's links, of worker 0.
    link_B: Mapping[str, float]
    notes: tuple[str, ...] = ()
    took_s: float = 0.0
    #: In parts, by worker; None where it was not asked for.
    memory: Memory | None = None

    @property
    def step_s(self) -> float:
        """The median step."""
        return self.summary.step_s.median

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: the summary, and what is said of a prediction beside it."""
        return {
            **self.summary.as_dict(),
            "cluster": self.cluster,
            "error": self.error,
            "sources": dict(self.sources),
            "link_B_per_step": dict(self.link_B),
            "memory": None if self.memory is None else self.memory.as_dict(),
            "took_s": self.took_s,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Computed:
    """What a step computes, and how that is known."""

    cost: StepCost
    delays: Delays | Recorded
    #: ``grid``: between shares that were measured, see `search.costs`.
    source: Source | Literal["grid"]
    spread: float = 0.0
    measured: Profile | None = None
    notes: tuple[str, ...] = field(default=())
    #: Of a pipeline: the part of its longest path in which each rank computes nothing.
    bubble: tuple[float, ...] = ()


def predicted(
    task: Task,
    plan: Plan,
    cluster: Cluster,
    model: torch.nn.Module,
    splits: Splits,
    *,
    here: bool,
    compute: Source | None = None,
    fresh: bool = False,
    data_dir: str | None = None,
    notes: tuple[str, ...] = (),
    computed: Computed | None = None,
    steps: int = STEPS,
) -> Prediction:
    """``plan`` is decided; ``here``: ``cluster`` is this machine, so that what is measured here holds there.

    ``computed``: what is known of its computing already. ``steps``: so many are simulated at most.
    """
    began = time.perf_counter()
    assert isinstance(plan.strategy, Strategy)
    assert isinstance(plan.mesh, Mesh)
    assert plan.workers is not None
    _refuse(plan)
    transport = plan.transport if here else None
    prices = Prices(cluster, plan.workers, transport)
    if computed is None:
        computed = computing(
            task, plan, cluster, model, splits, here=here, compute=compute, fresh=fresh, data_dir=data_dir
        )
    itemsize = next((p.element_size() for p in model.parameters() if p.requires_grad), 4)
    prices.serving_s_per_B = computed.cost.update(1) / itemsize
    if plan.mesh["pipeline"] > 1:
        computed = _through_stages(plan, computed, prices)
    if _is_cut(plan):
        outcome = _in_lock_step(task, plan, computed, prices)
    else:
        try:
            outcome = _by_sizes(task, plan, cluster, computed, model, splits, prices, here=here, steps=steps)
        except BadInput:
            if computed.measured is None or computed.measured.plain:
                raise  # a plain step's exchanges are not this strategy's
            outcome = _in_lock_step(task, plan, computed, prices)
    parameters = sum(p.numel() for p in model.parameters())
    summary = _of_the_whole_run(task, plan, splits, outcome, parameters)
    if computed.bubble:
        summary = replace(summary, bubble_by_worker=list(computed.bubble))
    sources = _sources(computed, summary, prices)
    error = math.sqrt(
        sum((share * ERRORS[name]) ** 2 for name, share in sources.items())
        + computed.spread**2
        + _spread(prices, sources) ** 2
    )
    level = None if plan.workers == 1 else "within" if here else cluster.level(plan.workers)
    return Prediction(
        plan,
        cluster.name,
        summary,
        error,
        sources,
        {} if level is None else {level: summary.sent_B_per_step},
        (*notes, *computed.notes),
        time.perf_counter() - began,
    )


def with_memory(
    found: Prediction, task: Task, cluster: Cluster, model: torch.nn.Module, splits: Splits, data_dir: str | None
) -> Prediction:
    """``found`` with what each worker will hold, and a note if that does not fit.

    ``peak_memory_B`` is the largest resident set of a worker; on a device with memory of its own what lies there.
    """
    began = time.perf_counter()
    plan, folder = found.plan, None if data_dir is None else Path(data_dir)
    memory = footprint(task, plan, model, splits, data_dir=folder)
    peak_B = memory.resident_B if cluster.device.kind == "cpu" else memory.tensors_B
    notes = found.notes
    if fits(memory, cluster, plan.workers or 1) is not None:
        problem = would_fit(task, plan, model, splits, cluster)
        notes += () if problem is None else (f"out of memory: {problem}",)
    took_s = found.took_s + time.perf_counter() - began
    summary = replace(found.summary, peak_memory_B=peak_B)
    return replace(found, memory=memory, summary=summary, notes=notes, took_s=took_s)


def _refuse(plan: Plan) -> None:
    assert isinstance(plan.mesh, Mesh)
    assert isinstance(plan.strategy, Strategy)
    if plan.strategy.name in cut_strategies:
        raise BadInput(
            f"predict with {plan.strategy} on {plan.mesh}: pipelines that do not flush are not priced. Predict "
            "synchronous on this mesh; `manyhands plan` tells what each worker holds and sends."
        )
    if plan.mesh["pipeline"] > 1 and (plan.workers or 1) > SIDE_BY_SIDE:
        raise BadInput(
            f"predict with {plan.mesh}: the stages of a pipeline are measured side by side, each a process here, and "
            f"{plan.workers} are more than {SIDE_BY_SIDE}. Predict fewer workers."
        )


def _is_cut(plan: Plan) -> bool:
    assert isinstance(plan.mesh, Mesh)
    return plan.mesh["data"] != plan.workers or axis_of(plan.tensor) == "data" or (plan.shard or 0) > 1


# -- computing ---------------------------------------------------------------------------------------------------------


def computing(
    task: Task,
    plan: Plan,
    cluster: Cluster,
    model: torch.nn.Module,
    splits: Splits,
    *,
    here: bool,
    compute: Source | None,
    fresh: bool,
    data_dir: str | None,
) -> Computed:
    """What a step of ``plan`` computes, from the best source there is, or from ``compute``."""
    if compute is None:
        compute = "measured" if here or cluster.device.kind == "cpu" else "roofline"
    if compute == "measured":
        found = profile(task, plan, cluster, data_dir=data_dir, fresh=fresh)
        notes = () if here else ("computing is measured on this machine's cores and taken to be the same there",)
        return replace(as_measured(plan, found), notes=notes)
    if _is_cut(plan):
        raise BadInput(
            f"compute={compute} with {plan.mesh}, shard={plan.shard}: parts of a model are measured, on a machine that "
            "can run them. Predict whole replicas (mesh=data=…), or leave compute out."
        )
    return _calculated(task, plan, cluster, model, splits, compute)


def as_measured(plan: Plan, found: Profile) -> Computed:
    """What a profile of ``plan`` says."""
    assert isinstance(plan.strategy, Strategy)
    assert plan.workers is not None
    # Where every measured step has compressed, too, that is in the rest of it.
    once = plan.strategy.lockstep or plan.strategy.alike
    coding = Coding(0.0, 0.0) if once and not found.plain else Coding()
    elements = max(round(found.elements), 1)
    cost = StepCost(found.compute_s, found.update_s, found.samples, elements, found.rest_s, coding=coding)
    return Computed(cost, Recorded(found.factors, plan.workers), "measured", found.spread, found)


def _calculated(
    task: Task, plan: Plan, cluster: Cluster, model: torch.nn.Module, splits: Splits, compute: Source
) -> Computed:
    """From a traced step, at the largest share and at half of it."""
    assert isinstance(plan.strategy, Strategy)
    assert plan.workers is not None
    whole = min(task.batch_size, len(splits.train))
    share = whole if plan.strategy.whole_batch else -(-whole // plan.workers)
    loss, notes, points, spread = losses.build(task.loss), list[str](), [], 0.0
    optimizer = optimizers.build(task.optimizer, model.parameters())
    update_s = 0.0
    for samples in sorted({max(share // 2, 1), share}):
        found = operations.count(model, *splits.train.rows(torch.arange(samples)), loss)
        if found.untraced:
            notes = [found.untraced]
        if compute == "operators":
            priced = _from_tables(found, cluster, plan, optimizer)
            points.append((float(samples), priced.compute_s))
            update_s, spread = priced.seconds["update"], priced.error_s / priced.total_s
        else:
            points.append((float(samples), specification.step_s(found, cluster.device)))
            update = operations.update(found.parameter_B, state=_states(optimizer))
            update_s = specification.operator_s(update, cluster.device)
    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cost = StepCost(points[-1][1], update_s, share, elements, points=tuple(points) if len(points) > 1 else ())
    return Computed(cost, Delays((), plan.workers, task.seed), compute, spread, notes=tuple(notes))


def _from_tables(
    found: operations.Operations, cluster: Cluster, plan: Plan, optimizer: torch.optim.Optimizer
) -> operators.OperatorEstimate:
    """By the rows that were measured with as many threads beside as many others; else by those of one alone."""
    table = () if cluster.measured is None else cluster.measured.operators
    if not table:
        raise BadInput(
            f"compute=operators on {cluster.name}: it has no table of operators. `manyhands calibrate` measures one of "
            "this machine; compute=roofline needs none."
        )
    assert plan.workers is not None
    measured = {(x.threads, x.co_runners) for x in table}
    wanted = (plan.threads, min(plan.workers, cluster.devices_per_node))
    near = min(measured, key=lambda at: (abs(at[0] - wanted[0]), abs(at[1] - wanted[1])))
    return operators.price(
        found, table, threads=near[0], co_runners=near[1], device=cluster.device, optimizer=optimizer
    )


def _states(optimizer: torch.optim.Optimizer) -> int:
    """Tensors of state for each parameter, by what the optimizer is told."""
    group = optimizer.param_groups[0]
    if "betas" in group:
        return 2
    return int(bool(group.get("momentum")) or "alpha" in group or "lr_decay" in group)


def _through_stages(plan: Plan, computed: Computed, prices: Prices) -> Computed:
    """The longest path through the schedule in place of what a rank computes; the rest of it is the bubble."""
    found = computed.measured
    assert found is not None
    assert isinstance(plan.mesh, Mesh)
    assert plan.micro_batches is not None
    order = pipelines.parse(plan.pipeline, plan.strategy).made(plan.mesh["pipeline"], plan.micro_batches)
    seconds = {(kind, stage): s for kind, stage, s in found.actions}
    sizes_B = dict(found.hops)
    prices.begin()

    def cost(action: Action) -> float:
        again = plan.recompute and action.kind in "BI"
        return seconds[action.kind, action.stage] + (seconds["F", action.stage] if again else 0.0)

    def hop_s(before: Action, after: Action) -> float:
        ranks = order.stage_rank(before.stage), order.stage_rank(after.stage)
        size_B = sizes_B.get(min(before.stage, after.stage), 0)
        return prices(Operation("send", size_B, 2, ranks, ranks[0], ranks[1], False, "cut"))

    span_s = makespan(order, cost, hop_s)
    busy = [sum(cost(a) for a in row) / span_s for row in order.rows]
    longer = replace(found, compute_s=span_s, cut_s=0.0)
    cost_s = replace(computed.cost, compute_s=span_s)
    return replace(computed, cost=cost_s, measured=longer, bubble=tuple(1 - share for share in busy))


# -- running -----------------------------------------------------------------------------------------------------------


def _by_sizes(
    task: Task,
    plan: Plan,
    cluster: Cluster,
    computed: Computed,
    model: torch.nn.Module,
    splits: Splits,
    prices: Prices,
    *,
    here: bool,
    steps: int,
) -> Outcome:
    assert isinstance(plan.strategy, Strategy)
    assert plan.workers is not None
    optimizer = optimizers.build(task.optimizer, model.parameters())
    shares_memory = plan.transport in SHARE_MEMORY if here else cluster.nodes_for(plan.workers) == 1
    steps = min(_total_steps(task, splits), steps, max(RANK_STEPS // plan.workers, 20))
    what = sizes.Sized(
        plan.strategy,
        plan.workers,
        sizes_of(model, optimizer),
        optimizer,
        max(len(splits.train), task.batch_size),
        task.batch_size,
        {"epochs": None, "steps": steps},
        computed.cost,
        computed.delays,
        shares_memory,
        task.clip,
    )
    return sizes.run(what, lambda: prices)


def _in_lock_step(task: Task, plan: Plan, computed: Computed, prices: Prices) -> Outcome:
    """A rank's measured steps among its mirrors: all wait for the slowest where they meet, then pay what it costs."""
    found, workers = computed.measured, plan.workers
    assert found is not None
    assert workers is not None
    prices.begin()
    assert plan.micro_batches is not None
    own_exchanges = [(x, times) for x, times in found.exchanges if x.purpose not in UNPRICED]
    per_step_s = sum(prices(x) * times for x, times in own_exchanges)
    counted = [(x, times) for x, times in found.exchanges if x.purpose in ("step", "cut")]
    sent_B = sum(reference_B(x.name, x.payload_B, x.size) * times for x, times in counted)
    sent_B += plan.micro_batches * found.sent_here_B
    meets = min(max((times for _, times in own_exchanges), default=0.0), 1.0)
    every = round(1 / meets) if meets else 0
    own = found.factors * (found.compute_s + found.rest_s) + found.update_s
    columns = [own[:, rank % own.shape[1]] for rank in range(workers)]
    clock, waited, ends = np.zeros(workers), np.zeros(workers), []
    for step, each in enumerate(np.stack(columns, axis=1)):
        clock = clock + each
        if every and (step + 1) % every == 0:
            waited += clock.max() - clock
            clock = np.full(workers, clock.max() + per_step_s * every)
        ends.append(float(clock[0]))
    steps = len(ends)
    clocks = Clocks(ends, clock.tolist(), waited.tolist(), sent_B=round(sent_B * steps))
    clocks.compute_s = float((found.compute_s - found.cut_s) * steps)
    clocks.update_s, clocks.communicate_s = found.update_s * steps, (per_step_s + found.cut_s) * steps
    return Outcome(clocks, steps, steps * task.batch_size, 0.0, "mirrored")


def _total_steps(task: Task, splits: Splits) -> int:
    length = task.length
    return length["steps"] or (length["epochs"] or 1) * steps_per_epoch(len(splits.train), task.batch_size)


def _of_the_whole_run(task: Task, plan: Plan, splits: Splits, outcome: Outcome, parameters: int) -> Measurement:
    """The record of as many steps as the task has, each as those that were simulated."""
    few = summed_up(task, plan, splits, outcome, parameters, None)
    steps = _total_steps(task, splits)
    mean_s = max(outcome.clocks.last) / max(outcome.steps, 1)
    return replace(
        few,
        transport=plan.transport,
        steps=steps,
        epochs=steps / steps_per_epoch(len(splits.train), task.batch_size),
        wall_s=mean_s * steps,
        samples_per_s=task.batch_size / mean_s if mean_s else 0.0,
        step_s=few.step_s if outcome.steps else Spread(0.0, 0.0, 0.0),
        peak_memory_B=0,
    )


def _spread(prices: Prices, sources: Mapping[str, float]) -> float:
    """By how much of the step the calibrated prices may be off."""
    priced_s = sum(prices.sources.values())
    communication = sum(share for name, share in sources.items() if name in prices.sources)
    return communication * prices.spread_s / priced_s if priced_s else 0.0


def _sources(computed: Computed, summary: Measurement, prices: Prices) -> dict[str, float]:
    """Shares of the step, by where they come from; what is waited for comes from computing."""
    parts: StepParts = summary.step_parts_s
    whole = parts.compute + parts.communicate + parts.wait + parts.update + computed.cost.rest_s
    if not whole:
        return {computed.source: 1.0}
    communication = parts.communicate / whole
    by_price = prices.sources
    priced = sum(by_price.values()) or 1.0
    found: dict[str, float] = {computed.source: 1.0 - communication}
    for name, seconds in by_price.items():
        if seconds:
            found[name] = found.get(name, 0.0) + communication * seconds / priced
    return found
