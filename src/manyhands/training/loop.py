"""The training job that every worker runs: build, step, evaluate, checkpoint, and say what it cost.

Nothing in here knows a strategy, a transport or a cut; it knows `Worker.step`.
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import platform
import resource
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from manyhands import data as data_sets
from manyhands import models
from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import Mesh
from manyhands.consistency import buffers as buffer_policy
from manyhands.contract import Batch, Measurement, Spread, StepParts, Strategy, Worker
from manyhands.data import Splits
from manyhands.errors import BadInput, NonFiniteLoss
from manyhands.models import losses, optimizers, schedules
from manyhands.partition.data import DataReplica
from manyhands.plan import Plan
from manyhands.task import Task, described, from_table
from manyhands.training import checkpoint, state
from manyhands.training.evaluation import evaluate, to_device
from manyhands.training.member import Member
from manyhands.training.metrics import MetricsLog, write_summary
from manyhands.training.model_difference import check_same_model
from manyhands.training.progress import Progress
from manyhands.training.sampler import START, Cursor, Sampler, steps_per_epoch, worker_seed

log = logging.getLogger(__name__)

#: Steps are logged at most this often; a run of 10,000 steps a second is not slowed by its own log.
METRICS_EVERY_S = 0.1
#: Of a long run every step time is kept up to this many, which is plenty for a median.
STEP_TIMES = 200_000
#: With a limit on the time, the workers ask each other so often, in steps, whether it is over.
ASK_EVERY = 16
#: Steps before times count: allocators, caches and the kernel's page tables settle.
WARM_UP = 5

_BUILDING = threading.Lock()  # workers that are threads share torch's global generator


@dataclass(frozen=True)
class Options:
    """How a run is watched and kept; plain values that travel to workers."""

    out: str | None = None
    resume: bool = False
    data_dir: str | None = None
    evaluate: str | int = "epoch"  # epoch | end | never | every so many steps
    checkpoint_steps: int | None = None  # None: at every epoch's end
    keep: int = 3
    progress: bool = True


@dataclass
class Run:
    """One rank's run under way."""

    task: Task
    plan: Plan
    options: Options
    comm: Communicator
    splits: Splits
    model: torch.nn.Module
    loss: Any
    replica: DataReplica
    worker: Worker
    schedule: Any
    sampler: Sampler
    cursor: Cursor = START
    history: list[dict[str, Any]] = field(default_factory=list)


def work(member: Member, options: dict[str, Any], tables: dict[str, Any] | None) -> dict[str, Any]:
    """The job. ``member.live`` holds (task, plan); under mpiexec they come as tables of text instead."""
    task, plan = (
        member.live
        if tables is None
        else (from_table(Task, tables["task"], "[task]"), from_table(Plan, tables["plan"], "[plan]"))
    )
    run = prepare(member, task, plan, Options(**options))
    with logged(run) as metrics:
        return train(run, metrics, member)


def prepare(member: Member, task: Task, plan: Plan, options: Options) -> Run:
    """Data, model, optimizer, replica and worker; then, if asked, everything as the newest checkpoint has it."""
    comm = member.comm
    comm.mesh = plan.mesh if isinstance(plan.mesh, Mesh) else Mesh(data=comm.size)
    strategy = plan.strategy
    assert isinstance(strategy, Strategy)
    splits = data_sets.load(task.data, folder=Path(options.data_dir) if options.data_dir else None)
    model = build_model(task, splits, comm, alike=strategy.whole_batch)
    model.to(device_of(plan, comm))
    loss = losses.build(task.loss)
    optimizer = optimizers.build(task.optimizer, model.parameters())
    sampler = Sampler(
        len(splits.train),
        batch_size=task.batch_size,
        workers=1 if strategy.whole_batch else comm.size,
        rank=0 if strategy.whole_batch else comm.rank,
        seed=task.seed,
    )
    schedule = schedules.build(task.schedule, optimizer, steps=total_steps(task, sampler))
    replica = DataReplica(
        model,
        optimizer,
        loss,
        comm,
        common=strategy.parameters == "common",
        micro_batches=plan.micro_batches,
        clip=task.clip,
        precision=plan.precision,
        shares=sampler.workers,
    )
    with comm.counting("control"):
        worker = strategy.start(replica, comm)
    run = Run(task, plan, options, comm, splits, model, loss, replica, worker, schedule, sampler)
    if options.resume:
        resume(run)
    return run


