"""Real steps and mirrored ones in turn, in the same processes: what both meet of the host's moods is the same.

A shared host changes its speed by half within seconds, and not for all cores alike. So a run and the profile that
predicts it (those at other batches half as long) alternate every `TURN_S`, and so do rounds of the plan's exchanges by
themselves; what is compared is a turn with itself.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from manyhands.cluster import Cluster
from manyhands.cluster.measured import Curve
from manyhands.communication import futex
from manyhands.communication.transports.events import Operation
from manyhands.consistency.synchronous import Synchronous
from manyhands.contract import Batch
from manyhands.modelling import calibration, visits
from manyhands.modelling.calibration.collectives import meter
from manyhands.modelling.calibration.repeating import Try
from manyhands.modelling.exchanges import LONGEST_S, patterns_for
from manyhands.modelling.fetching import fetch_s
from manyhands.modelling.keeping import Profile, operation
from manyhands.modelling.operators.gauge import Gauge, then
from manyhands.modelling.profile import Steps, joined, mirrored
from manyhands.plan import Plan
from manyhands.simulation.folded import NotAlike
from manyhands.task import Task, from_table
from manyhands.training.loop import advance
from manyhands.training.member import Member
from manyhands.training.preparation import prepare
from manyhands.training.run import Options, Run
from manyhands.training.team import Team

JOB = f"{__name__}:job"
TURN_S = 0.12
TURNS = 8
#: Of a turn, for each kind of exchange.
EXCHANGE_S = 0.05
#: Of a turn, for how quick the machine is, and for fetching batches.
GAUGE_S, FETCH_S = 0.06, 0.01
#: Of a turn's steps the first are not counted: caches hold the other's.
FIRST = 2


class Turns(NamedTuple):
    """What workers have found, turn by turn."""

    #: Of worker 0's real steps (turn × step), seconds each.
    times: NDArray[np.float64]
    #: When those of each worker ended (worker × turn × step), by one clock.
    ends: NDArray[np.float64]
    #: By turn, at the task's batch and at others.
    profiles: list[list[Profile]]
    #: By turn, how many times as long as at its calibration the machine took, and seconds to fetch a batch.
    slower: list[float]
    fetches: list[float]


def alternated(
    crew: Team,
    plan: Plan,
    tables: dict[str, Any],
    turns: int,
    batches: Sequence[int],
    asked: Sequence[Operation],
    fewest: int = 3,
) -> Turns:
    """Real steps and profiles, at the task's batch and at ``batches``, by turn.

    ``asked``: what a strategy exchanges that is measured as a plain one. What exchanges take is the median of turns;
    what is done to servers' memory that of each turn. A turn has so many steps at the ``fewest``.
    """
    told = crew.run(JOB, turns, tables, list(batches), [list(x) for x in asked], fewest, deadline_s=300.0)
    assert plan.workers is not None
    oversubscribed = plan.workers > futex.cores()
    tries = [[Try(each, None, None, oversubscribed) for each in turn] for turn in told[0]["exchanges"]]
    by_turn = [[c for one in turn for c in one.curves(plan.transport, plan.workers)] for turn in tries]
    more: dict[str, Any] = {"plain": bool(told[0]["plain"])}
    curves = tuple(_median_curve(each) for each in zip(*by_turn, strict=True))
    slower, fetches = (
        [statistics.median(one[name][turn] for one in told) for turn in range(turns)] for name in ("slower", "fetches")
    )
    found = []
    for turn in range(turns):
        visited = visits.curves([one["visits"][turn] for one in told], plan.transport, plan.workers)
        each = [joined([one["profiles"][turn][i] for one in told]) for i in range(1 + len(batches))]
        found.append([dataclasses.replace(one, **more, curves=(*curves, *visited)) for one in each])
    return Turns(told[0]["times"].numpy(), np.stack([one["ends"].numpy() for one in told]), found, slower, fetches)


def _median_curve(each: Sequence[Curve]) -> Curve:
    seconds = np.array([c.seconds for c in each])
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75), axis=0)
    spread = (high - low) / np.sqrt(len(each)) / np.where(middle > 0, middle, 1.0)
    return dataclasses.replace(each[0], seconds=tuple(middle.tolist()), spread=tuple(spread.tolist()))


def job(
    member: Member,
    turns: int,
    tables: dict[str, Any],
    batches: Sequence[int],
    asked: Sequence[Sequence[Any]],
    fewest: int,
) -> dict[str, Any]:
    """What a worker does: in each turn real steps, mirrored ones at every batch, and rounds of the plan's exchanges."""
    task, plan = from_table(Task, tables["task"], "[task]"), from_table(Plan, tables["plan"], "[plan]")
    cluster, options = calibration.cached(), Options()
    real = prepare(member, task, plan, options)
    each = [task, *(dataclasses.replace(task, batch_size=n) for n in batches)]
    made = [_mirrored(member, one, plan, cluster) for one in each]
    mirrors, plain = [steps for steps, _ in made], made[0][1]
    shares = real.sampler.batches(epochs=10**9, steps=None)
    _steps(real, shares, 5)
    for profiled in mirrors:
        profiled.take(TURN_S)
    step_s = _longest(member, _steps(real, shares, 5)[0])
    turn_s = max(TURN_S, fewest * step_s)
    count = max(fewest, int(turn_s / max(step_s, 1e-6)))
    operations = [operation(said) for said in asked] if plain else _asked(member, mirrors[0].told())
    servers = mirrors[0].visits(member.comm)
    meters = _meters(member, operations, step_s, visited=servers is not None)
    gauge = _gauge(cluster, plan)
    times, ends, profiles, exchanges, visited, slower, fetches = [], [], [], [], [], [], []
    for _ in range(turns):
        member.comm.barrier()
        before = gauge.slower(GAUGE_S / 2)
        member.comm.barrier()
        taken, ended = _steps(real, shares, FIRST + min(count, 500))
        times.append(taken[FIRST:])
        ends.append(ended[FIRST:])
        member.comm.barrier()
        slower.append(math.sqrt(before * gauge.slower(GAUGE_S / 2)))  # its speed lasts for seconds, or for less
        fetches.append(fetch_s(real.splits.train, real.sampler.largest, threads=plan.threads, seconds=FETCH_S))
        for i, profiled in enumerate(mirrors):
            member.comm.barrier()
            profiled.begin()
            profiled.take(turn_s / 2 if i else turn_s, skipped=FIRST)
        profiles.append([profiled.told() for profiled in mirrors])
        exchanges.append([measured() for measured in meters])
        visited.append([] if servers is None else servers.take(mirrors[0].median_s, EXCHANGE_S))
    real.worker.meet()
    return {
        "times": torch.tensor(times, dtype=torch.float64),
        "ends": torch.tensor(ends, dtype=torch.float64),
        "visits": visited,
        "plain": plain,
        "profiles": profiles,
        "exchanges": exchanges,
        "slower": slower,
        "fetches": fetches,
    }


