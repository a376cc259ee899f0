"""The four verbs. Each decides every ``auto``, checks the plan against task and machine, and calls down.

`train` is here; `simulate`, `predict` and `search` follow the same form: they take the same task and plan.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from manyhands.checks import is_whole
from manyhands.communication import futex
from manyhands.communication.communicator import Communicator
from manyhands.contract import Measurement, Spread, StepParts
from manyhands.errors import BadInput
from manyhands.models import losses, optimizers, schedules
from manyhands.plan import Facts, Plan, Resolved, resolve
from manyhands.task import Task
from manyhands.training import environment
from manyhands.training.interruption import terminating
from manyhands.training.loop import Options, work
from manyhands.training.member import Member
from manyhands.training.team import team

log = logging.getLogger(__name__)

JOB = "manyhands.training.loop:work"


@dataclass(frozen=True)
class Result:
    """What `train` gives back. On ranks other than 0 of a launched run ``model`` is that rank's own."""

    model: torch.nn.Module | None
    plan: Plan
    summary: Measurement | None
    history: list[dict[str, Any]]
    out: Path | None
    notes: tuple[str, ...] = ()
    state: Mapping[str, Any] = field(default_factory=dict, repr=False)  # the final state_dict


def resolved(task: Task, plan: Plan) -> Resolved:
    """The plan with every ``auto`` decided for this machine; raises `InvalidPlan` with all problems of both."""
    task.check()
    started = environment.launched()
    losses.build(task.loss)
    trial = optimizers.trial(task.optimizer)
    schedules.build(task.schedule, trial, steps=task.steps or 100)
    facts = Facts(
        cores=futex.cores(),
        gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        shared_memory=environment.shared_memory_works(),
        launched=started.size if started else None,
        launcher=started.launcher if started else None,
        elementwise=optimizers.is_elementwise(trial),
        stateless=optimizers.is_stateless(trial),
        optimizer_problem=optimizers.gradients_problem(trial),
        clip=task.clip is not None,
        batch_size=task.batch_size,
    )
    return resolve(plan, facts)


def train(
    task: Task,
    plan: Plan | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
    evaluate: str | int = "epoch",
    checkpoint_steps: int | None = None,
    keep: int = 3,
    progress: bool = True,
) -> Result:
    """Train ``task`` by ``plan`` on real workers.

        result = mh.train(mh.Task(model="cnn", data="mnist", epochs=1), mh.Plan(workers=2), out="runs/first")
        result.summary.test_accuracy

    ``out`` keeps plan, metrics, summary and checkpoints in a folder; with ``resume`` the newest good checkpoint there
    is taken up exactly, in the middle of an epoch too, and also on another number of workers. A live model that was
    passed in holds the final parameters afterwards. ``evaluate``: at every ``epoch``, at the ``end``, ``never``, or a
    number of steps. Under torchrun, mpirun or srun this joins the ranks they started.

    Raises `BadInput` (nothing was started), `WorkerFailed` with the worker's own traceback, or `NonFiniteLoss`.
    """
    _check_evaluation(evaluate, task)
    if resume and out is None:
        raise BadInput("resume without out: say which run's folder to take up, e.g. out='runs/first' (--out).")
    if checkpoint_steps is not None and checkpoint_steps < 1:
        raise BadInput(f"checkpoint_steps={checkpoint_steps}: it is a whole number of steps from 1.")
    if keep < 1:
        raise BadInput(f"keep={keep}: how many checkpoints to keep is a whole number from 1.")
    decided = resolved(task, plan or Plan())
    places = None if data_dir is None else Path(data_dir)
    model = _built(task, places)
    folder = None if out is None else _folder(Path(out), task, decided.plan, resume)
    options = dataclasses.asdict(
        Options(
            out=None if folder is None else str(folder),
            resume=resume,
            data_dir=None if places is None else str(places),
            evaluate=evaluate,
            checkpoint_steps=checkpoint_steps,
            keep=keep,
            progress=progress,
        )
    )
    for note in decided.notes:
        log.warning("%s", note)
    started = environment.launched()
    if started is not None and started.size > 1:
        outcome = _joined(task, decided.plan, options)
    else:
        outcome = _launched_here(task, decided.plan, options)
    return _result(decided, folder, model, outcome)


def _check_evaluation(evaluate: str | int, task: Task) -> None:
    if evaluate not in ("epoch", "end", "never") and not is_whole(evaluate, 1):
        raise BadInput(f"evaluate={evaluate!r}: it is epoch, end, never, or a whole number of steps from 1.")
    if task.target_accuracy is not None and evaluate in ("end", "never"):
        raise BadInput(
            f"target_accuracy={task.target_accuracy} with evaluate={evaluate}: a run ends at its target only if it is "
            "evaluated on the way. Say evaluate='epoch', or every how many steps, e.g. evaluate=100."
        )


def _built(task: Task, data_dir: Path | None) -> torch.nn.Module:
    """The model, here: bad data or a bad factory is found before anything is written or started. It will hold the
    result; torch's generator stays where it was.
    """
    from manyhands import data, models

    generator = torch.get_rng_state()
    try:
        splits = data.load(task.data, folder=data_dir)
        return models.build(task.model, inputs=splits.inputs, classes=splits.classes)
    finally:
        torch.set_rng_state(generator)


def _folder(out: Path, task: Task, plan: Plan, resume: bool) -> Path:
    import tomli_w

    held = sorted(out.glob("checkpoints/step-*")) if out.is_dir() else []
    if held and not resume and not environment.launched():
        raise BadInput(
            f"{out} holds a run already ({held[-1].name}). Go on with it by resume=True (--resume), or choose another "
            "folder with out= (--out)."
        )
    started = environment.launched()
    if started is None or started.rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            table = {"task": task.as_table(), "plan": plan.as_table(), "machine": machine()}
            (out / "plan.toml").write_text(tomli_w.dumps(table))
        except OSError as e:
            raise BadInput(
                f"{out} cannot be written ({e.strerror or e}). Choose another folder with out= (--out)."
            ) from e
    return out


def machine() -> dict[str, Any]:
    """``[machine]`` of a run: where it ran."""
    import platform

    return {
        "cores": futex.cores(),
        "processor": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _launched_here(task: Task, plan: Plan, options: dict[str, Any]) -> dict[str, Any]:
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
            plan.workers,
            threads=plan.threads,
            timeout_s=plan.timeout_s,
            allocator=plan.allocator,  # type: ignore[arg-type]
            live=None if tables else (task, plan),
        ) as crew,
    ):
        outcome: dict[str, Any] = crew.run(JOB, options, tables)[0]
        return outcome


def _joined(task: Task, plan: Plan, options: dict[str, Any]) -> dict[str, Any]:
    from manyhands.training.allocator import tune

    torch.set_num_threads(plan.threads)
    allocator = "tuned" if plan.allocator == "tuned" and tune() else "plain"
    comm = join_launcher(plan)
    try:
        return work(Member(comm, (task, plan), allocator=allocator), options, None)
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


def _result(decided: Resolved, folder: Path | None, model: torch.nn.Module, outcome: dict[str, Any]) -> Result:
    if not outcome:
        return Result(None, decided.plan, None, [], folder, decided.notes)
    summary = dict(outcome["summary"])
    summary["step_s"], summary["step_parts_s"] = Spread(**summary["step_s"]), StepParts(**summary["step_parts_s"])
    values = outcome["model"]
    model.load_state_dict(values)
    return Result(model, decided.plan, Measurement(**summary), outcome["history"], folder, decided.notes, values)
