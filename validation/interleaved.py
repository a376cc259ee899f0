"""Real steps and mirrored ones in turn, in the same processes: what both meet of the host's moods is the same.

A shared host changes its speed by half within tens of seconds, and not for all cores alike. So a run and the profile
that predicts it (those at other batches half as long) alternate every `TURN_S`, and what exchanges take is measured
after each half of the turns; what is compared are medians over all of them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from manyhands.cluster.measured import Curve
from manyhands.communication.transports.events import Operation
from manyhands.consistency.synchronous import Synchronous
from manyhands.contract import Batch
from manyhands.modelling import calibration
from manyhands.modelling.exchanges import curves_here
from manyhands.modelling.profile import Profile, Steps, exchanges_here, joined, mirrored, operations_of
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
#: Of a turn's steps the first are not counted: caches hold the other's.
FIRST = 2


def alternated(
    crew: Team,
    plan: Plan,
    tables: dict[str, Any],
    turns: int,
    batches: Sequence[int],
    asked: Callable[[], Sequence[Operation]],
) -> tuple[NDArray[np.float64], list[Profile]]:
    """Times of real steps (turn × step) of worker 0, and profiles at the task's batch and at each of ``batches``.

    ``asked``: see `modelling.profile.profile`.
    """
    assert plan.workers is not None
    halves: list[list[dict[str, Any]]] = []
    curves = []
    for _ in range(2):
        halves.append(crew.run(JOB, -(-turns // 2), tables, list(batches), deadline_s=300.0))
        if exchanges_here(plan):
            first = joined([one["profiles"][0] for one in halves[0]])
            operations = asked() if halves[0][0]["plain"] else operations_of(first)
            curves.append(curves_here(crew, plan.transport, plan.workers, operations, first.compute_s))
    steps = min(half[0]["times"].shape[1] for half in halves)
    times = torch.cat([half[0]["times"][:, :steps] for half in halves])
    plain, exact = bool(halves[0][0]["plain"]), tuple(map(_mean, *curves)) if curves else ()
    found = []
    for i in range(1 + len(batches)):
        one, other = ([told["profiles"][i] for told in half] for half in halves)
        told = [a | {"rows": torch.cat([a["rows"], b["rows"]])} for a, b in zip(one, other, strict=True)]
        found.append(dataclasses.replace(joined(told), plain=plain, curves=exact))
    return times.numpy(), found


def _mean(first: Curve, second: Curve) -> Curve:
    """Of two of one operation."""
    seconds = tuple((a + b) / 2 for a, b in zip(first.seconds, second.seconds, strict=True))
    apart = tuple(abs(a - b) / (a + b) if a + b else 0.0 for a, b in zip(first.seconds, second.seconds, strict=True))
    return dataclasses.replace(first, seconds=seconds, spread=tuple(map(max, apart, first.spread)))


def job(member: Member, turns: int, tables: dict[str, Any], batches: Sequence[int]) -> dict[str, Any]:
    """What a worker does; the times of its real steps by turns, and what `Steps.told` tells of the mirrored ones."""
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
    count = max(3, int(TURN_S / max(_longest(member, _steps(real, shares, 5)), 1e-6)))
    for profiled in mirrors:
        profiled.begin()
    times = []
    for _ in range(turns):
        member.comm.barrier()
        times.append(_steps(real, shares, FIRST + min(count, 500))[FIRST:])
        for i, profiled in enumerate(mirrors):
            member.comm.barrier()
            profiled.take(TURN_S / 2 if i else TURN_S, skipped=FIRST)
    real.worker.meet()
    profiles = [profiled.told() for profiled in mirrors]
    return {"times": torch.tensor(times, dtype=torch.float64), "plain": plain, "profiles": profiles}


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


def _steps(run: Run, shares: Any, count: int) -> list[float]:
    """As the training loop times them."""
    clock, times = time.perf_counter, []
    for _ in range(count):
        share = next(shares)
        run.comm.step = share.before.step
        t0 = clock()
        inputs, target = run.splits.train.rows(share.indices)
        run.worker.step(Batch(inputs, target, len(share.indices), share.global_count))
        if run.schedule is not None:
            advance(run.schedule)
        times.append(clock() - t0)
    return times
