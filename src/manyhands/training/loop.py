"""The training job that every worker runs: build, step, evaluate, checkpoint, and say what it cost.

Nothing in here knows a strategy, a transport or a cut; it knows `Worker.step`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import logging
import platform
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from manyhands import data as data_sets
from manyhands import models
from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import Mesh
from manyhands.consistency import buffers as buffer_policy
from manyhands.consistency.server import serving
from manyhands.contract import Batch, Measurement, Spread, StepParts, Strategy, Worker
from manyhands.data import Splits
from manyhands.errors import BadInput, DamagedFile, NonFiniteLoss
from manyhands.models import losses, optimizers, schedules
from manyhands.models.factory import settle
from manyhands.partition.data import DataReplica
from manyhands.plan import Plan
from manyhands.task import Task, described, from_table
from manyhands.training import checkpoint, memory, state
from manyhands.training.evaluation import evaluate, to_device
from manyhands.training.gather import first_decides, from_first
from manyhands.training.member import Member
from manyhands.training.metrics import MetricsLog, read_summary
from manyhands.training.model_difference import check_same_model
from manyhands.training.origin import check_same_run, origin
from manyhands.training.progress import Progress
from manyhands.training.sampler import START, Cursor, Sampler, Share, steps_per_epoch, worker_seed
from manyhands.training.whole_file import replacing

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
    checkpoint: str | int = "epoch"  # epoch | end | every so many steps
    keep: int = 3
    progress: bool = True
    described: str = ""  # what plan.toml shall say
    data: list[Any] | None = None  # the launcher's `signature` of the data; None: rank 0's counts


@dataclass
class Since:
    """This worker's training loss since the last record."""

    sums: bool  # the loss is a sum over samples; it is reported per sample, as in evaluation
    total: float = 0.0
    samples: float = 0

    def add(self, loss: float, count: float) -> None:
        """One more step: its loss, and the samples of a sum or what else the loss is a mean over."""
        self.total += loss if self.sums else loss * count
        self.samples += count

    def so_far(self) -> tuple[float, float]:
        """``(total, samples)``."""
        return self.total, float(self.samples)

    def begin(self, total: float = 0.0, samples: float = 0.0) -> None:
        """Count anew, or go on from what was."""
        self.total, self.samples = total, samples


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
    since: Since
    ranks: list[int]  # of the workers that are left, as they were numbered at the start
    cursor: Cursor = START
    history: list[dict[str, Any]] = field(default_factory=list)
    trained_s: float = 0.0  # in steps, of the whole run; evaluations and checkpoints not counted
    cut_short: bool = False  # the newest record stands where the run ended, not where one was due
    resumed: dict[str, Any] | None = None  # which checkpoint was taken up, and which were not
    unsaved: str = ""  # why the newest checkpoint could not be written; on rank 0 only

    @property
    def at_full_length(self) -> bool:
        """Whether all epochs or steps are done."""
        epochs, steps = self.task.length["epochs"], self.task.length["steps"]
        return (epochs is not None and self.cursor.epoch >= epochs) or (steps is not None and self.cursor.step >= steps)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do. Between a resume and the first step the same on every rank."""
        seconds = self.task.seconds
        out_of_time = seconds is not None and self.trained_s >= seconds
        return self.at_full_length or out_of_time or _reached_target(self)


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


def prepare(member: Member, task: Task, plan: Plan, options: Options) -> Run:
    """Data, model, optimizer, replica and worker; then, if asked, everything as the newest checkpoint has it."""
    memory.forget_peak()
    comm = member.comm
    comm.mesh = plan.mesh if isinstance(plan.mesh, Mesh) else Mesh(data=comm.size)
    strategy = plan.strategy
    assert isinstance(strategy, Strategy)
    splits = data_sets.load(task.data, folder=Path(options.data_dir) if options.data_dir else None)
    check_same_data(splits, options.data, comm)
    model = build_model(task, splits, comm, alike=strategy.whole_batch)
    model.to(device_of(plan, comm))
    loss = losses.build(task.loss)
    optimizer = optimizers.build(task.optimizer, model.parameters())
    sampler = sampler_of(task, splits, strategy, comm)
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
        sparse=strategy.sparse,
    )
    with comm.counting("control"):
        worker = strategy.start(replica, comm)
    since = Since(sums=losses.reduction(loss) == "sum")
    ranks = list(range(comm.size))
    run = Run(task, plan, options, comm, splits, model, loss, replica, worker, schedule, sampler, since, ranks)
    if options.resume:
        resume(run)
    return run


def sampler_of(task: Task, splits: Splits, strategy: Strategy, comm: Communicator) -> Sampler:
    """What divides the batches among the workers of ``comm``."""
    whole = strategy.whole_batch
    return Sampler(
        len(splits.train),
        batch_size=task.batch_size,
        workers=1 if whole else comm.size,
        rank=0 if whole else comm.rank,
        seed=task.seed,
    )


def signature(splits: Splits) -> list[Any]:
    """By what two loads of one description are told apart: name, sizes, shape, classes."""
    tested = None if splits.test is None else len(splits.test)
    shape = None if splits.inputs is None else list(splits.inputs)
    return [splits.name, len(splits.train), tested, shape, splits.classes]


def check_same_data(splits: Splits, expected: list[Any] | None, comm: Communicator) -> None:
    """Refuse a worker that has found other data than the launcher or rank 0. Collective."""
    mine = signature(splits)
    first = from_first(comm, mine if expected is None else expected)
    if mine != first:
        raise BadInput(
            f"worker {comm.rank} sees other data ({_signed(mine)}, from {splits.source}) than the first that looked "
            f"({_signed(first)}). All have to see the same: name the folder with data_dir= (--data-dir), and let a "
            "factory of your own give the same samples at every call."
        )


def _signed(signature: list[Any]) -> str:
    name, train, test, shape, classes = signature
    return f"{name}: {train} + {test or 0} samples of shape {shape}, {classes} classes"


def keep_plan(run: Run) -> None:
    """``plan.toml``, on rank 0: once it is known that this run can be, so that a refused resume changes nothing."""
    if run.comm.rank != 0 or run.options.out is None or not run.options.described:
        return
    out = Path(run.options.out)
    try:
        with replacing(out / "plan.toml") as file:
            file.write(run.options.described)
    except OSError as e:
        raise BadInput(f"{out} cannot be written ({e.strerror or e}). Choose another folder with out= (--out).") from e


def build_model(task: Task, splits: Splits, comm: Communicator, *, alike: bool = False) -> torch.nn.Module:
    """The model, from the task's seed; rank 0 goes on drawing where a single process would, others elsewhere.

    ``alike``: all go on as rank 0 does, because they compute on the same samples.
    """
    with _BUILDING:
        torch.manual_seed(task.seed)
        model = models.build(task.model, inputs=splits.inputs, classes=splits.classes)
        settle(model, lambda: splits.train.rows(torch.tensor([0])), name=described(task.model))
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
    """Take up the newest good checkpoint of the run's folder, which rank 0 chooses. Collective; every rank reads it."""
    assert run.options.out is not None
    comm, folder = run.comm, Path(run.options.out) / "checkpoints"
    found: checkpoint.Checkpoint | None = None

    def choose() -> list[Any]:
        nonlocal found
        found = checkpoint.load_newest(folder)
        return [found.path.name, checkpoint.manifest_sum(found.path), [why for _, why in found.skipped]]

    name, manifest, skipped = first_decides(comm, choose)
    if found is None:
        found = checkpoint.load_same(folder / name, manifest)
    if "origin" not in found.state:
        raise BadInput(f"The checkpoint {found.path} was written by an older manyhands; this one cannot resume it.")
    own = run.model.state_dict()
    check_same_model(own, found.model, source=found.path)
    saved = found.state
    cursor = Cursor(*saved["cursor"])
    check_same_run(saved["origin"], _origin(run), cursor, source=found.path)
    if comm.rank == 0 or not any(comm.is_common(p.flat) for p in run.replica.pieces):
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(found.model[key])
    for path, module in run.model.named_modules():
        extra = found.model.get(f"{path}._extra_state".removeprefix("."))
        if extra is not None:  # `state_dict` gives a copy of it
            module.set_extra_state(extra)
    comm.barrier()
    for buffer, key in zip(run.replica.buffers, (n for n, _ in run.model.named_buffers()), strict=True):
        if key in found.model:
            buffer.copy_(found.model[key])
    run.worker.rebase()
    assert isinstance(run.plan.strategy, Strategy)
    since = state.restore(saved, run.worker, run.plan.strategy, comm, run.schedule, device=device_of(run.plan, comm))
    run.cursor, run.history, run.trained_s = cursor, list(saved["history"]), saved["trained_s"]
    run.cut_short = saved["cut_short"]
    if run.cut_short and not run.finished:
        run.history.pop()  # the epoch goes on, and so do its sums
        run.cut_short = False
    run.since.begin(*since)
    run.resumed = {"step": cursor.step, "path": str(found.path), "skipped": skipped}
    comm.barrier()


