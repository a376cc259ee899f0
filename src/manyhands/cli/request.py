"""From what was said, on the command line and in a file, to a task and a plan.

A file is TOML with the tables ``[task]`` and ``[plan]``, such as the ``plan.toml`` in a run's folder: its ``[run]``
holds how the run was evaluated and kept, its ``[machine]`` tells where that was and is passed over. The command line
goes before it. ``--resume`` takes the folder's own ``plan.toml`` unless another file is named.

A run's ``[plan]`` is complete: what was decided stands beside what somebody wanted. Its ``[asked]`` has the latter
alone, and by that a resume is bound; but workers and cut stay as they were, unless other workers are asked for now.
"""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.errors import BadInput, UnknownName
from manyhands.task import Task, from_table
from manyhands.training import environment

if TYPE_CHECKING:
    from manyhands.plan import Plan

#: How a run is watched and kept.
RUN = ("evaluate", "checkpoint", "keep")
#: Of a run's plan: what a launcher, and another number of workers or mesh, decides anew.
LAUNCHERS = ("workers", "mesh", "transport", "threads")
#: How a model was cut on the mesh of then.
CUTS = ("tensor", "pipeline", "recompute")
#: What is said here puts aside what a file said of the same thing: the length of a run, and the number of workers.
OUSTS = (("steps", "epochs"), ("epochs", "steps"), ("workers", "mesh"))


def requested(said: argparse.Namespace) -> tuple[Task, Plan, dict[str, Any]]:
    """The `Task`, the `Plan`, and what the file says of ``[run]``; what nobody said is their default."""
    from manyhands import verbs
    from manyhands.models import optimizers
    from manyhands.plan import Plan

    given = vars(said)
    file, task, plan, run = _base(given)
    for table, kind in ((task, Task), (plan, Plan)):
        table |= {f.name: given[f.name] for f in dataclasses.fields(kind) if f.name in given}
    for told, other in OUSTS:
        if told in given and other not in given:
            task.pop(other, None)
            plan.pop(other, None)
    if given.get("lr") is not None:
        task["optimizer"] = optimizers.with_lr(task.get("optimizer", Task().optimizer), given["lr"])
    made, split = from_table(Task, task, f"[task] of {file}"), from_table(Plan, plan, f"[plan] of {file}")
    each = given.get("batch_per_worker")
    if each is not None:
        if each < 1:
            raise BadInput(f"--batch-per-worker {each}: it is a whole number from 1, e.g. --batch-per-worker 50.")
        # What is simulated need not fit this machine.
        workers = split.workers if said.command == "simulate" else verbs.resolved(made, split).plan.workers
        if workers is None or workers < 1:
            raise BadInput(
                "--batch-per-worker without --workers: say how many workers are simulated, e.g. --workers 64."
            )
        made = dataclasses.replace(made, batch_size=each * workers)
    return made, split, run


def _base(given: dict[str, Any]) -> tuple[Path, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The file, if there is one, and its tables."""
    file: Path | None = given.get("config")
    own = given["out"] / "plan.toml" if given.get("resume") and "out" in given else None
    if file is None and own is not None and own.is_file():
        task, plan, asked, run = _read(own)
        other = any(given.get(name, plan.get(name)) != plan.get(name) for name in ("workers", "mesh"))
        placed = {key: plan[key] for key in (*LAUNCHERS, *CUTS) if key in plan}
        asked = {key: value for key, value in asked.items() if key not in (*LAUNCHERS, *CUTS)}
        return own, task, asked if other or environment.launched() is not None else asked | placed, run
    if file is None:
        return Path("the command line"), {}, {}, {}
    task, plan, _, run = _read(file)
    return file, task, plan, run


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """``[task]``, ``[plan]``, ``[asked]`` and ``[run]`` of a TOML file; other tables are refused.

    Of a plan that was not decided by a run all is asked.
    """
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"--config {file} cannot be read: {getattr(e, 'strerror', None) or e}.") from None
    except tomllib.TOMLDecodeError as e:
        raise BadInput(f"{file} is not TOML: {e}.") from None
    for name, table in tables.items():
        if name not in ("task", "plan", "asked", "run", "machine"):
            raise UnknownName(f"table in {file}", name, ("task", "plan", "run"))
        if not isinstance(table, dict):
            raise BadInput(f"{file}: {name} is a table of options, [{name}], not {table!r}.")
    run = tables.get("run", {})
    for key in run:
        if key not in RUN:
            raise UnknownName(f"key in [run] of {file}", key, RUN)
    plan = tables.get("plan", {})
    return tables.get("task", {}), plan, tables.get("asked", plan), run
