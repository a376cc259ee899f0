"""HOGWILD! on sparse logistic regression: one worker, two without locks, and two under three kinds of locks.

    one worker           the same engine with one worker and nobody beside it: serial SGD, bit for bit
    plain torch          the loop as torch alone has it, sparse gradients and torch.optim.SGD; nothing is asked of it
    none                 2 workers write to one copy of the weights, without locks
    one                  … under one lock about the whole step
    coordinate           … under a lock for each weight that a sample touches, from its reading to its writing
    round_robin          … gradients side by side, updates in the order of ranks

2,000 features, 10 to a sample, a sample a step on every worker; features are dealt so that two samples share one with
probability about 1/20. A figure is the time of a burst on the slower rank over the samples of all: with locks single
steps mean little, since who has just had a lock gets it again. Locks are robust mutexes (`robust_mutex`).

The objective is the mean loss over the training samples once each has been visited as often as by one worker: worker p
takes the p-th, (p+2)-th … of the order that one worker takes. Its spread is over seeds.

    python benchmarks/hogwild.py [--quick] [--json FILE] [--rounds N]
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import _measure as measure
import torch
from _measure import Burst, Group, Report, Spread, Target
from torch.nn import functional as F

from manyhands import models
from manyhands.communication.communicator import Communicator
from manyhands.consistency.hogwild import Hogwild
from manyhands.contract import Batch, Worker
from manyhands.data import Splits
from manyhands.data.sparse import sparse_logistic
from manyhands.models import losses
from manyhands.partition.data import DataReplica
from manyhands.training.allocator import tune
from manyhands.training.member import Member
from manyhands.training.team import Team, team

LR = 0.5
SAMPLES, FEATURES, SUPPORT = 20_000, 2_000, 10
NOISE = 0.05  # some labels are wrong, so that the least loss is not 0
WORKERS = 2
LOCKS = ("none", "one", "coordinate", "round_robin")
SERIAL, PLAIN = "one worker", "plain torch"

# -- in the workers ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def problem(seed: int, samples: int) -> Splits:
    """The same samples for everybody."""
    return sparse_logistic(samples=samples, features=FEATURES, support=SUPPORT, noise=NOISE, test=1, seed=seed)


def one_by_one(splits: Splits, order: Sequence[int], total: int) -> list[Batch]:
    """Batches of one sample each, cut beforehand; ``total``: how many all workers take in a step."""
    (indices, values), target = splits.train.inputs, splits.train.target
    return [Batch((indices[i : i + 1], values[i : i + 1]), target[i : i + 1], 1, total) for i in order]


def own_worker(comm: Communicator, lock: str, splits: Splits) -> tuple[DataReplica, Worker]:
    """This rank's worker on fresh weights."""
    module = models.build("sparse_logistic", inputs=splits.inputs, classes=2)
    optimizer, loss = torch.optim.SGD(module.parameters(), lr=LR), losses.build("cross_entropy")
    replica = DataReplica(module, optimizer, loss, comm, common=True, sparse=True)
    return replica, Hogwild(lock).start(replica, comm)  # type: ignore[arg-type]


_steps: dict[str, Callable[[], object]] = {}


def prepare(member: Member, lock: str) -> None:
    """A job of a standing team: make the step and keep it."""
    comm, splits = member.comm, problem(0, SAMPLES)
    _, worker = own_worker(comm, lock, splits)
    batches = itertools.cycle(one_by_one(splits, range(comm.rank, SAMPLES, comm.size), comm.size))
    numbers = itertools.count()

    def step() -> object:
        comm.step = next(numbers)
        return worker.step(next(batches))

    _steps[lock] = step


def team_burst(member: Member, lock: str, steps: int, warm: int, start_at: float) -> list[float]:
    """A job of a standing team: one burst."""
    return list(measure.burst(_steps[lock], steps, warm, start_at))


def objective(member: Member, lock: str, seed: int, samples: int, passes: int) -> float:
    """A job of a standing team: train, and the mean loss over all training samples."""
    comm, splits = member.comm, problem(seed, samples)
    mark = comm.mark()
    replica, worker = own_worker(comm, lock, splits)
    generator = torch.Generator().manual_seed(seed)
    comm.barrier()
    for _ in range(passes):
        order = torch.randperm(samples, generator=generator).tolist()
        for batch in one_by_one(splits, order[comm.rank :: comm.size], comm.size):
            worker.step(batch)
    weights = worker.consensus()
    with replica.using(weights) as model, torch.no_grad():
        loss = float(F.cross_entropy(model(splits.train.inputs), splits.train.target))
    del replica, worker, weights, model
    comm.release(mark)
    return loss


