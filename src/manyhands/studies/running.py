"""Run a study: every cell once, then every cell again, until each has its repeats.

Repeats take turns because a host is noisy: what disturbs it for a minute then disturbs one repeat of every cell rather
than every repeat of one, and ratios within a round hardly change. A cell that cannot work is a row with the reason, and
so is one that fails; neither stops the others. A run that the machine disturbed is repeated once, and marked when that
was no better (`manyhands.studies.calibration`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console

from manyhands import verbs
from manyhands.errors import BadInput
from manyhands.studies import gradient_noise, simulating
from manyhands.studies.calibration import BOUND, Calibration, watched_cores
from manyhands.studies.circumstances import Started, processor
from manyhands.studies.finding import find
from manyhands.studies.grid import Cell, Study, Value
from manyhands.studies.planned import Planned, names, planned
from manyhands.studies.predicting import Predicted, predict_all
from manyhands.studies.progress import StudyProgress
from manyhands.studies.reporting import StudyResult, command, made_of, write_page
from manyhands.studies.row import Row
from manyhands.studies.rows import Rows, finished
from manyhands.studies.run_folder import RunFolder
from manyhands.task import Task
from manyhands.training import environment

log = logging.getLogger(__name__)

#: Where a study goes when nobody says where: a folder of this name, and in it one for each start.
FOLDER = "studies-out"
#: In a run's folder: who did what when.
TRACE = "trace.json"


def run(
    name_or_file: str | os.PathLike[str] | Study | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    repeats: int | None = None,
    quick: bool = False,
    task: Mapping[str, Value] | None = None,
    again: bool = False,
    console: Console | None = None,
    predict: bool = True,
    simulate: str | None = None,
    cluster: str | os.PathLike[str] | None = None,
    trace: bool = False,
) -> StudyResult:
    """Measure every plan of a study, and keep rows and report in a folder.

        result = manyhands.studies.run("default", out="studies-out/first")
        result.table, result.findings, result.report

    Without a name, the small default study of this machine. ``workers``: at most so many; ``quick``: the short form of
    a built-in study; ``task``: in place of the study's own ``[task]``, key by key. With an ``out`` that holds rows
    already what is done is not done again, so that a study which was ended goes on where it was; ``again`` does it all
    anew, and each new row takes the place of the old one unless it failed. ``repeats``: in place of the study's own; a
    grid that says how often its plans are measured keeps that. ``console`` gets a progress bar, or a line for each run
    where it is no terminal.

    ``predict``: each plan's step is predicted before it is run (`predicting`). ``simulate``, e.g. ``"2..1024"``, lets
    the study go on with so many simulated workers on ``cluster`` (`simulating`). ``trace`` writes ``trace.json`` into
    each run's folder. Ctrl-C passes through, after a report of what there is has been written.

    Raises `BadInput` when the study cannot be read or its folder not be written.
    """
    study = asked(
        name_or_file, workers=workers, repeats=repeats, quick=quick, task=task, simulate=simulate, cluster=cluster
    )
    if trace and study.keep != "runs":
        raise BadInput(
            f'trace for study {study.name}: a trace lies in the folder of its run; keep = "{study.keep}" keeps none. '
            'Set keep = "runs" in [study], or trace one plan: manyhands train --trace FILE.json.'
        )
    started = environment.launched()
    if started is not None and started.size > 1:
        raise BadInput(
            f"a study under {started.launcher}: it starts the workers of each plan itself. Run it without a launcher; "
            "`manyhands train` joins one."
        )
    folder = _folder(study, out)
    with Rows(folder, study) as rows:
        try:
            _measure(rows, study, again=again, data_dir=data_dir, console=console, predicts=predict, trace=trace)
            for row in simulating.rows(study, rows.all(), data_dir=data_dir):
                rows.add(row)
        except KeyboardInterrupt:
            write_page(made_of(study, folder, rows.all()))
            log.warning("the rows so far are kept in %s; to go on: %s", folder, _to_go_on(folder, data_dir))
            raise
        result = made_of(study, folder, rows.all())
        write_page(result)
    return result


def asked(
    name_or_file: str | os.PathLike[str] | Study | None = None,
    *,
    workers: int | None = None,
    repeats: int | None = None,
    quick: bool = False,
    task: Mapping[str, Value] | None = None,
    simulate: str | None = None,
    cluster: str | os.PathLike[str] | None = None,
) -> Study:
    """The study that `run` with these arguments runs."""
    study = find(name_or_file, workers=workers, quick=quick, task=task)
    if simulate is not None:
        study = simulating.extended(study, simulate, "" if cluster is None else os.fspath(cluster))
    elif cluster is not None:
        raise BadInput(f"cluster={os.fspath(cluster)!r} without simulate: say how many workers, --simulate 2..1024.")
    return study if repeats is None else dataclasses.replace(study, repeats=repeats)


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


def _measure(
    rows: Rows,
    study: Study,
    *,
    again: bool,
    data_dir: str | os.PathLike[str] | None,
    console: Console | None,
    predicts: bool,
    trace: bool,
) -> None:
    """Check every cell, then predict and run what can work and has no finished row."""
    cells = [cell for cell in study.cells() if cell.measure != "simulate"]
    with _each_note_once():
        decided = [planned(cell) for cell in cells]
        for each in decided:
            if each.refused:
                rows.add(Started.now(study.name, each.cell, 1).row("refused", reason=each.refused))
        able = {each.cell.id: each for each in decided if not each.refused}
        called_so = names(decided)
        before = rows.all()
        measured = rows.done()
        done = set() if again else finished(before, cells)
        runs = order([cell for cell in cells if cell.id in able])
        left = [(repeat, able[cell.id]) for repeat, cell in runs if (cell.id, repeat) not in done]
        if not left:
            return
        asked = {each.cell.id: each for _, each in left if each.cell.measure == "train" and each.cell.timed}
        predicted = predict_all(asked.values(), [] if again else before, data_dir=data_dir) if predicts else {}
        data = _Data(rows.folder, [] if again else before, cells)
        quickest = f"calibration loop on {watched_cores()} cores of {processor()}, s"
        calibration = Calibration(quickest_s=rows.recall(quickest))
        rounds = Rounds(study.limit_s)
        with StudyProgress([each.cell.id for _, each in left], console) as progress:
            for repeat, each in left:
                if not rounds.may_run(repeat):
                    log.warning(
                        "repeat %d would end after the study's limit of %g s and is left out; to measure it, too: %s",
                        repeat,
                        study.limit_s,
                        _to_go_on(rows.folder, data_dir),
                    )
                    break
                what = f"{called_so[each.cell.id]}, repeat {repeat}"
                progress.starts(what)
                row = _watched(rows.folder, study, each, repeat, calibration, data_dir=data_dir, trace=trace)
                guess = predicted.get(row.cell, Predicted())
                row = dataclasses.replace(
                    row, predicted_step_s=guess.step_s, prediction_error=guess.error, unpredicted=guess.reason
                )
                data.check(row)
                rows.add(row)
                rows.remember(quickest, calibration.quickest_s)
                progress.ends(what, row)
                if row.status != "done" and (row.cell, row.repeat) in measured:
                    log.warning("%s %s, and its earlier measurement is kept: %s", what, row.status, row.reason)


class _Data:
    """Keeps rows apart that call by one name what was two data sets: ``auto`` is MNIST only where that is at hand."""

    def __init__(self, folder: Path, rows: Sequence[Row], cells: Sequence[Cell]) -> None:
        self._folder = folder
        own = {cell.id for cell in cells}
        self._found = {
            (str(row.task.get("data", Task().data)), row.measurement.data)
            for row in rows
            if row.measurement is not None and row.cell in own
        }

    def check(self, row: Row) -> None:
        """Raises `BadInput` before ``row`` would lie beside rows of other data."""
        if row.measurement is None:
            return
        said, now = str(row.task.get("data", Task().data)), row.measurement.data
        others = sorted(name for asked, name in self._found if asked == said and name != now)
        if others:
            raise BadInput(
                f"data={said} is {now} now, and rows in {self._folder} measured {' and '.join(others)}: they do not "
                f"compare. Say where {others[0]} lies (--data-dir), measure everything anew (--again), or choose "
                "another folder with out= (--out)."
            )


def _to_go_on(folder: Path, data_dir: str | os.PathLike[str] | None) -> str:
    """The command that goes on with the same data."""
    return command(folder) + ("" if data_dir is None else " " + shlex.join(["--data-dir", os.fspath(data_dir)]))


def _watched(
    folder: Path,
    study: Study,
    each: Planned,
    repeat: int,
    calibration: Calibration,
    *,
    data_dir: str | os.PathLike[str] | None,
    trace: bool = False,
) -> Row:
    """A run between two calibrations; once more if those were slow, and of two the one less disturbed.

    What depends on no time is not watched: the noise of an update, and runs whose times nobody reads.
    """
    started = functools.partial(Started.now, study.name, each.cell, repeat)
    if each.cell.measure == "noise":
        return _noise(started(), each, data_dir=data_dir)

    def once(out: Path | None) -> Row:
        calibration.begins()
        row = _trained(started(), each, out=out, data_dir=data_dir, trace=trace)
        return dataclasses.replace(row, disturbance=calibration.ends())

    kept = RunFolder(folder, f"{each.cell.id}-{repeat}") if study.keep == "runs" else None
    if not each.cell.timed:
        return _trained(started(), each, out=kept.begin() if kept else None, data_dir=data_dir, trace=trace)
    first = once(kept.begin() if kept else None)
    if first.status != "done" or _disturbance(first) <= BOUND:
        return first
    done = [row for row in (first, once(kept.again() if kept else None)) if row.status == "done"]
    better = min(done, key=_disturbance)
    if kept:
        kept.keep(first=better is first)
    return dataclasses.replace(better, attempts=2, noisy=_disturbance(better) > BOUND)


def _disturbance(row: Row) -> float:
    return row.disturbance or 0.0


def _trained(
    started: Started, each: Planned, *, out: Path | None, data_dir: str | os.PathLike[str] | None, trace: bool
) -> Row:
    """One training, whatever becomes of it."""
    assert each.task is not None
    try:
        try:
            result = verbs.train(
                each.task,
                each.plan,
                out=out,
                data_dir=data_dir,
                evaluate=each.cell.evaluate,
                checkpoint="end",
                keep=1,
                progress=False,
                trace=out / TRACE if trace and out is not None else None,
            )
        except verbs.LastCheckpointNotWritten as e:
            log.warning("%s", e)
            result = e.result
    except Exception as e:
        return started.not_done(e, plan=each.plan)
    return started.row("done", plan=each.plan, measurement=result.summary, history=result.history)


def _noise(started: Started, each: Planned, *, data_dir: str | os.PathLike[str] | None) -> Row:
    """One measurement of an update's noise, whatever becomes of it."""
    assert each.task is not None
    assert each.plan is not None
    try:
        noise = gradient_noise.measure(each.task, each.plan, data_dir=data_dir)
    except Exception as e:
        return started.not_done(e, plan=each.plan)
    return started.row("done", plan=each.plan, noise=noise.as_dict())


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
