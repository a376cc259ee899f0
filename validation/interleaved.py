"""Real steps and mirrored ones in turn, in the same processes: what both meet of the host's moods is the same.

A shared host changes its speed by half within tens of seconds, and not for all cores alike. So a run and the profile
that predicts it alternate every `TURN_S`; what is compared are medians over all turns.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from manyhands.consistency.synchronous import Synchronous
from manyhands.contract import Batch
from manyhands.modelling import calibration
from manyhands.modelling.profile import Steps, mirrored
from manyhands.plan import Plan
from manyhands.simulation.folded import NotAlike
from manyhands.task import Task, from_table
from manyhands.training.loop import advance
from manyhands.training.member import Member
from manyhands.training.preparation import prepare
from manyhands.training.run import Options, Run

JOB = f"{__name__}:job"
TURN_S = 0.12
TURNS = 8
#: Of a turn's steps the first are not counted: caches hold the other's.
FIRST = 2


def job(member: Member, turns: int, tables: dict[str, Any]) -> dict[str, Any]:
    """What a worker does; the times of its real steps by turns, and what `Steps.told` tells of the mirrored ones."""
    task, plan = from_table(Task, tables["task"], "[task]"), from_table(Plan, tables["plan"], "[plan]")
    cluster, options = calibration.cached(), Options()
    real = prepare(member, task, plan, options)
    profiled, plain = _mirrored(member, task, plan, cluster)
    shares = real.sampler.batches(epochs=10**9, steps=None)
    _steps(real, shares, 5)
    profiled.take(TURN_S)
    count = max(3, int(TURN_S / max(_longest(member, _steps(real, shares, 5)), 1e-6)))
    profiled.begin()
    times = []
    for _ in range(turns):
        member.comm.barrier()
        times.append(_steps(real, shares, FIRST + min(count, 500))[FIRST:])
        member.comm.barrier()
        profiled.take(TURN_S, skipped=FIRST)
    real.worker.meet()
    return {"times": torch.tensor(times, dtype=torch.float64), "plain": plain, **profiled.told()}


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
