"""The command line: one function a command, which asks the library and says what came of it.

Standard output carries the result and nothing else; progress, notes and errors go to standard error. With ``--json``
that holds for the workers and the user's own code, too: until the document is printed, their standard output *is*
standard error. Nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manyhands.cli import options
from manyhands.errors import BadInput, FactoryFailed, InvalidPlan, ManyhandsError, UnknownName, WorkerFailed
from manyhands.training.interruption import terminating


@dataclass(frozen=True)
class Answer:
    """What a command says: to a program, to a person, and to the shell. No document: nothing is said."""

    document: Mapping[str, Any] | None
    lines: Callable[[], Sequence[str]] = tuple
    status: int = 0


def train(said: argparse.Namespace) -> Answer:
    """One plan on real processes."""
    from manyhands import verbs
    from manyhands.cli import summary
    from manyhands.cli.request import requested

    task, plan, run = requested(said)
    run |= _given(said, "out", "resume", "data_dir", "evaluate", "checkpoint", "keep", "trace")
    status = 0
    try:
        result = verbs.train(task, plan, progress="no_progress" not in said, **run)
    except verbs.LastCheckpointNotWritten as e:
        _complain(e)
        result, status = e.result, e.exit_code
    if result.summary is None:  # a rank beside rank 0, under a launcher
        return Answer(None, status=status)
    return Answer(result.summary.as_dict(), functools.partial(summary.lines, task, result), status)


def simulate(said: argparse.Namespace) -> Answer:
    """One plan in virtual time."""
    from manyhands import verbs
    from manyhands.cli import simulation
    from manyhands.cli.request import requested

    task, split, run = requested(said)
    run = {"evaluate": run["evaluate"]} if "evaluate" in run else {}
    names = ("compute_s", "update_s", "stragglers", "failures", "sizes", "trace", "evaluate", "data_dir", "cluster")
    found = verbs.simulate(task, split, **run | _given(said, *names))
    return Answer(found.as_dict(), functools.partial(simulation.lines, task, found))


def predict(said: argparse.Namespace) -> Answer:
    """What one plan will cost; nothing is trained."""
    from manyhands import verbs
    from manyhands.cli import prediction
    from manyhands.cli.request import requested

    task, split, _ = requested(said)
    found = verbs.predict(task, split, **_given(said, "cluster", "compute", "fresh", "data_dir"))
    return Answer(found.as_dict(), functools.partial(prediction.lines, task, found))


def search(said: argparse.Namespace) -> Answer:
    """Which plans to take, of many."""
    from manyhands import verbs
    from manyhands.cli import searching
    from manyhands.cli.request import requested

    if "batch_per_worker" in said:
        raise BadInput(
            "--batch-per-worker with search: plans of any number of workers share one batch. Say --batch-size."
        )
    task, base, _ = requested(said)
    reached = None
    if "study" in said:
        from manyhands.studies.reached import samples_to_target

        reached = samples_to_target(said.study, task)
    asked = {name: getattr(said, f"some_{name}") for name in options.SPACE if f"some_{name}" in said}
    asked |= {"recompute": (False, True)} if "some_recompute" in said else {}
    found = verbs.search(
        task,
        plan=base,
        study=None if reached is None else reached.samples,
        **asked,
        **_given(said, "cluster", "compute", "fresh", "measure", "limit", "price_per_worker_hour", "data_dir"),
    )
    return Answer(found.as_dict(), functools.partial(searching.lines, task, found, reached))


def calibrate(said: argparse.Namespace) -> Answer:
    """This machine measured into a cluster file."""
    from manyhands import verbs
    from manyhands.cli import calibration

    found = verbs.calibrate(progress="no_progress" not in said, **_given(said, "out", "quick", "transports"))
    return Answer(found.as_dict(), functools.partial(calibration.lines, found))


def plan(said: argparse.Namespace) -> Answer:
    """A plan decided and laid out; nothing is started."""
    from manyhands import verbs
    from manyhands.cli import outline
    from manyhands.cli.request import requested

    task, split, _ = requested(said)
    found = verbs.outlined(task, split, **_given(said, "data_dir"))
    if "draw" in said:
        outline.draw(found, said.draw)
        _say(f"manyhands: drawn: {said.draw}")
    return Answer(found.as_dict(), functools.partial(outline.lines, task, found))


def study(said: argparse.Namespace) -> Answer:
    """Many plans side by side."""
    from rich.console import Console

    from manyhands import studies

    task = _given(said, *options.STUDY_TASK)
    asked = {**_given(said, "workers", "repeats", "quick", "simulate", "cluster"), "task": task}
    if "dry_run" in said:
        return _dry_run(said, asked)
    if "again" in said and "out" not in said:
        raise BadInput("--again without --out: say in which study's folder to run everything anew, --out DIR.")
    console = None if "no_progress" in said else Console(stderr=True)
    run = {"predict": "no_predict" not in said, **_given(said, "out", "data_dir", "again", "trace")}
    result = studies.run(said.name, console=console, **asked, **run)
    return Answer(result.as_dict(), result.lines, result.exit_code)


def _dry_run(said: argparse.Namespace, asked: Mapping[str, Any]) -> Answer:
    """What a study would do."""
    from manyhands.studies import estimate, rows, running

    held = "out" in said and "again" not in said and (said.out / rows.ROWS).is_file()
    wanted = running.asked(said.name, **asked)
    done = rows.finished(rows.read(said.out), wanted.cells()) if held else set()
    found = estimate.estimate(wanted, done=done, **_given(said, "data_dir"))
    return Answer(found.as_dict(), found.lines, found.exit_code)


def report(said: argparse.Namespace) -> Answer:
    """The report of a study's folder, drawn again."""
    from manyhands.studies import reporting

    result = reporting.report(said.folder)
    for path in getattr(said, "exports", ()):
        from manyhands.studies import export

        export.export(result.rows, path)
    return Answer(result.as_dict(), result.lines)