def _origin(run: Run) -> dict[str, Any]:
    return origin(run.task, run.replica.optimizer, run.schedule, n=run.sampler.n, data=run.splits.name)


def save(run: Run, cursor: Cursor, metrics: MetricsLog) -> str | None:
    """Write a checkpoint of the consensus; collective, rank 0 writes. Returns its folder, None if it could not be."""
    if run.options.out is None:
        return None
    strategy = run.plan.strategy
    assert isinstance(strategy, Strategy)
    parameters = run.worker.consensus()
    agreed = buffer_policy.agree(run.replica.buffers, run.comm, run.plan.buffers)  # type: ignore[arg-type]
    whole = state.collect(
        run.worker,
        strategy,
        run.comm,
        run.schedule,
        device=device_of(run.plan, run.comm),
        since=run.since.so_far(),
        shared={
            "origin": _origin(run),
            "cursor": list(cursor),
            "history": list(run.history),
            "trained_s": run.trained_s,
            "cut_short": run.cut_short,
        },
    )
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
            run.unsaved = str(e)
            log.warning("%s", e)
            metrics.event("checkpoint_not_written", step=cursor.step, reason=str(e))
            run.comm.barrier()
            return None
    run.unsaved = ""
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
        self._run = run

    def __enter__(self) -> MetricsLog:
        if self._run.resumed is not None:
            self.metrics.event("resumed", **self._run.resumed)
        return self.metrics

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            self.metrics.event("failed", step=self._run.comm.step, error=type(error).__name__, message=str(error))
        self.metrics.close()