def plain_step(rank: int) -> Callable[[], object]:
    """The same with torch alone."""
    tune()
    torch.set_num_threads(1)
    splits = problem(0, SAMPLES)
    module = models.build("sparse_logistic", inputs=splits.inputs, classes=2)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    batches = itertools.cycle(one_by_one(splits, range(SAMPLES), 1))

    def step() -> object:
        batch = next(batches)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(module(batch.inputs), batch.target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    return step


# -- in this process ---------------------------------------------------------------------------------------------------


class OnTeam:
    """A standing team as a candidate under one lock."""

    def __init__(self, crew: Team, lock: str) -> None:
        self._crew, self._lock = crew, lock
        crew.run("hogwild:prepare", lock)

    def __call__(self, steps: int, warm: int) -> list[Burst]:
        """One burst."""
        start_at = time.perf_counter() + 0.002
        return [Burst(*b) for b in self._crew.run("hogwild:team_burst", self._lock, steps, warm, start_at)]


def of_a_sample(ranks: Sequence[Burst]) -> float:
    """Seconds for each sample that any of the ranks has taken."""
    return measure.slowest_mean(ranks) / len(ranks)


def speed(report: Report, crews: dict[int, Team], probe: measure.PingPong, *, rounds: int, burst_s: float) -> None:
    """Samples per second."""
    with ExitStack() as stack:
        plain = Group(1, plain_step)
        stack.callback(plain.close)
        candidates: dict[str, measure.Candidate] = {SERIAL: OnTeam(crews[1], "none"), PLAIN: plain}
        candidates |= {lock: OnTeam(crews[WORKERS], lock) for lock in LOCKS}
        counts = dict.fromkeys(candidates, of_a_sample)
        measured = measure.alternate(candidates, probe, rounds=rounds, burst_s=burst_s, counts=counts)
    targets = [Target("one worker / lock-free (the speed-up)", measured.ratio(SERIAL, "none"), "≥", 1.7)]
    for lock, least in (("one", 1.6), ("coordinate", 1.5), ("round_robin", 2.0)):
        targets.append(Target(f"{lock} / lock-free", measured.ratio(lock, "none"), "≥", least))
    report.row(f"seconds for each sample, {WORKERS} workers", measured, targets, support=SUPPORT, features=FEATURES)
    rates = [f"{name} {1 / measured.seconds(name).median:,.0f}" for name in candidates]
    report.note(f"samples per second: {', '.join(rates)}")


def quality(report: Report, crews: dict[int, Team], *, seeds: int, samples: int, passes: int) -> None:
    """The objective after equal samples."""
    found: dict[str, list[float]] = {name: [] for name in (SERIAL, *LOCKS)}
    for seed in range(seeds):
        for name, reached in found.items():
            crew, lock = (crews[1], "none") if name == SERIAL else (crews[WORKERS], name)
            reached.append(crew.run("hogwild:objective", lock, seed, samples, passes)[0])
    title = f"objective after {passes} × {samples:,} samples"
    report.heading(title)
    for name, reached in found.items():
        median, p10, p90 = Spread.of(reached)
        print(f"  {name:<52}{median:>12.5f} {p10:>12.5f} – {p90:.5f}")
    report.rows.append({"row": title, "objective": found})
    targets = []
    for lock in LOCKS:
        off = [100 * abs(a / b - 1) for a, b in zip(found[lock], found[SERIAL], strict=True)]
        targets.append(Target(f"{lock}: off the serial objective", Spread.of(off), "≤", 1, "%"))
    report.ask(title, targets)


def main() -> None:
    """Speed, then quality."""
    options = measure.arguments(__doc__ or "")
    report = Report("hogwild")
    rounds = options.rounds or (3 if options.quick else 20)
    probe = measure.PingPong()
    with (
        contextlib.closing(probe),
        team("shared", 1, threads=1) as alone,
        team("shared", WORKERS, threads=1) as together,
    ):
        crews = {1: alone, WORKERS: together}
        speed(report, crews, probe, rounds=rounds, burst_s=0.03 if options.quick else 0.3)
        if options.quick:
            quality(report, crews, seeds=1, samples=2_000, passes=1)
        else:
            quality(report, crews, seeds=5, samples=SAMPLES, passes=1)
    report.finish(options.json)


if __name__ == "__main__":
    main()
