"""A run with numbers: real gradients of many virtual workers in one process, in virtual time.

Every worker has a replica, a strategy's worker and a share of every batch, as in training; they run in one thread, one
at a time, in the order of virtual time (`ranks`, `communication.transports.simulated`). So what a gradient is taken at,
and what it is added to, is what it would be at those times: races, staleness and bounds included. Evaluation takes no
virtual time, and records stand at the time of rank 0, as in training.

Where strategies keep one copy of the parameters there is one for all workers; activations exist once, as one worker
computes at a time. Every worker has a gradient of its own.

Guarantee: with one worker, and under strategies that meet in lock-step on equal shares, the same parameters as training
on shared memory, bit for bit (with `batched` gradients, from `batched.FEWEST` workers, up to summation order).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from manyhands.communication.transports.simulated import SimulatedCommunicator
from manyhands.communication.transports.single import SingleCommunicator
from manyhands.consistency import buffers as buffer_policy
from manyhands.contract import Batch, Strategy
from manyhands.data import Splits
from manyhands.models import losses, optimizers, schedules
from manyhands.partition.data import DataReplica
from manyhands.plan import Plan
from manyhands.simulation.batched import FEWEST, Together
from manyhands.simulation.outcome import Clocks, Outcome
from manyhands.simulation.pace import Pace, StepCost, measured
from manyhands.simulation.prices import Prices
from manyhands.simulation.ranks import GreenletWorld
from manyhands.simulation.replica import TimedReplica
from manyhands.simulation.stragglers import Delays
from manyhands.simulation.trace import Spans
from manyhands.task import Task
from manyhands.training.evaluation import evaluate
from manyhands.training.loop import ASK_EVERY, advance
from manyhands.training.preparation import build_model, total_steps
from manyhands.training.run import Since
from manyhands.training.sampler import Sampler, Share, order

#: An epoch's order is the same for all workers, and there may be thousands of them.
_order = functools.lru_cache(maxsize=2)(order)


class SharedSampler(Sampler):
    """Workers of one process keep one order between them."""

    def _samples(self, epoch: int) -> Tensor:
        return _order(self.n, self.seed, epoch)


@dataclass(frozen=True)
class Valued:
    """What is run."""

    task: Task
    plan: Plan
    splits: Splits
    cost: StepCost
    delays: Delays
    shares_memory: bool
    evaluate: str | int

    @property
    def workers(self) -> int:
        """Virtual ones."""
        assert self.plan.workers is not None
        return self.plan.workers

    @property
    def strategy(self) -> Strategy:
        """The plan's."""
        assert isinstance(self.plan.strategy, Strategy)
        return self.plan.strategy

    def sampler(self, rank: int) -> Sampler:
        """A rank's."""
        return sampler_of(self.task, self.splits, self.strategy, self.workers, rank)


def sampler_of(task: Task, splits: Splits, strategy: Strategy, workers: int, rank: int) -> Sampler:
    """What divides the batches; strategies whose workers all see the whole batch get all of it."""
    alone = strategy.whole_batch
    n, of = len(splits.train), (1, 0) if alone else (workers, rank)
    return SharedSampler(n, batch_size=task.batch_size, workers=of[0], rank=of[1], seed=task.seed)


@dataclass
class _Shared:
    """What the ranks write for each other; one runs at a time."""

    last: list[float]
    wait_s: list[float]
    sums: list[tuple[float, float]]  # since the last record, by rank
    clocks: Clocks = field(default_factory=Clocks)
    history: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    ends: bool = False
    steps: int = 0
    seen: int = 0
    together: Together | None = None
    notes: list[str] = field(default_factory=list)