def build_model(task: Task, splits: Splits, comm: Communicator, *, alike: bool = False) -> torch.nn.Module:
    """The model, from the task's seed; rank 0 goes on drawing where a single process would, others elsewhere.

    ``alike``: all go on as rank 0 does, because they compute on the same samples.
    """
    with _BUILDING:
        torch.manual_seed(task.seed)
        model = models.build(task.model, inputs=splits.inputs, classes=splits.classes)
        if comm.transport == "threads" and isinstance(task.model, torch.nn.Module) and comm.rank > 0:
            model = copy.deepcopy(model)
        if comm.rank > 0 and comm.transport != "threads" and not alike:
            torch.manual_seed(worker_seed(task.seed, comm.rank, 0))
    if not any(p.requires_grad for p in model.parameters()):
        raise BadInput(f"model {described(task.model)} has no trainable parameters; there is nothing to learn.")
    return model.train()


def device_of(plan: Plan, comm: Communicator) -> str:
    """This rank's device; ranks beyond the GPUs share them in turn."""
    return f"cuda:{comm.rank % torch.cuda.device_count()}" if plan.device == "cuda" else "cpu"


def total_steps(task: Task, sampler: Sampler) -> int:
    """How many steps the whole run has."""
    length = task.length
    if length["steps"] is not None:
        return length["steps"]
    return (length["epochs"] or 1) * steps_per_epoch(sampler.n, sampler.batch_size)


# -- checkpoints -----------------------------------------------------------------------------------------------------


def resume(run: Run) -> None:
    """Take up the newest good checkpoint of the run's folder. Collective; every rank reads it."""
    assert run.options.out is not None
    found = checkpoint.load_newest(Path(run.options.out) / "checkpoints")
    own = run.model.state_dict()
    check_same_model(own, found.model, source=found.path)
    if run.comm.rank == 0 or not any(run.comm.is_common(p.flat) for p in run.replica.pieces):
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(found.model[name])
    run.comm.barrier()
    for buffer, name in zip(run.replica.buffers, (n for n, _ in run.model.named_buffers()), strict=True):
        if name in found.model:
            buffer.copy_(found.model[name])
    assert isinstance(run.plan.strategy, Strategy)
    run.cursor = state.restore(found.state, run.worker, run.plan.strategy, run.comm, run.schedule)
    run.history = list(found.state["history"])
    run.comm.barrier()


def save(run: Run, cursor: Cursor, metrics: MetricsLog) -> str | None:
    """Write a checkpoint of the consensus; collective, rank 0 writes. Returns its folder, None if it could not be."""
    if run.options.out is None:
        return None
    strategy = run.plan.strategy
    assert isinstance(strategy, Strategy)
    parameters = run.worker.consensus()
    agreed = buffer_policy.agree(run.replica.buffers, run.comm, run.plan.buffers)  # type: ignore[arg-type]
    whole = state.collect(run.worker, strategy, run.comm, cursor, run.schedule, run.history)
    if whole is None:
        run.comm.barrier()
        return None
    with run.replica.using(parameters, agreed) as model:
        values = {k: v.detach().cpu() for k, v in model.state_dict().items()}
        try:
            path = checkpoint.save(
                Path(run.options.out) / "checkpoints", cursor.step, model=values, state=whole, keep=run.options.keep
            )
        except checkpoint.CheckpointNotWritten as e:
            log.warning("%s", e)
            metrics.event("checkpoint_not_written", step=cursor.step, reason=str(e))
            run.comm.barrier()
            return None
    metrics.event("checkpoint", step=cursor.step, path=str(path))
    run.comm.barrier()
    return str(path)


# -- the loop --------------------------------------------------------------------------------------------------------


class logged:
    """The run's log on rank 0, closed at the end, with the failure as an event if there is one."""

    def __init__(self, run: Run) -> None:
        folder = run.options.out
        rank = run.comm.rank if folder is not None else 1
        resumed = run.cursor.step if run.options.resume else None
        self.metrics = MetricsLog(Path(folder or "."), rank=rank, resumed_step=resumed)
        self._comm = run.comm

    def __enter__(self) -> MetricsLog:
        return self.metrics

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            self.metrics.event("failed", step=self._comm.step, error=type(error).__name__, message=str(error))
        self.metrics.close()


