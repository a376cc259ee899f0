"""A study with something of everything that a report shows, made up."""

import dataclasses
import math

from manyhands.studies import reporting
from manyhands.studies.analysis import Analysis, Chart, Listing, Point, Series, Verdict
from manyhands.studies.grid import Grid, Study
from manyhands.studies.summary import summarize
from manyhands.studies.table import table
from tests.studies.made import TINY, measurement, row

EVIL = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }}"
WORKERS = (1, 2, 4, 8, 16)


def series(name, points, role="measured"):
    return Series(name, tuple(Point(*p) for p in points), role)


def about(value):
    return value, 0.94 * value, 1.06 * value


CHARTS = (
    Chart(
        "speed-up",
        "Averaging every fourth step gains 8.4× from 16 workers, averaging each step 6.4×",
        "workers",
        "speed-up over one worker",
        (
            series("synchronous", [(w, *about(w / (0.9 + 0.1 * w))) for w in WORKERS]),
            series("replica_average(period=4)", [(w, *about(w / (0.94 + 0.06 * w))) for w in WORKERS]),
            series("slice_update", [(w, *about(w / (0.5 + 0.5 * w))) for w in WORKERS]),
            series("linear", [(w, w) for w in WORKERS], "ideal"),
            series("Amdahl, synchronous", [(w, w / (0.89 + 0.11 * w)) for w in WORKERS], "fit"),
        ),
        note="Whiskers: 95 % intervals over three repeats.",
    ),
    Chart(
        "time-against-nodes",
        "Time falls nearly as 1/n, as in the paper, and a quarter below it",
        "nodes",
        "seconds per epoch",
        (
            series("measured", [(w, *about(100 / w + 3)) for w in WORKERS]),
            series("a + b/n", [(w, 98 / w + 3.4) for w in WORKERS], "fit"),
            series("Xin and Ma 2018", [(w, 130 / w + 2) for w in WORKERS[:4]], "published"),
        ),
        log_x=True,
        log_y=True,
    ),
    Chart(
        "learning",
        "Every strategy comes to 97 %; the asynchronous one last",
        "seconds of training",
        "share of the test set that is classified rightly",
        tuple(
            series(
                name,
                [
                    (0.7 * i, 0.98 - e, max(0.0, 0.975 - 1.04 * e), 0.985 - 0.96 * e)
                    for i in range(40 - 6 * k)
                    for e in [0.87 * math.exp(-i / (6 + 2 * k))]
                ],
            )
            for k, name in enumerate(("synchronous", "replica_average(period=4)", "asynchronous"))
        ),
    ),
    Chart(
        "parts",
        "Waiting is what grows with workers",
        "workers",
        "milliseconds per step",
        tuple(
            series(name, [(w, a + b * w) for w in WORKERS])
            for name, a, b in (
                ("computing", 9, -0.3),
                ("communicating", 0.2, 0.1),
                ("waiting", 0.1, 0.3),
                ("updating", 1, 0),
            )
        ),
        "stack",
    ),
    Chart(
        "transports",
        "Shared memory is twice as fast as gloo",
        "transport",
        "samples per second",
        (
            series("2 workers", [("shared", *about(16000)), ("threads", *about(9000)), ("gloo", *about(7800))]),
            series("4 workers", [("shared", *about(29000)), ("threads", *about(9900)), ("gloo", *about(12000))]),
            series("linear", [(name, 20000) for name in ("shared", "threads", "gloo")], "ideal"),
        ),
        "bars",
    ),
    Chart(
        "strategies",
        "Nothing is gained by the outer momentum",
        "strategy",
        "samples per second",
        (
            series(
                "measured",
                [
                    ("synchronous", *about(10200)),
                    ("replica_average(period=4, momentum=0.9)", *about(14200)),
                    ("asynchronous(staleness=2)", *about(9200)),
                    (EVIL, *about(3300)),
                ],
            ),
        ),
        "bars",
    ),
    Chart("gaps", "Of three values one is no number", "x", "y", (series("a", [(1, math.nan), (2, 1.0), (3, 2.0)]),)),
    Chart("empty", "Nothing was measured", "x", "y", ()),
)

ANALYSIS = Analysis(
    sentences=(
        "Fastest: replica_average(period=4) with 4 workers on shared, 3.06× one worker with 1 thread, 95.0 % right.",
        "Averaging every fourth step saves 11 % of the time and costs no accuracy.",
        "asynchronous learns less: 90.0 % right against 95.0 % of one worker.",
        "Time per epoch follows a + b/n with a = 3.1 s (2.9 … 3.3) and b = 100 s (98 … 103).",
        "Two of 14 plans could not be measured.",
    ),
    charts=CHARTS,
    verdicts=(
        Verdict(
            "Time falls as 1/n with the number of nodes (Xin and Ma 2018)",
            "supported",
            "Exponent −0.97, 95 % interval −1.02 … −0.93, over five numbers of nodes.",
            "Supported when the interval of the fitted exponent contains −1.",
        ),
        Verdict(
            "Accuracy does not depend on the number of nodes",
            "not supported",
            "It falls by 1.8 points (1.2 … 2.4).",
            "Not supported when the interval of the slope excludes 0.",
        ),
        Verdict("Noise falls with the batch", "undecided", "Two batches were measured.", "Undecided below three."),
    ),
    command="manyhands train --strategy 'replica_average(period=4)' --workers 4 --model cnn --data auto",
    notes=("synchronous with 2 workers gains only 1.2× from 2 cores.", f"A note with {EVIL}."),
    tables=(
        Listing(
            "Least time to 95 %",
            ("plan", "seconds", "accuracy"),
            (("synchronous with 4 workers", "3.1", "95.0 %"),),
            "Of the plans that came so far.",
        ),
    ),
)

STUDY = Study(
    "scaling",
    task=TINY,
    plan={"threads": 1},
    grids=(
        Grid(
            {
                "plan.strategy": ("synchronous", "replica_average(period=4)", "slice_update", "asynchronous"),
                "plan.workers": (1, 2, 4),
            },
            name="time against nodes",
        ),
        Grid({"plan.strategy": ("synchronous",), "plan.transport": ("gloo", "threads"), "plan.workers": (2,)}),
    ),
)


def rows_of(study=STUDY):
    found = []
    for cell in study.cells():
        strategy, workers = cell.plan["strategy"], cell.plan["workers"]
        for repeat in range(1, cell.repeats + 1):
            if (strategy, workers) == ("slice_update", 4):
                reason = f"slice_update divides by 4, and {EVIL} is not divisible.\nWhat would fit: 2."
                found.append(row(cell, repeat, status="refused", reason=reason, cores=4))
            elif (strategy, workers) == ("asynchronous", 4):
                failed = row(cell, repeat, status="failed", reason=f"rank 2: {EVIL}", cores=4)
                trace = f"Traceback (most recent call last):\n  raise {EVIL}\n{'x' * 300}"
                found.append(dataclasses.replace(failed, traceback=trace))
            else:
                done = measurement(workers, 0.01 / workers**0.8 * (1 + 0.02 * repeat))
                found.append(dataclasses.replace(row(cell, repeat, done, cores=4), disturbance=1 + 0.01 * repeat))
    return tuple(found)


def result(folder, study=STUDY, rows=None, analysis=ANALYSIS):
    rows = rows_of(study) if rows is None else tuple(rows)
    lines = summarize(study.cells(), rows)
    return reporting.StudyResult(study, folder, rows, lines, analysis, table(lines))


def written(folder, **fields):
    """The report's text."""
    found = result(folder, **fields)
    reporting.write_page(found)
    return found.report.read_text()
