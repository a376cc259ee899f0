"""Charts of learning, shared by analyses: accuracy or test loss against samples, seconds and the batch.

Built as those of `manyhands.studies.charts` are.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from manyhands.studies.analysis import Chart, Point, Series
from manyhands.studies.charting import (
    a_chart_each,
    alike,
    of_each_strategy,
    of_group,
    said,
    seconds,
    slug,
    tested,
    titled,
)
from manyhands.studies.contenders import Contender, task_of
from manyhands.studies.curves import Cost, Learned, Scale, crossing, mean_curve, scale_of
from manyhands.studies.grid import PER_WORKER


def against_samples(found: Sequence[Contender], *, target: float | None = None) -> tuple[Chart, ...]:
    """Accuracy, or test loss, against samples: of each strategy its plan with most workers, and of one process."""
    return a_chart_each(found, lambda group, plans: _curves(group, plans, "samples", target))


def against_seconds(found: Sequence[Contender], *, target: float | None = None) -> tuple[Chart, ...]:
    """The same against seconds of training: of each strategy its fastest plan, and of one process."""
    able = [each for each in found if not each.oversubscribed]
    return a_chart_each(able, lambda group, plans: _curves(group, plans, "train_s", target))


def _curves(group: str, plans: Sequence[Contender], cost: Cost, target: float | None) -> Chart | None:
    scale = scale_of(row for each in plans for row in each.rows.values())
    if scale is None:
        return None
    curves = {each.short: mean_curve([row.history for row in each.rows.values()], scale) for each in plans}
    able = [each for each in plans if len(curves[each.short]) > 1]
    if cost == "samples":
        shown = of_each_strategy(able, _most_workers)
    else:
        shown = of_each_strategy(able, lambda each: -curves[each.short][-1].train_s / curves[each.short][-1].samples)
    if not shown:
        return None
    drawn = {each.short: curves[each.short] for each in shown}
    title = _ends(drawn, scale, tested(shown[0].lines[0])) if cost == "samples" else _first_there(drawn, scale, target)
    unit = 100.0 if scale == "test_accuracy" else 1.0
    series = [
        Series(
            name,
            tuple(_learned(getattr(at, cost), unit, at) for at in curve),
        )
        for name, curve in drawn.items()
    ]
    if target is not None:
        ends = [min(getattr(c[0], cost) for c in drawn.values()), max(getattr(c[-1], cost) for c in drawn.values())]
        series.append(Series("target", tuple(Point(x, unit * target) for x in ends), "ideal"))
    runs = max(at.runs for curve in drawn.values() for at in curve)
    spread = (
        f"Means over {runs} runs; bars from the lowest to the highest run, no interval." if runs > 1 else "One run."
    )
    seconds = (
        "" if cost == "samples" else " Seconds of training by worker 0's clock, which stands still in evaluations."
    )
    which = "its plan of most workers" if cost == "samples" else "its fastest plan"
    return Chart(
        slug("accuracy" if scale == "test_accuracy" else "test-loss", f"by {_COST[cost]}", group),
        titled(title) + of_group(group),
        "samples seen" if cost == "samples" else "training, s",
        "right answers in the test set, %" if scale == "test_accuracy" else "test loss",
        tuple(series),
        note=f"Each strategy by {which}. {spread}{seconds}",
    )


def _learned(x: float, unit: float, at: Learned) -> Point:
    low, high = (unit * at.low, unit * at.high) if at.runs > 1 else (None, None)
    return Point(x, unit * at.value, low, high)


_COST: dict[Cost, str] = {"samples": "samples", "train_s": "seconds"}


def _most_workers(of: Contender) -> tuple[float, ...]:
    return of.workers, of.samples_per_s


def _ends(drawn: dict[str, tuple[Learned, ...]], scale: Scale, samples_tested: int | None) -> str:
    ends = {name: curve[-1].value for name, curve in drawn.items()}
    samples = max(curve[-1].samples for curve in drawn.values())
    best = max(ends, key=lambda n: ends[n] if scale == "test_accuracy" else -ends[n])
    worst = min(ends, key=lambda n: ends[n] if scale == "test_accuracy" else -ends[n])
    if len(ends) == 1:
        return f"{best} gets {said(ends[best], scale)} after {samples:,.0f} samples"
    if alike(ends[worst], ends[best], scale, samples_tested):
        low, high = sorted((ends[worst], ends[best]))
        within = (
            f"{100 * low:.1f} to {100 * high:.1f} % right"
            if scale == "test_accuracy"
            else f"test losses of {low:.3g} to {high:.3g}"
        )
        return f"All learn alike from the same samples: {within} after {samples:,.0f}"
    apart = (
        f"{100 * (ends[best] - ends[worst]):.1f} points below"
        if scale == "test_accuracy"
        else f"at a loss {ends[worst] / ends[best]:.2f}× that of"
    )
    return f"{worst} ends {apart} {best} after the same samples ({said(ends[worst], scale)})"


def _first_there(drawn: dict[str, tuple[Learned, ...]], scale: Scale, target: float | None) -> str:
    if target is None:
        ends = [curve[-1].value for curve in drawn.values()]
        target = min(ends) if scale == "test_accuracy" else max(ends)
    taken = {name: crossing([(at.train_s, at.value) for at in curve], target, scale) for name, curve in drawn.items()}
    there = {name: s for name, s in taken.items() if s is not None}
    if not there:
        return f"No plan reaches {said(target, scale)}"
    first = min(there, key=lambda n: there[n])
    text = f"{first} is first at {said(target, scale)}, after {seconds(there[first])}"
    others = [name for name in taken if name != first]
    if others:
        other = others[0]  # one process, where there is one
        text += f"; {other} " + (f"needs {seconds(there[other])}" if other in there else "does not get there")
    return text


def against_batch(found: Sequence[Contender]) -> tuple[Chart, ...]:
    """Final accuracy against the global batch: of each strategy its plan with most workers, and of one process."""
    usual: dict[tuple[str, bool, str], list[Contender]] = {}
    for each in found:
        rest = {k: v for k, v in task_of(each).items() if k not in ("batch_size", PER_WORKER)}
        if each.accuracies:
            usual.setdefault((repr(sorted(rest.items())), _weak(each), each.short), []).append(each)
    several = [plans for plans in usual.values() if len({each.batch for each in plans}) > 1]
    kinds = [[plans[0] for plans in several if _weak(plans[0]) == weak] for weak in (False, True)]
    both = all(kinds)  # a batch for all and a batch per worker: two studies of the same plans
    shown = [each for kind in kinds for each in of_each_strategy(kind, _most_workers)]
    series, falls, drawn = [], [], list[Contender]()
    for plans in (plans for plans in several if any(each is plans[0] for each in shown)):
        ordered = sorted(plans, key=lambda c: c.batch)
        points = []
        for each in ordered:
            right = list(each.accuracies.values())
            low, high = (min(right), max(right)) if len(right) > 1 else (None, None)
            points.append(_in_percent(Point(each.batch, statistics.fmean(right), low, high)))
        name = ordered[0].short + (", batch per worker" if both and _weak(ordered[0]) else "")
        series.append(Series(name, tuple(points)))
        drawn += ordered
        falls.append((points[-1].y - points[0].y, name, ordered[0], points[0], points[-1]))
    if not series:
        return ()
    change, name, of, first, end = max(falls, key=lambda x: abs(x[0]))
    if alike(first.y / 100, end.y / 100, "test_accuracy", tested(of.lines[0])):
        title = (
            f"The batch does not change what is learned: at most {abs(change):.1f} points from batch {first.x:g} to "
            f"{end.x:g}"
        )
    else:
        verb = "falls" if change < 0 else "rises"
        title = f"Accuracy {verb} from {first.y:.1f} % at batch {first.x:g} to {end.y:.1f} % at {end.x:g} ({name})"
    return (
        Chart(
            "accuracy-by-batch",
            title,
            "global batch, samples",
            "right answers in the test set, %",
            tuple(series),
            log_x=True,
            note=f"{_length(drawn)} Means over runs; bars from the lowest to the highest run, no interval.",
        ),
    )


def _weak(of: Contender) -> bool:
    """Whether its batch is one per worker."""
    return PER_WORKER in task_of(of)


def _length(drawn: Sequence[Contender]) -> str:
    """What ends a run, and what that means for a larger batch."""
    in_steps = {"steps" in task_of(each) for each in drawn}
    if any(key in task_of(each) for each in drawn for key in ("seconds", "target_accuracy")):
        return "At the end of runs that need not be equally long: a time or a target ends them too."
    if in_steps == {True}:
        return "At the end of equally many steps, so a larger batch has seen more samples."
    if in_steps == {False}:
        return "At the end of equally many passes over the data, so a larger batch has fewer steps."
    return "At the end of runs of which some are given in steps, others in passes over the data."


def _in_percent(point: Point) -> Point:
    low, high = (None if each is None else 100 * each for each in (point.low, point.high))
    return dataclasses.replace(point, y=100 * point.y, low=low, high=high)
