"""Run a study: every cell once, then every cell again, until each has its repeats.

Repeats take turns because a host is noisy: what disturbs it for a minute then disturbs one repeat of every cell rather
than every repeat of one, and ratios within a round hardly change. A cell that cannot work is a row with the reason, and
so is one that fails; neither stops the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console

from manyhands import verbs
from manyhands.errors import BadInput, WorkerFailed
from manyhands.plan import Plan
from manyhands.studies.circumstances import Started
from manyhands.studies.grid import Cell, Study, find
from manyhands.studies.progress import StudyProgress
from manyhands.studies.reporting import StudyResult, command, made_of, write_page
from manyhands.studies.rows import Row, Rows
from manyhands.studies.summary import called
from manyhands.task import Task
from manyhands.training import environment

log = logging.getLogger(__name__)

#: Where a study goes when nobody says where: a folder of this name, and in it one for each start.
FOLDER = "studies-out"
#: Of a run only the last checkpoint is kept; those between cost time and answer no question of a study.
LAST_ONLY = 10**12


def run(
    name_or_file: str | os.PathLike[str] | Study | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    repeats: int | None = None,
    console: Console | None = None,
) -> StudyResult:
    """Measure every plan of a study, and keep rows, report and runs in a folder.

        result = manyhands.studies.run("default", out="studies-out/first")
        result.table, result.findings, result.report

    Without a name, the small default study of this machine. ``workers``: at most so many. With an ``out`` that holds
    rows already what is done is not done again, so that a study which was ended goes on where it was. ``console`` gets
    a progress bar, or a line for each run where it is no terminal. Ctrl-C passes through, after a report of what there
    is has been written.

    Raises `BadInput` when the study cannot be read or its folder not be written.
    """
    study = find(name_or_file, workers=workers)
    if repeats is not None:
        study = dataclasses.replace(study, repeats=repeats)
    started = environment.launched()
    if started is not None and started.size > 1:
        raise BadInput(
            f"a study under {started.launcher}: it starts the workers of each plan itself. Run it without a launcher; "
            "`manyhands train` joins one."
        )
    folder = _folder(study, out)
    with Rows(folder, study) as rows:
        try:
            _measure(rows, study, data_dir=data_dir, console=console)
        except KeyboardInterrupt:
            write_page(made_of(study, folder, rows.all()))
            log.warning("the rows so far are kept in %s; to go on: %s", folder, command(folder))
            raise
        result = made_of(study, folder, rows.all())
        write_page(result)
    return result


class Rounds:
    """Whether there is time for another round: the first always, a later one if it would end before the limit.

    A round is expected to take as long as the longest so far. Whole rounds only, so that all cells are measured
    equally often.
    """

    def __init__(self, limit_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._clock = limit_s, clock
        self._began = self._round_began = clock()
        self._repeat: int | None = None
        self._longest_s = 0.0

    def may_run(self, repeat: int) -> bool:
        """Asked before each run."""
        if repeat == self._repeat:
            return True
        now = self._clock()
        if self._repeat is not None:
            self._longest_s = max(self._longest_s, now - self._round_began)
            if self._limit_s is not None and now - self._began + self._longest_s > self._limit_s:
                return False
        self._repeat, self._round_began = repeat, now
        return True


def order(cells: Sequence[Cell]) -> Iterator[tuple[int, Cell]]:
    """(repeat, cell): all cells once, then all again that are to be measured again."""
    most = max((cell.repeats for cell in cells), default=0)
    return ((repeat, cell) for repeat in range(1, most + 1) for cell in cells if repeat <= cell.repeats)


def _measure(rows: Rows, study: Study, *, data_dir: str | os.PathLike[str] | None, console: Console | None) -> None:
    """Check every cell, then run what can work and has no finished row."""
    able: dict[str, tuple[Task, Plan]] = {}
    cells = study.cells()
    with _each_note_once():
        for cell in cells:
            started = Started.now(study.name, cell, 1)
            try:
                task, plan = cell.make()
                able[cell.id] = task, verbs.resolved(task, plan).plan
            except BadInput as e:
                rows.add(started.row("refused", reason=str(e)))
        done = rows.done()
        runs = order([cell for cell in cells if cell.id in able])
        left = [(repeat, cell) for repeat, cell in runs if (cell.id, repeat) not in done]
        rounds = Rounds(study.limit_s)
        with StudyProgress(len(left), console) as progress:
            for repeat, cell in left:
                if not rounds.may_run(repeat):
                    log.warning(
                        "repeat %d would end after the study's limit of %g s and is left out; to measure it, too: %s",
                        repeat,
                        study.limit_s,
                        command(rows.folder),
                    )
                    break
                task, plan = able[cell.id]
                what = f"{called(cell, plan.workers, plan.threads, plan.transport)}, repeat {repeat}"
                progress.starts(what)
                row = _run(
                    rows, Started.now(study.name, cell, repeat), task, plan, evaluate=study.evaluate, data_dir=data_dir
                )
                rows.add(row)
                progress.ends(what, row)


def _run(
    rows: Rows,
    started: Started,
    task: Task,
    plan: Plan,
    *,
    evaluate: str | int,
    data_dir: str | os.PathLike[str] | None,
) -> Row:
    out = rows.run_folder(started.cell, started.repeat)
    try:
        result = verbs.train(
            task, plan, out=out, data_dir=data_dir, evaluate=evaluate, checkpoint_steps=LAST_ONLY, progress=False
        )
    except BadInput as e:
        return started.row("refused", plan=plan, reason=str(e))
    except Exception as e:
        own = e.traceback if isinstance(e, WorkerFailed) else ""
        return started.row(
            "failed", plan=plan, reason=str(e) or type(e).__name__, traceback=own or traceback.format_exc()
        )
    return started.row("done", plan=plan, measurement=result.summary, history=result.history)


def _folder(study: Study, out: str | os.PathLike[str] | None) -> Path:
    """A new one at each start unless ``out`` is given: old rows are not taken for an answer about today's program."""
    if out is not None:
        return Path(out)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", study.name).strip("-.") or "study"
    return Path(FOLDER) / f"{name}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"


@contextlib.contextmanager
def _each_note_once() -> Iterator[None]:
    """What `verbs.train` notes about a plan is said once for a study, and not at each of its runs."""
    said: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        known = message in said
        said.add(message)
        return not known

    logger = logging.getLogger(verbs.__name__)
    logger.addFilter(new)
    try:
        yield
    finally:
        logger.removeFilter(new)