@dataclass
class Cost:
    """What the steps of this process cost this rank; begun before the first of them, `measured` after the last."""

    first_step: int
    began: float
    trained_before_s: float
    sent_before_B: int
    parts_before: tuple[float, ...]
    parts_from: int = 0  # steps before the parts count
    times: list[float] = field(default_factory=list)
    seen: int = 0  # samples, of all ranks
    moved_B: int = 0

    @classmethod
    def begun(cls, run: Run) -> Cost:
        """Now."""
        sent_B = run.comm.counters.sent_B("step")
        return cls(run.cursor.step, time.perf_counter(), run.trained_s, sent_B, _spent(run))

    def took(self, run: Run, step_s: float) -> None:
        """One more step; parts count from the end of the warm-up, as times do."""
        if len(self.times) < STEP_TIMES:
            self.times.append(step_s)
            if len(self.times) == WARM_UP:
                self.parts_before, self.parts_from = _spent(run), WARM_UP

    @contextlib.contextmanager
    def aside(self, run: Run) -> Iterator[None]:
        """What is spent inside, in an evaluation or a checkpoint, is no part of a step."""
        before = _spent(run)
        yield
        spent = (now - then for now, then in zip(_spent(run), before, strict=True))
        self.parts_before = tuple(x + s for x, s in zip(self.parts_before, spent, strict=True))

    def measured(self, run: Run, wall_s: float) -> dict[str, Any]:
        """The figures of the summary that are about cost."""
        steps = run.cursor.step - self.first_step
        trained_s = run.trained_s - self.trained_before_s
        sent_B = run.comm.counters.sent_B("step") - self.sent_before_B
        return {
            "samples_per_s": self.seen / trained_s if steps else 0.0,
            "step_s": Spread.of(self.times[self.parts_from :] or self.times),
            "step_parts_s": _parts(run, self.parts_before, max(steps - self.parts_from, 1)),
            "sent_B_per_step": sent_B / steps if steps else 0.0,
            "moved_B_per_step": self.moved_B / steps if steps and run.comm.counts_moved else None,
            "wall_s": wall_s,
        }


