"""A run on disk: its plan, its checkpoints, and how it is taken up from them."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch

from manyhands.consistency import buffers as buffer_policy
from manyhands.contract import Strategy
from manyhands.errors import BadInput, DamagedFile
from manyhands.training import checkpoint, state
from manyhands.training.gather import first_decides
from manyhands.training.metrics import MetricsLog
from manyhands.training.model_difference import check_same_model
from manyhands.training.origin import check_same_run, origin
from manyhands.training.run import Run, device_of, replicas
from manyhands.training.sampler import Cursor
from manyhands.training.whole_file import replacing
from manyhands.training.whole_model import part, together

log = logging.getLogger(__name__)


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
    own, blocks = run.model.state_dict(), run.replica.blocks
    check_same_model(run.whole, found.model, source=found.path)
    saved = found.state
    cursor = Cursor(*saved["cursor"])
    check_same_run(saved["origin"], _origin(run), cursor, source=found.path)
    # One copy that serves several workers needs one to write it; of a cut model all do, and write the same.
    if comm.rank == 0 or blocks or not any(comm.is_common(p.flat) for p in run.replica.pieces):
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(part(found.model[key], key, blocks))
    for path, module in run.model.named_modules():
        extra = found.model.get(f"{path}._extra_state".removeprefix("."))
        if extra is not None:  # `state_dict` gives a copy of it
            module.set_extra_state(extra)
    comm.barrier()
    for buffer, key in zip(run.replica.buffers, (n for n, _ in run.model.named_buffers()), strict=True):
        if key in found.model:
            buffer.copy_(part(found.model[key], key, blocks))
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


def save(run: Run, cursor: Cursor, metrics: MetricsLog) -> str | None:
    """Write a checkpoint of the consensus; collective, rank 0 writes. Returns its folder, None if it could not be."""
    if run.options.out is None:
        return None
    strategy = run.plan.strategy
    assert isinstance(strategy, Strategy)
    parameters = run.worker.consensus()
    agreed = buffer_policy.agree(run.replica.buffers, replicas(run.comm), run.plan.buffers)  # type: ignore[arg-type]
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
    with run.replica.using(parameters, agreed) as model:
        values = together(model.state_dict(), run.replica.blocks, run.whole, run.comm)
        if whole is None or values is None:
            run.comm.barrier()
            return None
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


def _origin(run: Run) -> dict[str, Any]:
    return origin(run.task, run.replica.optimizer, run.schedule, n=run.sampler.n, data=run.splits.name)


def newest(run: Run) -> str | None:
    """The newest checkpoint's folder."""
    if run.options.out is None:
        return None
    folders = sorted((Path(run.options.out) / "checkpoints").glob("step-*"))
    return str(folders[-1]) if folders else None


def newest_finite(run: Run) -> str | None:
    """The newest whole checkpoint whose parameters are all finite."""
    if run.options.out is None:
        return None
    for folder in sorted((Path(run.options.out) / "checkpoints").glob("step-*"), reverse=True):
        with contextlib.suppress(DamagedFile):
            if all(bool(v.isfinite().all()) for v in checkpoint.load(folder).model.values()):
                return str(folder)
    return None
