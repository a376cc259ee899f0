"""What a step of a plan computes, and where that is known from.

    measured     the user's own step, in as many processes as there are workers, on this machine
    operators    sums of what operators take in this machine's tables
    roofline     the device's specification

Of a pipeline it is the longest path through its schedule, and what is left of that is the bubble.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from manyhands.cluster import Cluster
from manyhands.cluster.measured import Curve
from manyhands.communication.topology import Mesh
from manyhands.communication.transports.events import Operation
from manyhands.contract import Strategy
from manyhands.errors import BadInput
from manyhands.modelling import operations, operators, specification
from manyhands.modelling.fed import END
from manyhands.modelling.fetching import fetch_s
from manyhands.modelling.given import Given
from manyhands.modelling.keeping import Profile
from manyhands.modelling.profile import profile
from manyhands.models import losses, optimizers
from manyhands.partition.pipeline import description as pipelines
from manyhands.partition.pipeline.schedule import Action, makespan
from manyhands.partition.tensor import axis_of
from manyhands.plan import Plan
from manyhands.simulation.coding import Coding
from manyhands.simulation.pace import StepCost
from manyhands.simulation.prices import Prices
from manyhands.simulation.stragglers import Delays, Recorded

#: Where what a worker computes comes from.
Source = Literal["measured", "operators", "roofline"]
SOURCES: tuple[Source, ...] = ("measured", "operators", "roofline")


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
    #: What its exchanges take, measured just now.
    curves: tuple[Curve, ...] = ()


def is_cut(plan: Plan) -> bool:
    """Whether a worker has a part of the model, or of its parameters."""
    assert isinstance(plan.mesh, Mesh)
    return plan.mesh["data"] != plan.workers or axis_of(plan.tensor) == "data" or (plan.shard or 0) > 1


def computing(
    given: Given,
    plan: Plan,
    *,
    compute: Source | None,
    fresh: bool,
    asked: Callable[[], Sequence[Operation]] = tuple,
) -> Computed:
    """What a step of ``plan`` computes, from the best source there is, or from ``compute``.

    ``asked``: what a strategy exchanges that is no lock-step's, see `profile`.
    """
    if compute is None:
        compute = "measured" if given.here or given.cluster.device.kind == "cpu" else "roofline"
    if compute == "measured":
        found = profile(given.task, plan, given.cluster, data_dir=given.data_dir, fresh=fresh, asked=asked)
        notes = () if given.here else ("computing is measured on this machine's cores and taken to be the same there",)
        return replace(as_measured(plan, found), notes=notes)
    if is_cut(plan):
        raise BadInput(
            f"compute={compute} with {plan.mesh}, shard={plan.shard}: parts of a model are measured, on a machine that "
            "can run them. Predict whole replicas (mesh=data=…), or leave compute out."
        )
    calculated = _calculated(given, plan, compute)
    if compute != "operators" or not given.here:
        return calculated
    assert given.cluster.measured is not None
    slower = operators.slower(given.cluster.measured.operators, *_measured_beside(given.cluster, plan))
    samples = int(calculated.cost.samples)
    return brought_up(calculated, slower, fetch_s(given.splits.train, samples, threads=plan.threads))


def brought_up(calculated: Computed, slower: float, rest_s: float) -> Computed:
    """What tables say, on a machine that takes so many times as long now, and what they say nothing of."""
    return replace(calculated, cost=replace(calculated.cost.times(slower), rest_s=rest_s))


def as_measured(plan: Plan, found: Profile) -> Computed:
    """What a profile of ``plan`` says."""
    assert isinstance(plan.strategy, Strategy)
    assert plan.workers is not None
    # Where every measured step has compressed, too, that is in the rest of it.
    coding = Coding() if found.plain else Coding(0.0, 0.0)
    elements = max(round(found.elements), 1)
    cost = StepCost(found.compute_s, found.update_s, found.samples, elements, found.rest_s, coding=coding)
    return Computed(cost, Recorded(found.factors, plan.workers), "measured", found.spread, found, curves=found.curves)


def cut_anew(computed: Computed, prices: Prices) -> Computed:
    """With the exchanges inside a cut model's own passes at these prices, and not at those of the day before."""
    found = computed.measured
    if found is None or not found.cut_s:
        return computed
    prices.begin()
    cut_s = sum(prices(x) * times for x, times in found.exchanges if x.purpose == "cut" and x.name != "send")
    compute_s = max(found.compute_s - found.cut_s + cut_s, 0.0)
    newer = replace(found, compute_s=compute_s, cut_s=cut_s)
    return replace(computed, cost=replace(computed.cost, compute_s=compute_s), measured=newer)


def _calculated(given: Given, plan: Plan, compute: Source) -> Computed:
    """From a traced step, at the largest share and at half of it."""
    task, cluster, model, splits = given.task, given.cluster, given.model, given.splits
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
    threads, co_runners = _measured_beside(cluster, plan)
    return operators.price(
        found, table, threads=threads, co_runners=co_runners, device=cluster.device, optimizer=optimizer
    )


def _measured_beside(cluster: Cluster, plan: Plan) -> tuple[int, int]:
    """Threads and co-runners of the table's rows that are nearest to what ``plan`` has."""
    assert cluster.measured is not None
    assert plan.workers is not None
    wanted = (plan.threads, min(plan.workers, cluster.devices_per_node))
    measured = {(x.threads, x.co_runners) for x in cluster.measured.operators}
    return min(measured, key=lambda at: (abs(at[0] - wanted[0]), abs(at[1] - wanted[1])))


def _states(optimizer: torch.optim.Optimizer) -> int:
    """Tensors of state for each parameter, by what the optimizer is told."""
    group = optimizer.param_groups[0]
    if "betas" in group:
        return 2
    return int(bool(group.get("momentum")) or "alpha" in group or "lr_decay" in group)


def through_stages(plan: Plan, computed: Computed, prices: Prices) -> Computed:
    """The longest path through the schedule in place of what a rank computes; the rest of it is the bubble."""
    found = computed.measured
    assert found is not None
    assert isinstance(plan.mesh, Mesh)
    assert plan.micro_batches is not None
    assert isinstance(plan.strategy, Strategy)
    order = pipelines.parse(plan.pipeline, plan.strategy).made(plan.mesh["pipeline"], plan.micro_batches)
    seconds = {(kind, stage): s for kind, stage, s in found.actions}
    sizes_B = dict(found.hops)
    last = {row[-1] for row in order.rows}
    # Stages that are cut themselves exchange in each action, about as much for what it computes as in any other.
    stretch = found.compute_s / (found.compute_s - found.cut_s)
    prices.begin()

    def cost(action: Action) -> float:
        own_s = stretch * seconds[action.kind, action.stage]
        return own_s + seconds.get((END, action.stage), 0.0) if action in last else own_s

    def hop_s(before: Action, after: Action) -> float:
        ranks = order.stage_rank(before.stage), order.stage_rank(after.stage)
        size_B = sizes_B.get(min(before.stage, after.stage), 0)
        return prices(Operation("send", size_B, 2, ranks, ranks[0], ranks[1], False, "cut"))

    span_s = makespan(order, cost, hop_s)
    busy = [sum(cost(a) for a in row) / span_s for row in order.rows]
    # What a stage has more to do than another is in the path, so each rank varies about its own median.
    steady = found.factors / np.median(found.factors, axis=0)
    longer = replace(found, compute_s=span_s, cut_s=0.0, factors=steady)
    cost_s = replace(computed.cost, compute_s=span_s)
    return replace(computed, cost=cost_s, measured=longer, bubble=tuple(1 - share for share in busy))
