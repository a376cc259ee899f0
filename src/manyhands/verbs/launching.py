"""The workers of a run: started here, or the ranks of a launcher that this process is one of; and where it writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import Mesh
from manyhands.contract import Strategy
from manyhands.errors import BadInput, WorkerFailed
from manyhands.plan import Plan, server_ranks
from manyhands.task import Task
from manyhands.training.gather import first_decides
from manyhands.training.interruption import terminating
from manyhands.training.loop import work
from manyhands.training.member import Member
from manyhands.training.team import team
from manyhands.training.trace import check_writable

JOB = "manyhands.training.loop:work"


def launched_here(task: Task, plan: Plan, options: dict[str, Any]) -> dict[str, Any]:
    """What worker 0 reports of a run whose workers are started here, and stopped."""
    assert plan.workers is not None
    tables = None
    if plan.transport == "mpi":
        tables = {"task": task.as_table(), "plan": plan.as_table()}
        live = [
            k
            for k in ("model", "data", "optimizer", "loss", "schedule")
            if str(tables["task"].get(k, "")).startswith("<")
        ]
        if live:
            raise BadInput(
                f"transport mpi with a live {' and '.join(live)}: mpiexec starts processes that know only text. Name "
                "them as my_pkg.module:factory, or use transport=shared or gloo."
            )
    with (
        terminating(),
        team(
            plan.transport,
            plan.workers + server_ranks(plan),
            threads=plan.threads,
            timeout_s=plan.timeout_s,
            allocator=plan.allocator,  # type: ignore[arg-type]
            live=None if tables else (task, plan),
        ) as crew,
    ):
        # Worker 0 keeps the folder. Where the model is cut, a worker may be the only one that holds its pieces.
        whole = isinstance(plan.mesh, Mesh) and plan.mesh["data"] == plan.workers
        survives = isinstance(plan.strategy, Strategy) and plan.strategy.survives and whole
        may_lose = range(1, plan.workers) if survives else ()
        try:
            outcome: dict[str, Any] = crew.run(JOB, options, tables, may_lose=may_lose)[0]
        except WorkerFailed as e:
            if e.rank >= plan.workers:
                e.args = (f"server {e.rank - plan.workers} (rank {e.rank}) failed: {e.reason}",)
            raise
        return outcome


def joined(task: Task, plan: Plan, options: dict[str, Any], settle: Callable[[Communicator], Plan]) -> dict[str, Any]:
    """This rank's part of a launched run, by the plan that ``settle`` decides with the others."""
    from manyhands.training.allocator import tune

    torch.set_num_threads(plan.threads)
    allocator = "tuned" if plan.allocator == "tuned" and tune() else "plain"
    comm = join_launcher(plan)
    try:
        if options["out"] is not None or options["trace"] is not None:
            # The folder of all is looked at by one, so that all take one verdict.
            folder = None if options["out"] is None else Path(options["out"])
            first_decides(comm, lambda: take_places(folder, options["resume"], options["trace"]))
        return work(Member(comm, (task, settle(comm)), allocator=allocator), options, None)
    except BaseException:
        comm.fail()
        raise
    finally:
        comm.close()


def join_launcher(plan: Plan) -> Communicator:
    """This rank's communicator in the group that a launcher started."""
    if plan.transport == "mpi":
        from manyhands.communication.transports.mpi import MpiCommunicator

        return MpiCommunicator.join(timeout_s=plan.timeout_s)
    from manyhands.communication.transports import torch_distributed

    kind = torch_distributed.NcclCommunicator if plan.transport == "nccl" else torch_distributed.GlooCommunicator
    return kind.join_launcher(timeout_s=plan.timeout_s)


def take_places(out: Path | None, resume: bool, trace: str | os.PathLike[str] | None) -> None:
    """Refuse what a run cannot be written to."""
    if out is not None:
        _take_folder(out, resume)
    if trace is not None:
        check_writable(Path(trace))


def _take_folder(out: Path, resume: bool) -> None:
    """Refuse a folder that holds a run, unless it is to go on, or that cannot be written."""
    held = sorted(out.glob("checkpoints/step-*")) if out.is_dir() else []
    if held and not resume:
        raise BadInput(
            f"{out} holds a run already ({held[-1].name}). Go on with it by resume=True (--resume), or choose another "
            "folder with out= (--out)."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"{out} cannot be written ({e.strerror or e}). Choose another folder with out= (--out).") from e