def _gauge(cluster: Cluster | None, plan: Plan) -> Gauge:
    table = () if cluster is None or cluster.measured is None else cluster.measured.operators
    assert plan.workers is not None
    return Gauge(then(table, plan.threads, plan.workers))


def _asked(member: Member, told: dict[str, Any]) -> list[Operation]:
    """What a step exchanges; of a pipeline what any rank hands over."""
    hops = torch.zeros(member.comm.size, dtype=torch.float64)
    hops[member.comm.rank] = max((n for _, n in told["hops"]), default=0)
    with member.comm.counting("control"):
        member.comm.all_reduce(hops).wait()
    found = [operation(said) for *said, _ in told["exchanges"]]
    return found + [Operation("send", int(n), 2, (0, 1), 0, 1, False, "cut") for n in set(hops.tolist()) - {0.0}]


def _meters(
    member: Member, operations: Sequence[Operation], step_s: float, *, visited: bool
) -> list[Callable[[], dict[str, Any]]]:
    comm = member.comm
    if comm.size == 1:
        return []
    wanted = patterns_for(
        operations, comm.size, shares_memory=comm.shares_memory, one_sided=comm.one_sided, visited=visited
    )
    compute_s = min(step_s, LONGEST_S)
    return [meter(comm, name, sizes, EXCHANGE_S, compute_s) for name, sizes in wanted.items()]


def _mirrored(member: Member, task: Any, plan: Plan, cluster: Any) -> tuple[Steps, bool]:
    try:
        found = mirrored(member, task, plan, cluster, None)
        found.take(0.0)
    except NotAlike:
        plain = dataclasses.replace(plan, strategy=Synchronous(update="replicated"))
        return mirrored(member, task, plain, cluster, None), True
    return found, False


def _longest(member: Member, times: list[float]) -> float:
    """The median step of the slowest worker, which all take."""
    told = torch.zeros(member.comm.size, dtype=torch.float64)
    told[member.comm.rank] = sorted(times)[len(times) // 2]
    with member.comm.counting("control"):
        member.comm.all_reduce(told).wait()
    return float(told.max())


def _steps(run: Run, shares: Any, count: int) -> tuple[list[float], list[float]]:
    """As the training loop times them, and when they ended."""
    clock, times, ends = time.perf_counter, list[float](), list[float]()
    for _ in range(count):
        share = next(shares)
        run.comm.step = share.before.step
        t0 = clock()
        inputs, target = run.splits.train.rows(share.indices)
        run.worker.step(Batch(inputs, target, len(share.indices), share.global_count))
        if run.schedule is not None:
            advance(run.schedule)
        ends.append(clock())
        times.append(ends[-1] - t0)
    return times, ends