def run(what: Valued, prices: Prices, spans: Spans | None = None) -> Outcome:
    """Simulate it."""
    world = GreenletWorld(what.workers, prices, queue=prices.queue, observe=None if spans is None else spans.observe)
    world.woken_s = prices.woken_s
    n = what.workers
    shared = _Shared([0.0] * n, [0.0] * n, [(0.0, 0.0)] * n)
    with torch.random.fork_rng(devices=[]):
        world.run(lambda comm: _Rank(what, prices, shared, comm).run())
    if shared.together is not None and not shared.together.works:
        shared.notes.append(f"gradients one after the other: {shared.together.why_not}")
    shared.clocks.last, shared.clocks.wait_s = shared.last, shared.wait_s
    epochs = shared.seen / len(what.splits.train)
    return Outcome(
        shared.clocks, shared.steps, shared.seen, epochs, "values", shared.history, shared.state, shared.notes
    )


class _Rank:
    """One virtual worker."""

    def __init__(self, what: Valued, prices: Prices, shared: _Shared, comm: SimulatedCommunicator) -> None:
        self._what, self._prices, self._shared, self.comm = what, prices, shared, comm
        comm.shares_memory = what.shares_memory  # type: ignore[misc]
        task, strategy = what.task, what.strategy
        self._model = build_model(task, what.splits, comm, alike=strategy.whole_batch, cut=comm.rank > 0)
        self._loss = losses.build(task.loss)
        optimizer = optimizers.build(task.optimizer, self._model.parameters())
        self._sampler = what.sampler(comm.rank)
        self._schedule = schedules.build(task.schedule, optimizer, steps=total_steps(task, self._sampler))
        assert what.plan.micro_batches is not None
        self.replica = TimedReplica(
            self._model,
            optimizer,
            self._loss,
            comm,
            common=strategy.parameters == "common",
            clip=task.clip,
            precision=what.plan.precision,
            micro_batches=what.plan.micro_batches,
            shares=self._sampler.workers,
            sparse=strategy.sparse,
        )
        self.replica.pace = Pace(what.cost, what.delays.of(comm.rank))
        self.replica.clock = comm
        with comm.counting("control"):
            self._worker = strategy.start(self.replica, comm)
        self._since = Since(sums=losses.reduction(self._loss) == "sum")
        if self._can_batch():
            if shared.together is None:
                rows = functools.lru_cache(maxsize=1)(self._rows)
                assert self._loss is not None
                shared.together = Together(self._model, self._loss, what.workers, rows)
                self._everyone = sampler_of(task, what.splits, strategy, 1, 0)
                self._coming = self._everyone.batches(epochs=task.length["epochs"], steps=task.length["steps"])
            self.replica.together = shared.together

    def _can_batch(self) -> bool:
        plan, strategy = self._what.plan, self._what.strategy
        plain = self._loss is not None and plan.micro_batches == 1 and plan.precision == "float32"
        return plain and strategy.identical and not strategy.whole_batch and self._what.workers >= FEWEST

    def _rows(self, step: int) -> tuple[Any, Any, int]:
        """Everybody's samples of a step, in the order of ranks."""
        share = next(s for s in self._coming if s.before.step == step)
        inputs, target = self._what.splits.train.rows(share.indices)
        return inputs, target, len(share.indices)

    def run(self) -> None:
        """All steps."""
        comm, worker, task = self.comm, self._worker, self._what.task
        with comm.counting("consensus"):
            comm.barrier()
        self._prices.begin()
        comm.context.counters = type(comm.counters)()
        self.replica.compute_s = self.replica.update_s = 0.0
        recorded = -1
        for share in self._sampler.batches(epochs=task.length["epochs"], steps=task.length["steps"]):
            self._step(share)
            cursor = share.after
            if self._due(share):
                worker.meet()
                self._record(share.before.epoch, cursor)
                recorded = cursor.step
            elif task.seconds is not None and cursor.step % ASK_EVERY == 0:
                worker.meet()
                self._agree(self.comm.now >= task.seconds)
            if self._shared.ends:
                break
        self._note()
        if recorded != cursor.step:
            worker.meet()
            self._record(share.before.epoch, cursor)
        self._conclude()

    def _step(self, share: Share) -> None:
        comm, shared, count = self.comm, self._shared, len(share.indices)
        comm.step = share.before.step
        inputs, target = self._what.splits.train.rows(share.indices)
        loss = self._worker.step(Batch(inputs, target, count, share.global_count))
        if self._schedule is not None:
            advance(self._schedule)
        self._since.add(float(loss), count if self._since.sums else self.replica.count)
        if comm.rank == 0:
            shared.clocks.ends.append(comm.now)
            shared.steps += 1
            shared.seen += share.global_count

    def _due(self, share: Share) -> bool:
        every = self._what.evaluate
        return share.after.epoch != share.before.epoch if isinstance(every, str) else share.after.step % every == 0

    def _agree(self, ends: bool) -> None:
        """Rank 0's word is everybody's. Collective."""
        if self.comm.rank == 0:
            self._shared.ends = ends
        with self.comm.counting("consensus"):
            self.comm.barrier()

    def _record(self, epoch: int, cursor: Any) -> None:
        """As `training.conclusion.record`: mean loss since the last one, and the test set. Collective."""
        comm, shared, what = self.comm, self._shared, self._what
        shared.sums[comm.rank] = self._since.so_far()
        self._since.begin()
        now = comm.now
        parameters = self._worker.consensus()
        agreed = buffer_policy.agree(self.replica.buffers, comm, what.plan.buffers)  # type: ignore[arg-type]
        with comm.counting("consensus"):
            comm.barrier()
        target = what.task.target_accuracy
        if comm.rank == 0:
            total, count = (sum(column) for column in zip(*shared.sums, strict=True))
            accuracy = test_loss = None
            if what.splits.test is not None and what.evaluate != "never":
                with self.replica.using(parameters, agreed):
                    accuracy, test_loss = evaluate(self._model, self._loss, what.splits.test, SingleCommunicator())
            shared.history.append(
                {
                    "epoch": epoch,
                    "step": cursor.step,
                    "samples": shared.seen,
                    "train_s": now,
                    "train_loss": total / count if count else None,
                    "test_accuracy": accuracy,
                    "test_loss": test_loss,
                }
            )
        reached = target is not None and comm.rank == 0 and (shared.history[-1]["test_accuracy"] or 0) >= target
        late = what.task.seconds is not None and now >= what.task.seconds
        self._agree(reached or late)

    def _note(self) -> None:
        """What training has taken."""
        comm, clocks, replica = self.comm, self._shared.clocks, self.replica
        self._shared.last[comm.rank], self._shared.wait_s[comm.rank] = comm.now, comm.counters.wait_s
        clocks.staleness.update(self._worker.staleness)
        if comm.rank == 0:
            clocks.compute_s, clocks.update_s = replica.compute_s, replica.update_s
            clocks.communicate_s, clocks.sent_B = comm.counters.communicate_s, comm.counters.sent_B()
            clocks.compression = comm.counters.compression

    def _conclude(self) -> None:
        comm, replica = self.comm, self.replica
        self._worker.finish()
        agreed = buffer_policy.agree(replica.buffers, comm, self._what.plan.buffers)  # type: ignore[arg-type]
        if comm.rank == 0:
            for mine, value in zip(replica.buffers, agreed, strict=True):
                mine.copy_(value)
            self._shared.state = {name: x.detach().clone() for name, x in self._model.state_dict().items()}


def cost_here(task: Task, plan: Plan, splits: Splits) -> StepCost:
    """What a step of one worker costs in this process, measured on its shares."""
    assert isinstance(plan.strategy, Strategy)
    assert plan.workers is not None
    comm = SingleCommunicator()
    with torch.random.fork_rng(devices=[]):
        model = build_model(task, splits, comm, cut=True)
        optimizer = optimizers.build(task.optimizer, model.parameters())
        assert plan.micro_batches is not None
        replica = DataReplica(
            model,
            optimizer,
            losses.build(task.loss),
            comm,
            common=False,
            precision=plan.precision,
            micro_batches=plan.micro_batches,
        )
        sampler = sampler_of(task, splits, plan.strategy, plan.workers, 0)
        shares = sampler.batches(epochs=10**9)

        def batch(step: int) -> Batch:
            share = next(shares)
            return Batch(*splits.train.rows(share.indices), len(share.indices), share.global_count)

        return measured(replica, batch, sum(p.flat.numel() for p in replica.pieces))