def train(run: Run, metrics: MetricsLog, member: Member) -> dict[str, Any]:
    """Steps until the task's length is reached; returns what the launcher makes a `Result` of."""
    task, comm, worker, replica = run.task, run.comm, run.worker, run.replica
    device = device_of(run.plan, comm)
    clock = time.perf_counter
    began = next_log = clock()
    times: list[float] = []
    seen = 0
    since = Since(sums=losses.reduction(run.loss) == "sum")
    trained_s = float(run.history[-1]["train_s"]) if run.history else 0.0
    good = [buffer.clone() for buffer in replica.buffers]  # as they were before the step under way
    first_step = run.cursor.step
    parts_before = _spent(run)
    counters, moved_B = comm.counters, 0
    sent_before = counters.sent_B("step")
    cursor = run.cursor
    saved_step = first_step if run.options.resume else -1
    recorded_step = first_step
    with Progress(
        total_steps(task, run.sampler),
        epochs=task.length["epochs"],
        first_step=first_step,
        rank=comm.rank if run.options.progress else 1,
    ) as progress:
        for share in run.sampler.batches(run.cursor, **task.length):
            comm.step = share.before.step
            t0 = clock()
            inputs, target = run.splits.train.rows(share.indices)
            count = len(share.indices)
            if device != "cpu":
                inputs, target = to_device(inputs, device), to_device(target, device)
            if good:
                torch._foreach_copy_(good, replica.buffers)
            moved_before = counters.moved_B
            try:
                loss = worker.step(Batch(inputs, target, count))
            except NonFiniteLoss:
                for buffer, before in zip(replica.buffers, good, strict=True):
                    buffer.copy_(before)  # the forward pass has put the bad batch into running statistics
                if saved_step != share.before.step:
                    save(run, share.before, metrics)  # ends with a barrier, so the newest is the same for every rank
                raise NonFiniteLoss(share.before.step, _newest(run) or "") from None
            if run.schedule is not None:
                _advance(run.schedule)
            moved_B += counters.moved_B - moved_before
            t1 = clock()
            trained_s += t1 - t0
            if len(times) < STEP_TIMES:
                times.append(t1 - t0)
            cursor = share.after
            seen += share.global_count
            since.add(float(loss), count)
            progress.update(cursor.step, share.before.epoch, seen, loss)
            if t1 >= next_log:
                next_log = t1 + METRICS_EVERY_S
                metrics.metrics(
                    cursor.step,
                    {
                        "epoch": share.before.epoch,
                        "loss": float(loss),
                        "lr": replica.optimizer.param_groups[0].get("lr"),
                        "step_s": t1 - t0,
                        "samples_per_s": seen / (t1 - began),
                    },
                )
            at_end = cursor.epoch != share.before.epoch
            reached = False
            if _record_is_due(run.options.evaluate, cursor, at_end=at_end):
                record(run, cursor, share.before.epoch, since, trained_s, metrics)
                recorded_step = cursor.step
                reached = _reached_target(run)
            every = run.options.checkpoint_steps
            if (at_end and every is None) or (every is not None and cursor.step % every == 0):
                save(run, cursor, metrics)
                saved_step = cursor.step
            if reached or _out_of_time(run, cursor, trained_s):
                metrics.event("ended_early", step=cursor.step, why="target_accuracy" if reached else "seconds")
                break
    wall_s = clock() - began
    sent_B = counters.sent_B("step") - sent_before
    parts = _parts(run, parts_before, max(cursor.step - first_step, 1))
    if recorded_step != cursor.step:  # a run that ends within an epoch, or between two evaluations
        record(run, cursor, cursor.epoch, since, trained_s, metrics)
    if saved_step != cursor.step:
        run.cursor = cursor
        save(run, cursor, metrics)
    worker.finish()
    agreed = buffer_policy.agree(replica.buffers, comm, run.plan.buffers)  # type: ignore[arg-type]
    if run.plan.buffers != "local":
        for mine, value in zip(replica.buffers, agreed, strict=True):
            mine.copy_(value)
    accuracy = run.history[-1]["test_accuracy"] if run.history else None
    if run.options.evaluate == "end" and run.splits.test is not None:
        accuracy, _ = evaluate(run.model, run.loss, run.splits.test, comm, device=device)
    memory_B = _peak_memory(comm)
    if comm.rank != 0:
        return {}
    steps = cursor.step - first_step
    summary = Measurement(
        strategy=str(run.plan.strategy),
        model=described(task.model),
        data=run.splits.name,
        workers=comm.size,
        transport=comm.transport,
        device=run.plan.device,
        parameters=sum(p.numel() for p in run.model.parameters()),
        global_batch=task.batch_size,
        steps=cursor.step,
        epochs=cursor.epoch + cursor.position / run.sampler.n,
        seed=task.seed,
        train_loss=run.history[-1]["train_loss"] if run.history else None,
        test_accuracy=accuracy,
        samples_per_s=seen / wall_s if steps else 0.0,
        step_s=Spread.of(times[WARM_UP:] or times),
        step_parts_s=parts,
        sent_B_per_step=sent_B / steps if steps else 0.0,
        moved_B_per_step=moved_B / steps if steps and comm.counts_moved else None,
        peak_memory_B=memory_B,
        wall_s=wall_s,
        versions=versions(),
    ).as_dict()
    metrics.summary(summary)
    if run.options.out is not None:
        write_summary(Path(run.options.out), summary)
    values = {k: v.detach().cpu() for k, v in run.model.state_dict().items()}
    return {
        "summary": summary,
        "history": run.history,
        "model": values,
        "allocator": member.allocator,
        "source": run.splits.source,
    }