def train(run: Run, metrics: MetricsLog, member: Member) -> dict[str, Any]:
    """Steps until the task's length is reached; returns what the launcher makes a `Result` of."""
    task, comm, worker, replica, since = run.task, run.comm, run.worker, run.replica, run.since
    device = device_of(run.plan, comm)
    clock = time.perf_counter
    good = [buffer.clone() for buffer in replica.buffers]  # as they were before the step under way
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
                _advance(run.schedule)
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
                    },
                )
                logged_seen, logged_s = cost.seen, run.trained_s
            reached = False
            if record_due:
                with cost.aside(run):
                    record(run, share.before.epoch, metrics)
                recorded_step = cursor.step
                reached = _reached_target(run)
            if checkpoint_due:
                with cost.aside(run):
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
        record(run, run.cursor.epoch, metrics, cut_short=True)
    if saved_step != run.cursor.step:
        save(run, run.cursor, metrics)
    return conclude(run, measured, metrics, member)


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
    """All workers come together, and here those that have been killed are left out, if the strategy bears that.

    Their samples since the last meeting are lost; from the next step on the others divide the whole batch. Raises
    `NonFiniteLoss` as `Worker.meet` does.
    """
    strategy = run.plan.strategy
    assert isinstance(strategy, Strategy)
    lost = run.comm.agree_on_lost() if strategy.survives else []
    if lost:
        names = [run.ranks[p] for p in lost]
        run.ranks = [rank for p, rank in enumerate(run.ranks) if p not in lost]
        run.comm = run.comm.without(lost)
        run.replica.regroup(run.comm)
        run.worker.regroup(run.comm)
        run.sampler = sampler_of(run.task, run.splits, strategy, run.comm)
        metrics.event("workers_lost", step=run.comm.step, ranks=names, left=run.ranks)
    run.worker.meet()


def stopped(
    run: Run, e: NonFiniteLoss, before: Cursor, good: list[torch.Tensor], metrics: MetricsLog, *, saved_step: int
) -> NonFiniteLoss:
    """Keep the last good state, and say what happened. Collective; ``good``: the buffers as they were then."""
    for buffer, then in zip(run.replica.buffers, good, strict=False):
        buffer.copy_(then)  # the forward pass has put the bad batch into running statistics
    spoilt = _spoilt(run)
    if not spoilt and saved_step != before.step:
        save(run, before, metrics)  # ends with a barrier, so the newest is the same for every rank
    kept = _newest_finite(run) if spoilt else _newest(run)
    assert isinstance(run.plan.strategy, Strategy)
    steadier = run.plan.strategy.steadier
    step = before.step if e.rank is None else e.step
    return NonFiniteLoss(step, kept or "", what=e.what, spoilt=spoilt, rank=e.rank, steadier=steadier)


def conclude(run: Run, measured: dict[str, Any], metrics: MetricsLog, member: Member) -> dict[str, Any]:
    """Adopt what the workers agree on, and say what came of the run: rank 0 returns it, the others nothing."""
    comm = run.comm
    run.worker.finish()
    agreed = buffer_policy.agree(run.replica.buffers, comm, run.plan.buffers)  # type: ignore[arg-type]
    if run.plan.buffers != "local":
        for mine, value in zip(run.replica.buffers, agreed, strict=True):
            mine.copy_(value)
    accuracy = run.history[-1]["test_accuracy"] if run.history else None
    if run.options.evaluate == "end" and run.splits.test is not None:
        accuracy, _ = evaluate(run.model, run.loss, run.splits.test, comm, device=device_of(run.plan, comm))
    measured |= _of_all_workers(run, measured["step_parts_s"].wait)
    if comm.rank != 0:
        return {}
    summary = _kept_summary(run)
    if summary is None:
        summary = summarized(run, measured, accuracy)
        metrics.summary(summary)  # the folder's own, too
    return {
        "summary": summary,
        "history": run.history,
        "model": {k: v.detach().cpu() for k, v in run.model.state_dict().items()},
        "allocator": member.allocator,
        "source": run.splits.source,
        "unsaved": run.unsaved,
    }


def summarized(run: Run, measured: dict[str, Any], accuracy: float | None) -> dict[str, Any]:
    """``summary.json``."""
    task, cursor = run.task, run.cursor
    return Measurement(
        strategy=str(run.plan.strategy),
        model=described(task.model),
        data=run.splits.name,
        workers=run.comm.size,
        transport=run.comm.transport,
        device=run.plan.device,
        parameters=sum(p.numel() for p in run.model.parameters()),
        global_batch=task.batch_size,
        steps=cursor.step,
        epochs=cursor.epoch + cursor.position / run.sampler.n,
        seed=task.seed,
        train_loss=run.history[-1]["train_loss"] if run.history else None,
        test_accuracy=accuracy,
        versions=versions(),
        **measured,
    ).as_dict()


def _kept_summary(run: Run) -> dict[str, Any] | None:
    """Of a finished run that was resumed: what it cost then; nothing has been measured since."""
    if run.resumed is None or run.options.out is None or run.cursor.step != run.resumed["step"]:
        return None
    kept = read_summary(Path(run.options.out))
    names = {f.name for f in dataclasses.fields(Measurement)}
    if kept is None or kept.get("steps") != run.cursor.step or not names <= kept.keys():
        return None
    return {name: kept[name] for name in names}


