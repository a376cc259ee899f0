"""A plan in virtual time: its strategy's own code on what is computed and priced, or one rank among its mirrors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from manyhands.cluster import Cluster
from manyhands.communication.communicator import ASIDE, reference_B
from manyhands.communication.transports.events import Operation
from manyhands.contract import Measurement, Spread, Strategy
from manyhands.errors import BadInput
from manyhands.modelling.given import Given
from manyhands.modelling.prediction.computed import Computed
from manyhands.models import optimizers
from manyhands.plan import Plan
from manyhands.plan.facts import SHARE_MEMORY
from manyhands.simulation import sizes
from manyhands.simulation.outcome import Clocks, Outcome
from manyhands.simulation.pace import StepCost
from manyhands.simulation.prices import Prices
from manyhands.simulation.replica import sizes_of
from manyhands.simulation.running import summed_up
from manyhands.simulation.stragglers import Delays
from manyhands.simulation.trace import Spans
from manyhands.training.sampler import steps_per_epoch

#: Ranks × steps at most, of strategies whose ranks run one by one.
RANK_STEPS = 40_000
#: Steps for finding out what is exchanged.
FEW_STEPS = 20


def by_sizes(
    given: Given, plan: Plan, computed: Computed, prices: Prices, *, steps: int, spans: Spans | None = None
) -> Outcome:
    """The strategy on replicas that have sizes and no numbers; `BadInput` if it looks at numbers."""
    task, model, splits = given.task, given.model, given.splits
    assert isinstance(plan.strategy, Strategy)
    assert plan.workers is not None
    optimizer = optimizers.build(task.optimizer, model.parameters())
    shares_memory = plan.transport in SHARE_MEMORY if given.here else given.cluster.nodes_for(plan.workers) == 1
    steps = min(_total_steps(given), steps, max(RANK_STEPS // plan.workers, 20))
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
    return sizes.run(what, lambda: prices, spans)


def in_lock_step(given: Given, plan: Plan, computed: Computed, prices: Prices) -> Outcome:
    """A rank's measured steps among its mirrors: all wait for the slowest where they meet, then pay what it costs."""
    found, workers = computed.measured, plan.workers
    assert found is not None
    assert workers is not None
    prices.begin()
    assert plan.micro_batches is not None
    # What is computed has the exchanges of a cut in it already.
    own_exchanges = [(x, times) for x, times in found.exchanges if x.purpose != "cut" and x.purpose not in ASIDE]
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
    return Outcome(clocks, steps, steps * given.task.batch_size, 0.0, "mirrored")


def _total_steps(given: Given) -> int:
    length = given.task.length
    return length["steps"] or (length["epochs"] or 1) * _steps_per_epoch(given)


def _steps_per_epoch(given: Given) -> int:
    return steps_per_epoch(len(given.splits.train), given.task.batch_size)


def of_the_whole_run(given: Given, plan: Plan, outcome: Outcome) -> Measurement:
    """The record of as many steps as the task has, each as those that were simulated."""
    parameters = sum(p.numel() for p in given.model.parameters())
    few = summed_up(given.task, plan, given.splits, outcome, parameters, None)
    steps = _total_steps(given)
    mean_s = max(outcome.clocks.last) / max(outcome.steps, 1)
    return replace(
        few,
        transport=plan.transport,
        steps=steps,
        epochs=steps / _steps_per_epoch(given),
        wall_s=mean_s * steps,
        samples_per_s=given.task.batch_size / mean_s if mean_s else 0.0,
        step_s=few.step_s if outcome.steps else Spread(0.0, 0.0, 0.0),
        peak_memory_B=0,
    )


class _Asked(Prices):
    """Notes what it is asked."""

    def __init__(self, cluster: Cluster, workers: int) -> None:
        super().__init__(cluster, workers)
        self.operations: dict[Operation, None] = {}

    def __call__(self, operation: Operation) -> float:
        self.operations[operation] = None
        return super().__call__(operation)


def asked_by(given: Given, plan: Plan) -> list[Operation]:
    """What a plan's strategy asks of its transport in a few steps; nothing where that depends on numbers."""
    assert plan.workers is not None
    numel = sum(p.numel() for p in given.model.parameters() if p.requires_grad)
    computed = Computed(StepCost(1e-3, 1e-4, 1.0, numel), Delays((), plan.workers, given.task.seed), "roofline")
    prices = _Asked(given.cluster, plan.workers)
    try:
        by_sizes(replace(given, here=True), plan, computed, prices, steps=FEW_STEPS)
    except BadInput:
        return []
    return list(prices.operations)
