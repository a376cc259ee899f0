"""The training job that every worker runs: build, step, evaluate, checkpoint, and say what it cost.

Nothing in here knows a strategy, a transport or a cut; it knows `Worker.step` and `Worker.meet`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from manyhands.consistency.parameter_server.server import serving
from manyhands.contract import Batch, Strategy
from manyhands.errors import NonFiniteLoss
from manyhands.plan import Plan
from manyhands.task import Task, from_table
from manyhands.training.conclusion import conclude, record
from manyhands.training.cost import Cost
from manyhands.training.evaluation import to_device
from manyhands.training.keeping import keep_plan, newest, newest_finite, save
from manyhands.training.member import Member
from manyhands.training.metrics import MetricsLog
from manyhands.training.preparation import prepare, sampler_of, total_steps
from manyhands.training.progress import Progress
from manyhands.training.recorder import Recorder
from manyhands.training.run import Options, Run, device_of
from manyhands.training.sampler import Cursor, Share

#: Steps are logged at most this often; a run of 10,000 steps a second is not slowed by its own log.
METRICS_EVERY_S = 0.1
#: With a limit on the time, the workers ask each other so often, in steps, whether it is over.
ASK_EVERY = 16


def work(member: Member, options: dict[str, Any], tables: dict[str, Any] | None) -> dict[str, Any]:
    """The job. ``member.live`` holds (task, plan); under mpiexec they come as tables of text instead."""
    task, plan = (
        member.live
        if tables is None
        else (from_table(Task, tables["task"], "[task]"), from_table(Plan, tables["plan"], "[plan]"))
    )
    assert plan.workers is not None
    with serving(member.comm, member.comm.size - plan.workers) as comm:
        if comm is None:  # a server: it has done what it was here for
            return {}
        member = dataclasses.replace(member, comm=comm)
        run = prepare(member, task, plan, Options(**options))
        if not (run.options.resume and run.finished):
            keep_plan(run)
        with logged(run) as metrics:
            return train(run, metrics, member)


class logged:
    """The run's log on rank 0, closed at the end, with the failure as an event if there is one."""

    def __init__(self, run: Run) -> None:
        folder = run.options.out
        rank = run.comm.rank if folder is not None else 1
        resumed = run.cursor.step if run.options.resume else None
        self.metrics = MetricsLog(Path(folder or "."), rank=rank, resumed_step=resumed)
        self._run = run

    def __enter__(self) -> MetricsLog:
        if self._run.resumed is not None:
            self.metrics.event("resumed", **self._run.resumed)
        return self.metrics

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            self.metrics.event("failed", step=self._run.comm.step, error=type(error).__name__, message=str(error))
        self.metrics.close()


def train(run: Run, metrics: MetricsLog, member: Member) -> dict[str, Any]:
    """Steps until the task's length is reached; returns what the launcher makes a `Result` of."""
    task, comm, worker, replica, since = run.task, run.comm, run.worker, run.replica, run.since
    device = device_of(run.plan, comm)
    clock = time.perf_counter
    good = [buffer.clone() for buffer in replica.buffers]  # as they were before the step under way
    recorder = None if run.options.trace is None else Recorder.of(run)
    cost, counters = Cost.begun(run), comm.counters
    next_log = cost.began
    logged_seen, logged_s = 0, run.trained_s
    saved_step = cost.first_step if run.options.resume else -1
    recorded_step = cost.first_step
    with Progress(
        total_steps(task, run.sampler),
        epochs=task.length["epochs"],
        first_step=cost.first_step,
        rank=comm.rank if run.options.progress else 1,
    ) as progress:
        for share in shares(run):
            comm.step = share.before.step
            t0 = clock()
            inputs, target = run.splits.train.rows(share.indices)
            count = len(share.indices)
            if device != "cpu":
                inputs, target = to_device(inputs, device), to_device(target, device)
            if good and not worker.stands_still:
                torch._foreach_copy_(good, replica.buffers[: len(good)])  # a forward may have made more since
            moved_before = counters.moved_B
            at_end = share.after.epoch != share.before.epoch
            record_due = _record_is_due(run.options.evaluate, share.after, at_end=at_end)
            checkpoint_due = _checkpoint_is_due(run.options.checkpoint, share.after, at_end=at_end)
            try:
                loss = worker.step(Batch(inputs, target, count, share.global_count))
                if record_due or checkpoint_due or _time_is_asked(run, share.after):
                    meet(run, metrics)
            except NonFiniteLoss as e:
                raise stopped(run, e, share.before, good, metrics, saved_step=saved_step) from None
            if run.schedule is not None:
                advance(run.schedule)
            cost.moved_B += counters.moved_B - moved_before
            t1 = clock()
            run.trained_s += t1 - t0
            cost.took(run, t1 - t0)
            cursor = run.cursor = share.after
            cost.seen += share.global_count
            since.add(float(loss), count if since.sums else replica.count)
            progress.update(cursor.step, share.before.epoch, cost.seen, loss)
            if t1 >= next_log:
                next_log = t1 + METRICS_EVERY_S
                metrics.metrics(
                    cursor.step,
                    {
                        "epoch": share.before.epoch,
                        "loss": float(loss),
                        "lr": replica.optimizer.param_groups[0].get("lr"),
                        "step_s": t1 - t0,
                        "samples_per_s": (cost.seen - logged_seen) / (run.trained_s - logged_s),
                        **cost.compressing(run),
                    },
                )
                logged_seen, logged_s = cost.seen, run.trained_s
            reached = False
            if record_due:
                with cost.aside(run), _as("evaluate", recorder):
                    record(run, share.before.epoch, metrics)
                recorded_step = cursor.step
                reached = run.reached_target
            if checkpoint_due:
                with cost.aside(run), _as("checkpoint", recorder):
                    if run.at_full_length and recorded_step != cursor.step:  # the last checkpoint has the last record
                        record(run, cursor.epoch, metrics, cut_short=True)
                        recorded_step = cursor.step
                    save(run, cursor, metrics)
                saved_step = cursor.step
            if reached or _out_of_time(run):
                metrics.event("ended_early", step=cursor.step, why="target_accuracy" if reached else "seconds")
                break
    measured = cost.measured(run, clock() - cost.began)
    if run.cursor.step not in (recorded_step, cost.first_step):
        try:
            meet(run, metrics)
        except NonFiniteLoss as e:
            raise stopped(run, e, run.cursor, good, metrics, saved_step=saved_step) from None
    if recorded_step != run.cursor.step:  # a run that ends within an epoch, or between two evaluations
        with _as("evaluate", recorder):
            record(run, run.cursor.epoch, metrics, cut_short=True)
    if saved_step != run.cursor.step:
        with _as("checkpoint", recorder):
            save(run, run.cursor, metrics)
    untraced = "" if recorder is None else recorder.write(run, Path(run.options.trace or ""))
    outcome = conclude(run, measured, metrics, member)
    return outcome and outcome | {"untraced": untraced}


