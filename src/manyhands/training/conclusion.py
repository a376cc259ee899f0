"""Where a run stands, on its way and at its end: records, and the summary."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from manyhands.communication.communicator import Communicator
from manyhands.consistency import buffers as buffer_policy
from manyhands.contract import Measurement
from manyhands.data import Dataset
from manyhands.partition.data import DataReplica
from manyhands.partition.pipeline import gpipe, schedule
from manyhands.partition.pipeline.replica import PipelineReplica
from manyhands.task import described
from manyhands.training import memory
from manyhands.training.evaluation import chunk_of, evaluate
from manyhands.training.member import Member
from manyhands.training.metrics import MetricsLog, read_summary
from manyhands.training.run import Run, device_of, replicas
from manyhands.training.whole_model import together


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
        group = replicas(comm)
        agreed = buffer_policy.agree(run.replica.buffers, group, run.plan.buffers)  # type: ignore[arg-type]
        with run.replica.using(parameters, agreed):
            model = run.replica.answering
            accuracy, test_loss = _evaluated(run, model, run.splits.test, group)
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


def _evaluated(
    run: Run, model: torch.nn.Module, test: Dataset, group: Communicator
) -> tuple[float | None, float | None]:
    chunk = chunk_of(run.sampler.largest)
    return evaluate(model, run.loss, test, group, device=device_of(run.plan, run.comm), chunk=chunk)


def conclude(run: Run, measured: dict[str, Any], metrics: MetricsLog, member: Member) -> dict[str, Any]:
    """Adopt what the workers agree on, and say what came of the run: rank 0 returns it, the others nothing."""
    comm = run.comm
    run.worker.finish()
    agreed = buffer_policy.agree(run.replica.buffers, replicas(comm), run.plan.buffers)  # type: ignore[arg-type]
    if run.plan.buffers != "local":
        for mine, value in zip(run.replica.buffers, agreed, strict=True):
            mine.copy_(value)
    accuracy = run.history[-1]["test_accuracy"] if run.history else None
    if run.options.evaluate == "end" and run.splits.test is not None:
        model, test = run.replica.answering, run.splits.test
        accuracy, _ = _evaluated(run, model, test, replicas(comm))
    measured |= _of_all_workers(run, measured["step_parts_s"].wait, measured["bubble_by_worker"])
    values = together(run.model.state_dict(), run.replica.blocks, run.whole, comm)
    if comm.rank != 0:
        return {}
    summary = _kept_summary(run)
    if summary is None:
        summary = summarized(run, measured, accuracy)
        metrics.summary(summary)  # the folder's own, too
    return {
        "summary": summary,
        "history": run.history,
        "model": values,
        "allocator": member.allocator,
        "source": run.splits.source,
        "unsaved": run.unsaved,
        "found_finished": run.resumed is not None and run.cursor.step == run.resumed["step"],
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
        parameters=run.parameters,
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


def _of_all_workers(run: Run, wait_s: float, bubble: list[float]) -> dict[str, Any]:
    """What the summary says of all workers together. Collective.

    ``peak_memory_B`` is the largest resident set of any worker during the run; memory of a GPU is not in it.
    """
    comm, staleness = run.comm, run.worker.staleness
    updates, late = sum(staleness.values()), sum(by * times for by, times in staleness.items())
    mine = [float(memory.peak_B()), wait_s, float(updates), float(late), float(max(staleness, default=0)), *bubble]
    told = torch.tensor([mine] * comm.size, dtype=torch.float64)
    with comm.counting("consensus"):
        comm.all_gather(told, [(p * len(mine), (p + 1) * len(mine)) for p in range(comm.size)]).wait()
    memory_B, waits, all_updates, all_late, latest, *bubbles = told.T.tolist()
    return {
        "peak_memory_B": int(max(memory_B)),
        "wait_s_by_worker": waits,
        "staleness_mean": sum(all_late) / sum(all_updates) if sum(all_updates) else None,
        "staleness_max": int(max(latest)) if sum(all_updates) else None,
        "bubble_by_worker": bubbles[0] if bubbles else [],
        **_of_schedule(run.replica),
    }


def _of_schedule(replica: DataReplica) -> dict[str, Any]:
    """What the bubble would be if stages cost the same and nothing else cost anything."""
    if not isinstance(replica, PipelineReplica):
        return {}
    order = replica.pipeline.schedule
    return {
        "bubble_of_schedule": schedule.bubble(order),
        "bubble_of_flush": gpipe.bubble(order.ranks, order.micro_batches),
    }


@functools.cache
def _own_version() -> str:
    """Read once: it is some milliseconds of parsing, and predictions ask a thousand times."""
    return importlib.metadata.version("manyhands")


def versions() -> dict[str, str]:
    """What the figures of a run depend on."""
    return {
        "manyhands": _own_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "free_threaded": str(not getattr(sys, "_is_gil_enabled", lambda: True)()),
    }
