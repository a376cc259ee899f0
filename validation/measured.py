"""Predicted steps against steps measured on this machine: ``python -m validation.measured [--quick] [--write]``.

Every row is a configuration (model, batch, workers, threads, transport, strategy, cut) that nothing was fitted to. Its
real steps and the profile that predicts it alternate within the same processes, eight turns of an eighth of a second,
so that both meet the same state of the host (`interleaved`), and in each turn the plan's exchanges are measured by
themselves, at their sizes; all other prices are those of the last calibration. What is compared are medians within a
turn, and a row's error is the median over its turns; the noise floor is what odd turns differ by from even ones. Beside
it, on the same rows:

    grid         from profiles at half and at twice the batch, by a straight line between them
    operators    computing from this machine's tables of operators
    roofline     the calibrated device's specification alone
    one factor   the same times one constant, which makes the single-worker rows exact in the geometric mean
    last known   the step on one worker (one thread) of the same model and share, as if more were free

Regret: of each model and batch, the plan with the least predicted time a sample against the best one measured. Workers
times threads never exceed the cores. ``--write`` puts the report into docs/validation.md, between its marks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

import manyhands as mh
from manyhands import verbs
from manyhands.cluster import Cluster
from manyhands.communication import futex
from manyhands.errors import BadInput, ManyhandsError
from manyhands.modelling import calibration, prediction
from manyhands.modelling.given import Given
from manyhands.modelling.keeping import Profile
from manyhands.training.rehearsal import rehearsed
from manyhands.training.team import team
from validation import interleaved, page, scores

HEAD = ("prediction", "mean %", "median %", "p90 %", "max %", "bias %", "rows", "failures")
MODELS = (
    ("perceptron(hidden=50)", "mnist", (50, 200, 1000)),
    ("perceptron(hidden=1000)", "mnist", (100, 400)),
    ("logistic", "mnist", (100,)),
    ("cnn", "mnist", (24, 100)),
    ("gpt(layers=2, width=64)", "tinyshakespeare", (8, 24)),
    ("gpt", "tinyshakespeare", (8,)),
)
PLANS: tuple[dict[str, Any], ...] = (
    {"workers": 1, "threads": 1},
    {"workers": 1, "threads": 2},
    {"workers": 2, "threads": 1, "transport": "shared"},
    {"workers": 2, "threads": 1, "transport": "shared", "strategy": "synchronous(update='replicated')"},
    {"workers": 2, "threads": 1, "transport": "gloo"},
    {"workers": 2, "threads": 1, "transport": "mpi"},
    {"workers": 2, "threads": 1, "transport": "shared", "strategy": "local(every=8)"},
    {"workers": 2, "threads": 1, "transport": "shared", "strategy": "ssp(staleness=2)"},
    {"workers": 2, "threads": 1, "transport": "shared", "strategy": "gossip"},
)
#: For models that can be cut so.
CUTS: tuple[dict[str, Any], ...] = (
    {"mesh": "tensor=2", "threads": 1, "transport": "shared"},
    {"mesh": "pipeline=2", "threads": 1, "transport": "shared"},
)
CUT_MODELS = ("gpt", "gpt(layers=2, width=64)")
Way = Literal["measured", "grid", "operators", "roofline"]
WAYS = ("measured", "grid", "operators", "roofline", "one factor", "last known")


@dataclass
class Row:
    """One configuration, and what came of it."""

    model: str
    data: str
    batch: int
    plan: dict[str, Any]
    runs_s: list[float] = field(default_factory=list)
    predicted_s: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    error: float = 0.0  # the error bar that came with the prediction

    @property
    def step_s(self) -> float:
        """The median of turns' medians."""
        return statistics.median(self.runs_s)

    @property
    def floor(self) -> float:
        """By how much its odd turns differ from its even ones."""
        return abs(statistics.median(self.runs_s[::2]) - statistics.median(self.runs_s[1::2])) / self.step_s

    @property
    def case(self) -> tuple[str, int]:
        """What plans are chosen for."""
        return self.model, self.batch

    def best_guess(self, way: str) -> float | None:
        """What one way predicts: of a prediction a turn, the step times the median of what they say of theirs."""
        found = self.predicted_s.get(way)
        if not found:
            return None
        if len(found) == len(self.runs_s):
            return self.step_s * statistics.median(a / b for a, b in zip(found, self.runs_s, strict=True))
        return statistics.median(found)

    @property
    def knots(self) -> tuple[int, ...]:
        """Batches between which its own one is read off a grid; a model that is cut has none."""
        return () if "mesh" in self.plan else (self.batch // 2, 2 * self.batch)

    def __str__(self) -> str:
        plan = ", ".join(f"{k}={v}" for k, v in self.plan.items())
        return f"{self.model}, batch {self.batch}, {plan}"

    def task(self, steps: int) -> mh.Task:
        """The task of so many steps."""
        return mh.Task(model=self.model, data=self.data, batch_size=self.batch, steps=steps, optimizer="sgd(lr=0.01)")


def rows(quick: bool) -> Iterator[Row]:
    """Every configuration; of the quick form a few."""
    cores = futex.cores()
    for model, data, batches in MODELS[:1] + MODELS[3:4] if quick else MODELS:
        for batch in batches[:1] if quick else batches:
            for plan in (PLANS + (CUTS if model in CUT_MODELS else ()))[:: 3 if quick else 1]:
                workers = plan.get("workers", 2)
                if workers * plan["threads"] <= cores:
                    yield Row(model, data, batch, dict(plan))


def measure(row: Row, ways: Sequence[Way], turns: int, cluster: Cluster) -> None:
    """Run and profile in turn, then predict by what was profiled; and by every other way."""
    try:
        task = row.task(200)
        decided = verbs.resolved(task, mh.Plan(**row.plan))
        model, splits = verbs.built(task, None)
        plan, given = rehearsed(decided, model, task, splits.train).plan, Given(task, cluster, model, splits, here=True)
        assert plan.workers is not None
        tables = {"task": task.as_table(), "plan": plan.as_table()}
        transport = "shared" if plan.workers == 1 else plan.transport
        with team(transport, plan.workers, threads=plan.threads) as crew:
            turned = interleaved.alternated(
                crew,
                plan,
                tables,
                turns,
                row.knots,
                prediction.asked_by(given, plan),
            )
    except ManyhandsError as e:
        row.failures["run"] = str(e).splitlines()[0]
        return
    found = turned.profiles
    row.runs_s = [float(np.median(turn)) for turn in turned.times]
    for way in ways:
        if way == "grid" and not row.knots:
            continue
        try:
            if way == "measured":
                computed = [prediction.as_measured(plan, turn[0]) for turn in found]
            elif way == "grid":
                computed = [grid(plan, turn) for turn in found]
            else:
                elsewhere = dataclasses.replace(given, here=False)
                calculated = prediction.computing(elsewhere, plan, compute=way, fresh=False)
                calculated = dataclasses.replace(calculated, curves=found[0][0].curves)
                computed = [calculated]
                if way == "operators":  # each turn says how quick the machine was in it
                    each_turn = zip(turned.slower, turned.fetches, strict=True)
                    computed = [prediction.brought_up(calculated, k, fetch_s) for k, fetch_s in each_turn]
            guesses = [prediction.predicted(given, plan, computed=each) for each in computed]
        except ManyhandsError as e:
            row.failures[way] = str(e).splitlines()[0]
        else:
            row.predicted_s[way] = [guess.step_s for guess in guesses]
            if way == "measured":
                row.error = statistics.median(guess.error for guess in guesses)


def grid(plan: mh.Plan, found: Sequence[Profile]) -> prediction.Computed:
    """By the two at other batches alone, a straight line between them; the rest as at the nearer one."""
    _, near, far = found
    computed = prediction.as_measured(plan, near)
    points = tuple((p.samples, p.compute_s) for p in (near, far))
    return dataclasses.replace(computed, cost=dataclasses.replace(computed.cost, points=points), source="grid")


def baselines(every: Sequence[Row]) -> None:
    """One factor on the roofline, from single workers; and the single worker's step as everybody's."""
    single = [r for r in every if r.runs_s and r.plan.get("workers") == 1 and r.plan["threads"] == 1]
    ratios = [r.step_s / guess for r in single if (guess := r.best_guess("roofline"))]
    factor = statistics.geometric_mean(ratios) if ratios else 1.0
    alone = {r.case: r.step_s for r in single}
    for r in every:
        if (guess := r.best_guess("roofline")) is not None:
            r.predicted_s["one factor"] = [guess * factor]
        if r.case in alone and r not in single:
            r.predicted_s["last known"] = [alone[r.case] / r.plan.get("workers", 1)]


def regrets(every: Sequence[Row]) -> list[tuple[str, float, str, str]]:
    """Of each model and batch: what was lost by following the predictions, the plan chosen and the best one."""
    cases: dict[tuple[str, int], list[Row]] = {}
    for r in every:
        if r.runs_s and r.best_guess("measured") is not None:
            cases.setdefault(r.case, []).append(r)
    found = []
    for (model, batch), each in cases.items():
        chosen = min(each, key=lambda r: r.best_guess("measured") or math.inf)
        best = min(each, key=lambda r: r.step_s)
        found.append((f"{model}, batch {batch}", chosen.step_s / best.step_s - 1, _plan(chosen), _plan(best)))
    return found


def processes_or_threads(every: Sequence[Row]) -> tuple[int, int]:
    """How often the prediction says rightly whether two workers or two threads are quicker; of how many cases."""
    right = asked = 0
    cases: dict[tuple[str, int], dict[str, Row]] = {}
    for r in every:
        kind = "threads" if r.plan == PLANS[1] else "processes" if r.plan == PLANS[2] else ""
        if kind and r.runs_s and r.best_guess("measured") is not None:
            cases.setdefault(r.case, {})[kind] = r
    for each in cases.values():
        if len(each) == 2:
            a, b = each["threads"], each["processes"]
            asked += 1
            right += (a.step_s < b.step_s) == ((a.best_guess("measured") or 0) < (b.best_guess("measured") or 0))
    return right, asked


def _plan(row: Row) -> str:
    return ", ".join(f"{k}={v}" for k, v in row.plan.items())


# -- the report --------------------------------------------------------------------------------------------------------


def report(every: Sequence[Row], command: str) -> list[str]:
    """Markdown."""
    ran = [r for r in every if r.runs_s]
    floors = sorted(r.floor for r in ran)
    p90 = floors[min(len(floors) - 1, int(0.9 * len(floors)))]
    said = [
        f"{len(ran)} configurations on {futex.cores()} cores, `{command}`; torch {_torch()}. By how much runs of one "
        f"configuration differ, the noise floor: median {statistics.median(floors):.1%}, mean "
        f"{statistics.fmean(floors):.1%}, 90 % under {p90:.1%}.",
        "",
    ]
    table = []
    for way in WAYS:
        pairs = [(r.best_guess(way), r.step_s) for r in ran if way in r.predicted_s or way in r.failures]
        if pairs:
            table.append([way, *scores.Score.of(pairs).cells()])
    said += scores.table(HEAD, table)
    quiet = [r for r in ran if r.floor <= statistics.median(floors)]
    pairs = [(r.best_guess("measured"), r.step_s) for r in quiet]
    said += ["", f"On the quieter half of the rows, where runs differ by {statistics.median(floors):.1%} or less:", ""]
    said += scores.table(HEAD, [["measured", *scores.Score.of(pairs).cells()]])
    for title, key in (("model", lambda r: r.model), ("plan", _plan)):
        groups: dict[str, list[Row]] = {}
        for r in ran:
            groups.setdefault(key(r), []).append(r)
        each = [
            [name, *scores.Score.of([(r.best_guess("measured"), r.step_s) for r in group]).cells()]
            for name, group in groups.items()
        ]
        said += ["", f"By {title}, computing measured:", "", *scores.table((title, *HEAD[1:]), each)]
    lost = regrets(ran)
    right, asked = processes_or_threads(ran)
    inside = [r for r in ran if (g := r.best_guess("measured")) is not None and abs(g / r.step_s - 1) <= 2 * r.error]
    said += [
        "",
        f"Planner regret: mean {statistics.fmean(x[1] for x in lost):.1%}, worst {max(x[1] for x in lost):.1%} over "
        f"{len(lost)} models and batches. Two processes or two threads: right in {right} of {asked}. Within twice "
        f"its own error bar: {len(inside)} of {len(ran)}.",
        "",
        *scores.table(
            ("model, batch", "regret %", "chosen", "best"), [[n, f"{100 * x:.1f}", a, b] for n, x, a, b in lost]
        ),
    ]
    worst = sorted(ran, key=lambda r: -abs((r.best_guess("measured") or r.step_s) / r.step_s - 1))[:10]
    said += ["", "The ten worst:", ""]
    said += scores.table(
        ("configuration", "measured ms", "predicted ms", "error %", "runs differ by %"),
        [
            [
                str(r),
                f"{1e3 * r.step_s:.3f}",
                f"{1e3 * (r.best_guess('measured') or 0):.3f}",
                f"{100 * ((r.best_guess('measured') or 0) / r.step_s - 1):+.1f}",
                f"{100 * r.floor:.1f}",
            ]
            for r in worst
        ],
    )
    failed = {f"{way}: {why}" for r in every for way, why in r.failures.items()}
    return said + (["", "Not predicted or not run:", "", *(f"- {x}" for x in sorted(failed))] if failed else [])


def _torch() -> str:
    import torch

    return torch.__version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, predict, print."""
    parser = argparse.ArgumentParser(prog="python -m validation.measured", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few configurations, once: a smoke run")
    parser.add_argument("--turns", type=int, default=interleaved.TURNS, help="of runs and of profiles, each")
    parser.add_argument("--only", default="", help="rows whose text contains this")
    parser.add_argument("--json", type=Path, help="all rows as one JSON document")
    parser.add_argument("--write", action="store_true", help="put the report into docs/validation.md")
    said = parser.parse_args(arguments)
    logging.getLogger("manyhands").setLevel(logging.ERROR)
    ways: tuple[Way, ...] = ("measured", "grid", "operators", "roofline")
    cluster = calibration.cached()
    if cluster is None:
        raise BadInput("this machine is not calibrated; first: manyhands calibrate.")
    every = [r for r in rows(said.quick) if said.only in str(r)]
    if not every:
        raise BadInput(f"--only {said.only!r}: no configuration's text contains it.")
    began = time.perf_counter()
    for i, row in enumerate(every):
        measure(row, ways, said.turns, cluster)
        guess = row.best_guess("measured")
        error = f"{100 * (guess / row.step_s - 1):+.1f} %" if guess and row.runs_s else str(row.failures)
        print(f"[{i + 1}/{len(every)}, {time.perf_counter() - began:.0f} s] {row}: {error}", file=sys.stderr)
    baselines(every)
    command = "python -m validation.measured" + (" --quick" if said.quick else "")
    lines = report(every, command)
    print("\n".join(lines))
    if said.json:
        said.json.write_text(json.dumps([r.__dict__ for r in every], indent=1))
    if said.write:
        page.write("measured steps", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
