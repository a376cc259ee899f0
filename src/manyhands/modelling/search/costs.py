"""What the steps of many plans compute, from a few shares that are measured or calculated; and their prices from that.

    crowd      (workers side by side, threads of each): they press on one another's caches and memory
    share      samples of one pass: ⌈⌈B / replicas⌉ / micro-batches⌉
    compute    micro-batches × a straight line between the shares that are known of the crowd

Of each crowd as many as `KNOTS` shares are measured, by one team of workers; the step measured is that of plain
synchronous training, so a strategy's own arithmetic is not in it. A plan whose step is another (a cut model, a
compressor or a rule that looks at numbers) has its own step measured, at its own price.

Approximation: half as many samples in two passes take as long as two steps of that share, update and rest once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from manyhands.communication import futex
from manyhands.communication.topology import Mesh
from manyhands.contract import Strategy
from manyhands.errors import BadInput
from manyhands.modelling import prediction
from manyhands.modelling.given import Given
from manyhands.modelling.prediction import ERRORS, Computed, Prediction, Source, is_cut
from manyhands.modelling.profile import co_runners, profiles
from manyhands.modelling.search.room import Room, plain
from manyhands.plan import Plan
from manyhands.simulation import sizes
from manyhands.simulation.outcome import Outcome
from manyhands.simulation.pace import StepCost
from manyhands.simulation.prices import Prices
from manyhands.simulation.replica import Sizes
from manyhands.simulation.sized import NoNumbers
from manyhands.simulation.stragglers import Delays, Recorded
from manyhands.task import Task
from manyhands.training.sampler import steps_per_epoch

#: Shares of a crowd that are measured; steps are nearly straight in the batch between factors of two or four.
KNOTS = 4
#: Steps that are simulated of a plan, in whole periods of its exchanges; of ranks that run one by one fewer.
STEPS, RANK_STEPS = 16, 12
#: Steps of a rank with a server, one by one, that one search does: 90 to 150 µs each.
EVENTS = 5_000
#: Steps of their own that one search measures, 1 to 1.5 s each.
MEASURINGS = 8

Crowd = tuple[int, int]


@dataclass(frozen=True)
class Knot:
    """What is known of a crowd at one share."""

    samples: float
    seconds: float
    update_s: float
    rest_s: float
    elements: int
    computed: Computed


class Costs:
    """The `engine.Pricer` of a task on a cluster."""

    def __init__(self, given: Given, *, compute: Source | None = None, fresh: bool = False) -> None:
        self._given, self._fresh = given, fresh
        on_cores = given.here or given.cluster.device.kind == "cpu"
        self._compute: Source = compute or ("measured" if on_cores else "roofline")
        samples, batch_size = len(given.splits.train), given.task.batch_size
        self._whole = min(batch_size, samples)
        self._steps_per_epoch = steps_per_epoch(samples, batch_size)
        self._knots: dict[Crowd, list[Knot]] = {}
        self._how = functools.lru_cache(maxsize=None)(_how)
        room = Room(given)
        self.short, self.needed_B = room.short, room.needed_B

    def begin(self, plans: Sequence[Plan]) -> None:
        """Measure what these ask for; see `engine.Pricer.begin`."""
        needed: dict[Crowd, dict[int, Plan]] = {}
        for plan in plans:
            needed.setdefault(self._crowd(plan), {}).setdefault(self._pass(plan), plan)
        for crowd, shares in needed.items():
            chosen = spread_out(sorted(shares), KNOTS)
            self._knots[crowd] = self._known(crowd, chosen, next(iter(shares.values())))

    def effort(self, plan: Plan) -> tuple[str, float]:
        """See `engine.Pricer.effort`."""
        how = "numbers" if is_cut(plan) else self._how(plan.strategy, min(plan.workers or 1, 2))
        if how == "numbers":
            if self._compute != "measured":
                return ("", 0.0) if not is_cut(plan) else self._no_price(plan)
            _check_measurable(plan)
            return f"{MEASURINGS} measured steps", 1 / MEASURINGS
        if how == "ranks":
            each = (plan.workers or 1) * (1 + int(getattr(plan.strategy, "servers", 0) or 0))
            return f"{EVENTS:,} steps of ranks that run one by one", each * self._steps(plan, RANK_STEPS) / EVENTS
        return "", 0.0

    def _no_price(self, plan: Plan) -> tuple[str, float]:
        """Raises what `predict` says of a part of a model on a device that is not here."""
        self._computing(self._given.task, plan)
        return "", 0.0

    def least_s(self, plan: Plan) -> float:
        """See `engine.Pricer.least_s`: the work divided evenly among all workers, and no exchange."""
        assert isinstance(plan.strategy, Strategy)
        cost = self._computed(plan).cost
        share = self._whole if plan.strategy.whole_batch else self._whole / (plan.workers or 1)
        return self._steps_per_epoch * float(cost.compute(share)) * (1 - ERRORS["grid"])

    def price(self, plan: Plan) -> Prediction:
        """See `engine.Pricer.price`."""
        how = "numbers" if is_cut(plan) else self._how(plan.strategy, min(plan.workers or 1, 2))
        computed = None if how == "numbers" else self._computed(plan)
        steps = self._steps(plan, RANK_STEPS if how == "ranks" else STEPS)
        task = self._given.task
        if (task.steps or (task.epochs or 1) * self._steps_per_epoch) < steps:  # a short run may never exchange
            task = dataclasses.replace(task, epochs=None, steps=steps)
        given = dataclasses.replace(self._given, task=task)
        return prediction.predicted(
            given, plan, compute=self._compute, fresh=self._fresh, computed=computed, steps=steps
        )

    def _steps(self, plan: Plan, fewest: int) -> int:
        """So many or a little more, which is a number of whole periods."""
        assert isinstance(plan.strategy, Strategy)
        traffic = plan.strategy.traffic(64, plan.workers or 1)
        period = max(part.every for part in (traffic, *traffic.also))
        return -(-fewest // period) * period

    def _crowd(self, plan: Plan) -> Crowd:
        """As if the model were not cut."""
        if self._compute == "roofline":
            return 1, 1
        return co_runners(dataclasses.replace(plan, mesh=Mesh(data=plan.workers or 1))), plan.threads

    def _pass(self, plan: Plan) -> int:
        """Samples; of a model that is cut its even part of the work, for `least_s`."""
        assert isinstance(plan.strategy, Strategy)
        share = self._whole if plan.strategy.whole_batch else -(-self._whole // (plan.workers or 1))
        return max(-(-share // _passes(plan)), 1)

    def _known(self, crowd: Crowd, shares: Sequence[int], like: Plan) -> list[Knot]:
        """By samples, ascending."""
        given, (side_by_side, threads) = self._given, crowd
        transport = "single" if side_by_side == 1 else "threads" if like.transport == "threads" else "shared"
        alike = dataclasses.replace(plain(like, side_by_side, transport), threads=threads)
        batches = [min(share * side_by_side, len(given.splits.train)) for share in shares]
        if self._compute == "measured":
            profiles(given.task, alike, batches, given.cluster, data_dir=given.data_dir, fresh=self._fresh)
        found: dict[float, Knot] = {}
        for batch in batches:
            task = dataclasses.replace(given.task, batch_size=batch)
            computed = self._computing(task, alike)
            cost = computed.cost
            for samples, seconds in cost.points or ((float(cost.samples), cost.compute_s),):
                found[samples] = Knot(samples, seconds, cost.update_s, cost.rest_s, cost.elements, computed)
        return [found[samples] for samples in sorted(found)]

    def _computing(self, task: Task, plan: Plan) -> Computed:
        given = dataclasses.replace(self._given, task=task)
        return prediction.computing(given, plan, compute=self._compute, fresh=False)

    def _computed(self, plan: Plan) -> Computed:
        """What ``plan`` computes, between the shares that are known of its crowd."""
        knots, passes, share = self._knots[self._crowd(plan)], _passes(plan), self._pass(plan)
        near = min(knots, key=lambda knot: abs(knot.samples - share))
        points = tuple((knot.samples * passes, knot.seconds * passes) for knot in knots)
        cost = StepCost(
            near.seconds * passes,
            near.update_s,
            near.samples * passes,
            near.elements,
            near.rest_s,
            points if len(points) > 1 else (),
        )
        workers, found = plan.workers or 1, near.computed
        if found.measured is None:
            return dataclasses.replace(found, cost=cost, delays=Delays((), workers, self._given.task.seed))
        between = passes > 1 or abs(near.samples - share) > 0.5
        return dataclasses.replace(
            found,
            cost=cost,
            delays=Recorded(found.measured.factors, workers),
            source="grid" if between else "measured",
            measured=None,
        )


def _check_measurable(plan: Plan) -> None:
    """A pipeline is measured with all its stages at once."""
    if co_runners(plan) > max(futex.cores(), 2):
        raise BadInput(
            f"the stages of {plan.mesh} are measured side by side, and {plan.workers} workers are more than this "
            f"machine has cores ({futex.cores()}). Search at most workers={futex.cores()} with pipelines (--workers)."
        )


def spread_out(values: Sequence[int], most: int) -> list[int]:
    """Of ascending values at most so many: the ends, and what lies evenly between them in the logarithm.

    >>> spread_out([1, 2, 4, 8, 16, 32, 64], 4)
    [1, 4, 16, 64]
    """
    if len(values) <= most:
        return list(values)
    ratio = values[-1] / values[0]
    wanted = [values[0] * ratio ** (i / (most - 1)) for i in range(most)]
    return sorted({min(values, key=lambda v: abs(v - want)) for want in wanted})


def _passes(plan: Plan) -> int:
    return 1 if is_cut(plan) else plan.micro_batches or 1


def _how(strategy: Strategy, workers: int) -> str:
    """How its ranks are simulated: ``folded``, ``vectors``, ``ranks``, or not at all, since it looks at ``numbers``."""
    what = sizes.Sized(
        strategy,
        workers,
        [Sizes("any", 0, 64, torch.float32, ((0, 64),))],
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1),
        workers,
        workers,
        {"epochs": None, "steps": 2},
        StepCost(1.0, 0.1, 1, 64),
        Delays((), workers, 0),
        True,
    )
    try:
        outcome: Outcome = sizes.run(what, lambda: Prices(None, workers))
    except BadInput as e:
        if isinstance(e.__cause__, NoNumbers):
            return "numbers"
        raise
    return outcome.how