def _as(kind: str, recorder: Recorder | None) -> AbstractContextManager[None]:
    return contextlib.nullcontext() if recorder is None else recorder.during(kind)


def shares(run: Run) -> Iterator[Share]:
    """This worker's part of every batch to come; divided anew where the workers become fewer."""
    while not run.finished:
        sampler = run.sampler
        for share in sampler.batches(run.cursor, **run.task.length):
            yield share
            if run.sampler is not sampler:
                break
        else:
            return


def meet(run: Run, metrics: MetricsLog) -> None:
    """All workers come together; raises `NonFiniteLoss` as `Worker.meet` does."""
    run.worker.meet()
    follow(run, metrics)


def follow(run: Run, metrics: MetricsLog) -> None:
    """If the workers have become fewer where they met, so has the run: from the next step on they divide the whole
    batch. What a lost worker has seen since the meeting before is lost with it.
    """
    if run.met is run.worker.comm:
        return
    before, run.ranks, run.met, run.comm = run.ranks, run.worker.ranks, run.worker.comm, run.worker.comm
    strategy = run.plan.strategy
    assert isinstance(strategy, Strategy)
    run.replica.regroup(run.comm)
    run.sampler = sampler_of(run.task, run.splits, strategy, run.comm)
    lost = [rank for rank in before if rank not in run.ranks]
    metrics.event("workers_lost", step=run.comm.step, ranks=lost, left=run.ranks)


def stopped(
    run: Run, e: NonFiniteLoss, before: Cursor, good: list[torch.Tensor], metrics: MetricsLog, *, saved_step: int
) -> NonFiniteLoss:
    """Keep the last good state, and say what happened. Collective; ``good``: the buffers as they were then."""
    follow(run, metrics)  # the worker itself may have called the meeting
    for buffer, then in zip(run.replica.buffers, good, strict=False):
        buffer.copy_(then)  # the forward pass has put the bad batch into running statistics
    spoilt = _spoilt(run)
    if not spoilt and saved_step != before.step:
        save(run, before, metrics)  # ends with a barrier, so the newest is the same for every rank
    kept = newest_finite(run) if spoilt else newest(run)
    assert isinstance(run.plan.strategy, Strategy)
    steadier = run.plan.strategy.steadier
    step = before.step if e.rank is None else e.step
    return NonFiniteLoss(step, kept or "", what=e.what, spoilt=spoilt, rank=e.rank, steadier=steadier)


def advance(schedule: Any) -> None:
    """The learning rate's next step."""
    # torch warns when a schedule moves before optimizer.step(); the update was done on slices, by clones of it.
    schedule.optimizer._opt_called = True
    schedule.step()


def _record_is_due(evaluate: str | int, cursor: Cursor, *, at_end: bool) -> bool:
    return at_end if isinstance(evaluate, str) else cursor.step % evaluate == 0


def _checkpoint_is_due(when: str | int, cursor: Cursor, *, at_end: bool) -> bool:
    """Before the end of the run, where there always is one."""
    return at_end and when == "epoch" if isinstance(when, str) else cursor.step % when == 0


def _time_is_asked(run: Run, cursor: Cursor) -> bool:
    return run.task.seconds is not None and cursor.step % ASK_EVERY == 0


def _out_of_time(run: Run) -> bool:
    """Whether rank 0's clock says so; asked now and then, so that all end at the same step."""
    if not _time_is_asked(run, run.cursor):
        return False
    assert run.task.seconds is not None
    over = torch.tensor([float(run.trained_s >= run.task.seconds)])
    with run.comm.counting("control"):
        run.comm.broadcast(over).wait()
    return bool(over.item())


def _spoilt(run: Run) -> bool:
    """Whether some worker's consensus has become NaN or infinite. Collective."""
    bad = torch.tensor([float(not all(bool(p.isfinite().all()) for p in run.worker.consensus()))])
    with run.comm.counting("consensus"):
        run.comm.all_reduce(bad).wait()
    return bool(bad.item())