def _advance(schedule: Any) -> None:
    # torch warns when a schedule moves before optimizer.step(); the update was done on slices, by clones of it.
    schedule.optimizer._opt_called = True
    schedule.step()


def _record_is_due(evaluate: str | int, cursor: Cursor, *, at_end: bool) -> bool:
    return at_end if isinstance(evaluate, str) else cursor.step % evaluate == 0


def _checkpoint_is_due(when: str | int, cursor: Cursor, *, at_end: bool) -> bool:
    """Before the end of the run, where there always is one."""
    return at_end and when == "epoch" if isinstance(when, str) else cursor.step % when == 0


def record(run: Run, epoch: int, metrics: MetricsLog, *, cut_short: bool = False) -> None:
    """Where training stands: the mean training loss since the last record and, if asked for, the test set. Collective.

    The clock of ``train_s`` is rank 0's and stands still in evaluations and checkpoints. ``cut_short``: the run ends
    here, before a record was due; should it be resumed, the mean goes on over what it holds.
    """
    cursor, comm = run.cursor, run.comm
    total = torch.tensor(run.since.so_far(), dtype=torch.float64)
    with comm.counting("consensus"):
        comm.all_reduce(total).wait()
    run.cut_short = cut_short
    if not cut_short:
        run.since.begin()
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
        "train_s": run.trained_s,
        "train_loss": float(total[0] / total[1]) if total[1] else None,
        "test_accuracy": accuracy,
        "test_loss": test_loss,
    }
    run.history.append(found)
    metrics.event("record" if cursor.position else "epoch", **found)
    comm.barrier()


def _reached_target(run: Run) -> bool:
    """The same on every rank: the accuracy is everybody's."""
    target = run.task.target_accuracy
    found = run.history[-1]["test_accuracy"] if run.history else None
    return target is not None and found is not None and found >= target


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


def _newest(run: Run) -> str | None:
    if run.options.out is None:
        return None
    folders = sorted((Path(run.options.out) / "checkpoints").glob("step-*"))
    return str(folders[-1]) if folders else None


def _newest_finite(run: Run) -> str | None:
    """The newest whole checkpoint whose parameters are all finite."""
    if run.options.out is None:
        return None
    for folder in sorted((Path(run.options.out) / "checkpoints").glob("step-*"), reverse=True):
        with contextlib.suppress(DamagedFile):
            if all(bool(v.isfinite().all()) for v in checkpoint.load(folder).model.values()):
                return str(folder)
    return None


def _spoilt(run: Run) -> bool:
    """Whether some worker's consensus has become NaN or infinite. Collective."""
    bad = torch.tensor([float(not all(bool(p.isfinite().all()) for p in run.worker.consensus()))])
    with run.comm.counting("consensus"):
        run.comm.all_reduce(bad).wait()
    return bool(bad.item())


def _spent(run: Run) -> tuple[float, float, float, float]:
    counters, replica = run.comm.counters, run.replica
    return replica.compute_s, counters.communicate_s, counters.wait_s, replica.update_s


def _parts(run: Run, before: tuple[float, ...], steps: int) -> StepParts:
    return StepParts(*((now - then) / steps for now, then in zip(_spent(run), before, strict=True)))


def _of_all_workers(run: Run, wait_s: float) -> dict[str, Any]:
    """What the summary says of all workers together. Collective.

    ``peak_memory_B`` is the largest resident set of any worker during the run; memory of a GPU is not in it.
    """
    comm, staleness = run.comm, run.worker.staleness
    updates, late = sum(staleness.values()), sum(by * times for by, times in staleness.items())
    mine = [float(memory.peak_B()), wait_s, float(updates), float(late), float(max(staleness, default=0))]
    told = torch.tensor([mine] * comm.size, dtype=torch.float64)
    with comm.counting("consensus"):
        comm.all_gather(told, [(p * len(mine), (p + 1) * len(mine)) for p in range(comm.size)]).wait()
    memory_B, waits, all_updates, all_late, latest = told.T.tolist()
    return {
        "peak_memory_B": int(max(memory_B)),
        "wait_s_by_worker": waits,
        "staleness_mean": sum(all_late) / sum(all_updates) if sum(all_updates) else None,
        "staleness_max": int(max(latest)) if sum(all_updates) else None,
    }


def versions() -> dict[str, str]:
    """What the figures of a run depend on."""
    return {
        "manyhands": importlib.metadata.version("manyhands"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "free_threaded": str(not getattr(sys, "_is_gil_enabled", lambda: True)()),
    }