def _advance(schedule: Any) -> None:
    # torch warns when a schedule moves before optimizer.step(); the update was done on slices, by clones of it.
    schedule.optimizer._opt_called = True
    schedule.step()


@dataclass
class Since:
    """This worker's training loss since the last record."""

    sums: bool  # the loss is a sum over samples; it is reported per sample, as in evaluation
    total: float = 0.0
    samples: int = 0

    def add(self, loss: float, count: int) -> None:
        """One more step."""
        self.total += loss if self.sums else loss * count
        self.samples += count

    def take(self) -> tuple[float, float]:
        """``(total, samples)``; counting begins anew."""
        taken = self.total, float(self.samples)
        self.total, self.samples = 0.0, 0
        return taken


def _record_is_due(evaluate: str | int, cursor: Cursor, *, at_end: bool) -> bool:
    return at_end if isinstance(evaluate, str) else cursor.step % evaluate == 0


def record(run: Run, cursor: Cursor, epoch: int, since: Since, trained_s: float, metrics: MetricsLog) -> None:
    """Where training stands: the mean training loss since the last record and, if asked for, the test set. Collective.

    The clock of ``train_s`` is rank 0's and stands still in evaluations and checkpoints.
    """
    total = torch.tensor(since.take(), dtype=torch.float64)
    comm = run.comm
    with comm.counting("consensus"):
        comm.all_reduce(total).wait()
    accuracy = test_loss = None
    if run.splits.test is not None and run.options.evaluate not in ("end", "never"):
        parameters = run.worker.consensus()
        agreed = buffer_policy.agree(run.replica.buffers, comm, run.plan.buffers)  # type: ignore[arg-type]
        with run.replica.using(parameters, agreed) as model:
            accuracy, test_loss = evaluate(model, run.loss, run.splits.test, comm, device=device_of(run.plan, comm))
    found = {
        "epoch": epoch,
        "step": cursor.step,
        "samples": cursor.epoch * run.sampler.n + cursor.position,
        "train_s": trained_s,
        "train_loss": float(total[0] / total[1]) if total[1] else None,
        "test_accuracy": accuracy,
        "test_loss": test_loss,
    }
    run.history.append(found)
    metrics.event("record" if cursor.position else "epoch", **found)
    comm.barrier()


def _reached_target(run: Run) -> bool:
    """The same on every rank: the accuracy is everybody's."""
    target, found = run.task.target_accuracy, run.history[-1]["test_accuracy"]
    return target is not None and found is not None and found >= target


def _out_of_time(run: Run, cursor: Cursor, trained_s: float) -> bool:
    """Whether rank 0's clock says so; asked now and then, so that all end at the same step."""
    if run.task.seconds is None or cursor.step % ASK_EVERY:
        return False
    over = torch.tensor([float(trained_s >= run.task.seconds)])
    with run.comm.counting("control"):
        run.comm.broadcast(over).wait()
    return bool(over.item())


def _newest(run: Run) -> str | None:
    if run.options.out is None:
        return None
    folders = sorted((Path(run.options.out) / "checkpoints").glob("step-*"))
    return str(folders[-1]) if folders else None


def _spent(run: Run) -> tuple[float, float, float, float]:
    counters, replica = run.comm.counters, run.replica
    return replica.compute_s, counters.communicate_s, counters.wait_s, replica.update_s


def _parts(run: Run, before: tuple[float, ...], steps: int) -> StepParts:
    return StepParts(*((now - then) / steps for now, then in zip(_spent(run), before, strict=True)))


def _peak_memory(comm: Communicator) -> int:
    """The largest resident set of any worker, in bytes."""
    peak = torch.tensor([float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)], dtype=torch.float64)
    every = torch.zeros(comm.size, dtype=torch.float64)
    every[comm.rank] = peak[0]
    with comm.counting("consensus"):
        comm.all_reduce(every).wait()
    return int(every.max())


def versions() -> dict[str, str]:
    """What the figures of a run depend on."""
    return {
        "manyhands": importlib.metadata.version("manyhands"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "free_threaded": str(not getattr(sys, "_is_gil_enabled", lambda: True)()),
    }