def list_(said: argparse.Namespace) -> Answer:
    """The catalogue: names, or one kind in full."""
    from manyhands.studies import listing

    if said.kind is None:
        found = listing.names()
        return Answer(found, functools.partial(listing.name_lines, found))
    entries = listing.details(said.kind)
    return Answer(
        {said.kind: [e.as_dict() for e in entries]}, functools.partial(listing.detail_lines, said.kind, entries)
    )


def verify(said: argparse.Namespace) -> Answer:
    """Parity of every strategy with one process."""
    from manyhands.studies import parity

    verdict = parity.verify(**_given(said, "workers", "optimizer", "strategies", "transports"))
    if verdict is None:  # a rank beside rank 0, under a launcher
        return Answer(None)
    return Answer(verdict.as_dict(), verdict.lines, 0 if verdict.passed else 1)


def doctor(said: argparse.Namespace) -> Answer:
    """What works here, what is missing and how to get it."""
    from manyhands.studies import doctor

    found = doctor.examine(**_given(said, "quick", "data_dir"))
    return Answer(found.as_dict(), found.lines, 0 if found.works else 1)


COMMANDS = {
    "train": train,
    "predict": predict,
    "search": search,
    "simulate": simulate,
    "calibrate": calibrate,
    "plan": plan,
    "study": study,
    "report": report,
    "list": list_,
    "verify": verify,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what ``arguments`` (default: the command line's) say; returns the exit status.

    An exception that is none of ours is a mistake of ours and passes through.
    """
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")  # a terminal that has no … shows ?
    try:
        said = None
        with terminating():
            said = options.parse(sys.argv[1:] if arguments is None else arguments)
            with _logging(verbose="verbose" in said), _result_alone("json" in said):
                answer = COMMANDS[said.command](said)
            _print(answer, as_json="json" in said)
            return answer.status
    except ManyhandsError as error:
        _complain(error)
        return error.exit_code
    except KeyboardInterrupt:
        _say("manyhands: interrupted")
        _say_how_to_go_on(said)
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough; nothing may be flushed into it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _given(said: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What was said of ``names``, as keywords; of what was not, the library knows the default."""
    return {name: getattr(said, name) for name in names if getattr(said, name, None) is not None}


# -- what is said ------------------------------------------------------------------------------------------------------


def _print(answer: Answer, *, as_json: bool) -> None:
    from manyhands.training.metrics import json_text

    if answer.document is None:
        return
    text = json_text(answer.document, indent=2) if as_json else "\n".join(answer.lines())
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _say_how_to_go_on(said: argparse.Namespace | None) -> None:
    """After a training was ended: where its last checkpoint is taken up."""
    out = getattr(said, "out", None)
    if said is None or said.command != "train" or out is None:
        return
    kept = sorted(out.glob("checkpoints/step-*"))
    if kept:
        command = shlex.join(["manyhands", "train", "--resume", "--out", str(out)])
        _say(f"manyhands: {kept[-1]} is kept; to go on: {command}")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _complain(error: ManyhandsError) -> None:
    """The message, once: what every rank of a launched run finds wrong in the same words, only rank 0 says."""
    from manyhands.training import environment

    started = environment.launched()
    if started is not None and started.rank > 0:
        if isinstance(error, InvalidPlan | UnknownName):
            return
        _say(f"manyhands (rank {started.rank}): {error}")
    else:
        _say(f"manyhands: {error}")
    if isinstance(error, WorkerFailed) and error.traceback:
        teller = "it" if isinstance(error, FactoryFailed) else f"worker {error.rank}"
        _say(f"\nWhat {teller} says:\n{error.traceback.rstrip()}")


@contextlib.contextmanager
def _logging(*, verbose: bool) -> Iterator[None]:
    """What the library notes goes to standard error, each thing once; of a launched run only rank 0's."""
    from manyhands.training import environment

    started = environment.launched()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("manyhands: %(message)s"))
    handler.addFilter(_Once())
    logger, data = logging.getLogger("manyhands"), logging.getLogger("manyhands.data")
    before = logger.level, data.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    data.setLevel(logging.DEBUG if verbose else logging.INFO)  # says in one line which data was taken
    if started is not None and started.rank > 0:
        handler.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        data.setLevel(before[1])
        logger.propagate = before[2]


class _Once(logging.Filter):
    """Workers that are threads say the same things; the first says it for all."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in self._said
        self._said.add(text)
        return new


@contextlib.contextmanager
def _result_alone(wanted: bool) -> Iterator[None]:
    """Whatever is written to standard output inside, by this process or its children, goes to standard error."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    try:
        ours = os.dup(1) if sys.stdout.fileno() == 1 else -1
    except (OSError, ValueError):  # standard output is no file: closed, or a test's
        ours = -1
    if ours >= 0:
        os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if ours >= 0:
            os.dup2(ours, 1)
            os.close(ours)
