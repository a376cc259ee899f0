"""Train: real workers, started here or joined under a launcher, and what comes back."""

from __future__ import annotations

import dataclasses
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
from manyhands.plan import Plan, Resolved
from manyhands.plan.compressing import AUTO
from manyhands.task import Task
from manyhands.training import environment
from manyhands.training.checkpoint import CheckpointNotWritten
from manyhands.training.preparation import signature
from manyhands.training.rehearsal import rehearsed
from manyhands.training.run import Options
from manyhands.verbs.building import built
from manyhands.verbs.deciding import log, resolved, with_compressor
from manyhands.verbs.launching import joined, launched_here, take_places


@dataclass(frozen=True)
class Result:
    """What `train` gives back. Beside rank 0, the ranks of a launched run have ``plan``, ``out`` and ``notes`` only."""

    model: torch.nn.Module | None
    plan: Plan
    summary: Measurement | None
    history: list[dict[str, Any]]
    out: Path | None
    notes: tuple[str, ...] = ()
    state: Mapping[str, Any] = field(default_factory=dict, repr=False)  # the final state_dict


class LastCheckpointNotWritten(CheckpointNotWritten):
    """Training is done, but its last checkpoint could not be written: the folder does not hold what was learned.

    Raised at the very end, because whoever gave ``out`` counts on finding the model there, and an exit status of 0
    would tell a job scheduler so. Nothing is lost to a script: ``result`` is what `train` would have returned, with
    model and history; ``summary.json`` has been written if there was room for it.
    """

    def __init__(self, reason: str, result: Result) -> None:
        self.result = result
        said = result.summary
        assert said is not None
        found = [f"{said.steps} steps"]
        if said.train_loss is not None:
            found.append(f"training loss {said.train_loss:.4g}")
        if said.test_accuracy is not None:
            found.append(f"test accuracy {said.test_accuracy:.2%}")
        super().__init__(
            f"Training is done ({', '.join(found)}), but {result.out} does not hold what was learned. {reason} "
            "In Python the result is this error's .result; from the command line, --resume does the steps since the "
            "last checkpoint again."
        )


def train(
    task: Task,
    plan: Plan | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
    evaluate: str | int = "epoch",
    checkpoint: str | int = "epoch",
    keep: int = 3,
    progress: bool = True,
    trace: str | os.PathLike[str] | None = None,
) -> Result:
    """Train ``task`` by ``plan`` on real workers.

        result = mh.train(mh.Task(model="cnn", data="mnist", epochs=1), mh.Plan(workers=2), out="runs/first")
        result.summary.test_accuracy

    ``out`` keeps plan, metrics, summary and checkpoints in a folder; with ``resume`` the newest good checkpoint there
    is taken up exactly, in the middle of an epoch too, and also on another number of workers. A live model that was
    passed in holds the final parameters afterwards. ``evaluate``: at every ``epoch``, at the ``end``, ``never``, or a
    number of steps; ``checkpoint``: likewise, and always at the end, of which the newest ``keep`` stay. ``trace``: a
    file that tells, for Perfetto, what each worker did when (`training.recorder`). Under torchrun, mpirun or srun this
    joins the ranks they started.

    Raises `BadInput` (the request cannot work: found before anything is started or, of a resume and of data that
    differs between workers, before the first step; no file is changed), `WorkerFailed` with the worker's own traceback
    (`FactoryFailed` with that of a factory), `NonFiniteLoss`, a `CommunicationError` such as `DeadlineExceeded`, or
    `LastCheckpointNotWritten`, which carries the result.
    """
    _check_evaluation(evaluate, task)
    if resume and out is None:
        raise BadInput("resume without out: say which run's folder to take up, e.g. out='runs/first' (--out).")
    if checkpoint not in ("epoch", "end") and not is_whole(checkpoint, 1):
        raise BadInput(f"checkpoint={checkpoint!r}: it is epoch, end, or a whole number of steps from 1.")
    if not is_whole(keep, 1):
        raise BadInput(f"keep={keep!r}: how many checkpoints to keep is a whole number from 1.")
    asked = plan or Plan()
    decided = resolved(task, asked)
    places = None if data_dir is None else Path(data_dir)
    model, splits = built(task, places)
    started = environment.launched()
    joins = started is not None and started.size > 1
    folder = None if out is None else Path(out)
    resumed = folder if resume else None
    if asked.compress == AUTO and not joins:
        decided = with_compressor(task, asked, decided, model, resumed=resumed)
    decided = rehearsed(decided, model, task, splits.train)
    if not joins:
        take_places(folder, resume, trace)
    watched: dict[str, Any] = {"evaluate": evaluate, "checkpoint": checkpoint, "keep": keep}
    options = dataclasses.asdict(
        Options(
            out=None if folder is None else str(folder),
            resume=resume,
            data_dir=None if places is None else str(places),
            **watched,
            progress=progress,
            described="" if folder is None else _plan_file(task, asked, decided.plan, watched),
            data=signature(splits),
            trace=None if trace is None else os.path.abspath(trace),
        )
    )
    for note in decided.notes:
        log.warning("%s", note)
    if not joins:
        return _result(decided, folder, model, launched_here(task, decided.plan, options))

    def settle(comm: Communicator) -> Plan:
        """What the launcher's ranks have to try together."""
        nonlocal decided
        if asked.compress == AUTO:
            decided = with_compressor(task, asked, decided, model, resumed=resumed, comm=comm)
            log.warning("%s", decided.notes[-1])
            decided = rehearsed(decided, model, task, splits.train)
            if folder is not None:
                options["described"] = _plan_file(task, asked, decided.plan, watched)
        return decided.plan

    outcome = joined(task, decided.plan, options, settle)
    return _result(decided, folder, model, outcome)


def _check_evaluation(evaluate: str | int, task: Task) -> None:
    if evaluate not in ("epoch", "end", "never") and not is_whole(evaluate, 1):
        raise BadInput(f"evaluate={evaluate!r}: it is epoch, end, never, or a whole number of steps from 1.")
    if task.target_accuracy is not None and evaluate in ("end", "never"):
        raise BadInput(
            f"target_accuracy={task.target_accuracy} with evaluate={evaluate}: a run ends at its target only if it is "
            "evaluated on the way. Say evaluate='epoch', or every how many steps, e.g. evaluate=100."
        )


def _plan_file(task: Task, asked: Plan, plan: Plan, watched: Mapping[str, Any]) -> str:
    """``plan.toml``: the plan as it was decided, and of ``asked`` what was said, by which a resume is bound."""
    import tomli_w

    unsaid = Plan().as_table()
    tables = {
        "task": task.as_table(),
        "plan": plan.as_table(),
        "asked": {k: v for k, v in asked.as_table().items() if v != unsaid.get(k)},
        "run": dict(watched),
        "machine": machine(),
    }
    return tomli_w.dumps(tables)


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


def _result(decided: Resolved, folder: Path | None, model: torch.nn.Module, outcome: dict[str, Any]) -> Result:
    if not outcome:
        return Result(None, decided.plan, None, [], folder, decided.notes)
    summary = dict(outcome["summary"])
    summary["step_s"], summary["step_parts_s"] = Spread(**summary["step_s"]), StepParts(**summary["step_parts_s"])
    values = outcome["model"]
    model.load_state_dict(values)
    result = Result(model, decided.plan, Measurement(**summary), outcome["history"], folder, decided.notes, values)
    if outcome["found_finished"]:
        log.warning(
            "the run in %s was at its end (step %d): nothing was left to do. More epochs= (--epochs) or steps= "
            "(--steps) would take it further",
            folder,
            summary["steps"],
        )
    if outcome["untraced"]:
        log.warning("the run has no trace: %s", outcome["untraced"])
    if outcome["unsaved"]:
        raise LastCheckpointNotWritten(outcome["unsaved"], result)
    return result
