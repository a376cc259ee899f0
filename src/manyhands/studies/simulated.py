"""The measured curve of speed-up and the simulated one that goes on from it, as a chart and in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from manyhands.studies.analysis import Chart, Point, Series
from manyhands.studies.charting import of_group, slug, titled
from manyhands.studies.grid import PER_WORKER
from manyhands.studies.summary import Line

#: Below this part of the ideal speed a worker is not worth its place.
WORTH = 0.5


def scaling(lines: Sequence[Line]) -> tuple[Chart, ...]:
    """Speed-up against workers, one chart a task; simulated points are dashed and hollow."""
    return tuple(_chart(name, each) for name, each in _tasks(lines).items())


def sentences(lines: Sequence[Line]) -> tuple[str, ...]:
    """What was simulated on what, what came of it, and how far it is from what was measured."""
    said = []
    for name, each in _tasks(lines).items():
        for strategy, line in _last(each).items():
            text = (
                f"Simulated{of_group(name)}: {strategy} with {line.workers:,} workers does {_times(line)} the work of "
            )
            text += "one"
            knee = _knee(each, strategy)
            if knee is not None:
                text += f", and up to {knee:,} workers at least half of the ideal"
            said.append(f"{text}. On {line.simulated_on}.")
            said += _beside(each, strategy)
    return tuple(said)


def _tasks(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Lines with a speed-up of each task that was simulated, by what tells it from the others."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        if line.speed_up is not None and line.cell.measure in ("train", "simulate") and not line.oversubscribed:
            groups.setdefault(repr(sorted(line.cell.task.items())), []).append(line)
    found = [each for each in groups.values() if any(line.cell.measure == "simulate" for line in each)]
    tables = [dict(each[0].cell.task) for each in found]
    keys = [k for k in dict.fromkeys(k for t in tables for k in t) if len({repr(t.get(k)) for t in tables}) > 1]
    return {
        ", ".join(f"{k.replace('_', ' ')} {t[k]}" for k in keys if k in t): each
        for t, each in zip(tables, found, strict=True)
    }


def _chart(name: str, lines: Sequence[Line]) -> Chart:
    measured, simulated = _series(lines, "train"), _series(lines, "simulate")
    most = max(line.workers or 1 for line in lines)
    best = max(_last(lines).items(), key=lambda item: item[1].speed_up or 0.0)
    strategy, line = best
    knee = _knee(lines, strategy)
    title = f"simulated, {line.workers:,} workers of {strategy} do {_times(line)} the work of one"
    if knee is not None and knee < most:
        title += f"; beyond {knee:,} less than half of the ideal is left"
    weak = any(PER_WORKER in each.cell.task for each in lines)
    return Chart(
        slug("speed-up-simulated", name),
        titled(title) + of_group(name),
        "workers",
        "speed-up, samples/s over those of one worker",
        (*measured, *simulated, Series("ideal", (Point(1, 1), Point(most, most)), "ideal")),
        log_x=True,
        log_y=True,
        note=(
            "Filled points are measured, with 95 % bootstrap intervals; hollow ones are simulated on "
            f"{line.simulated_on}. "
            + ("The batch grows with the workers (weak scaling). " if weak else "The batch is the same for all. ")
            + "Both axes are logarithmic. No fit has seen a simulated point."
        ),
    )


def _series(lines: Sequence[Line], measure: str) -> list[Series]:
    """One for each strategy and, of measured ones, transport; one worker belongs to all of a strategy's."""
    own = [line for line in lines if line.cell.measure == measure]
    places: dict[tuple[str, str], list[Line]] = {}
    for line in own:
        if measure == "simulate" or line.workers != 1:
            places.setdefault((line.strategy, line.transport or ""), []).append(line)
    several = len({transport for _, transport in places}) > 1
    found = []
    for (strategy, transport), each in places.items():
        alone = [line for line in own if line.workers == 1 and line.strategy == strategy and line not in each]
        points = sorted((_point(line) for line in (*alone, *each)), key=lambda p: float(p.x))
        if measure == "simulate":
            found.append(Series(f"{strategy}, simulated", tuple(points), "simulated"))
        else:
            found.append(Series(strategy + (f" on {transport}" if several else ""), tuple(points)))
    return found


def _point(line: Line) -> Point:
    interval = line.speed_up_interval
    return Point(
        line.workers or 1, line.speed_up or 0.0, interval.low if interval else None, interval.high if interval else None
    )


def _last(lines: Sequence[Line]) -> dict[str, Line]:
    """Of each simulated strategy the line with most workers."""
    found: dict[str, Line] = {}
    for line in lines:
        if line.cell.measure == "simulate" and (line.workers or 1) >= (found.get(line.strategy, line).workers or 1):
            found[line.strategy] = line
    return found


def _knee(lines: Sequence[Line], strategy: str) -> int | None:
    """The largest simulated number of workers with which each does at least half of what one alone does."""
    able = [
        line.workers or 1
        for line in lines
        if line.cell.measure == "simulate"
        and line.strategy == strategy
        and (line.speed_up or 0.0) >= WORTH * (line.workers or 1)
    ]
    return max(able, default=None)


def _beside(lines: Sequence[Line], strategy: str) -> list[str]:
    """Where both were done."""
    both = {
        line.workers: line
        for line in lines
        if line.cell.measure == "train" and line.strategy == strategy and (line.workers or 1) > 1
    }
    simulated = [line for line in lines if line.cell.measure == "simulate" and line.strategy == strategy]
    shared = [(line, both[line.workers]) for line in simulated if line.workers in both]
    return [
        f"With {line.workers} workers it is {_times(line)} simulated and {_times(real)} measured on {real.transport}."
        for line, real in shared
    ]


def _times(line: Line) -> str:
    gained = line.speed_up or 0.0
    return f"{gained:,.0f}×" if gained >= 100 else f"{gained:.3g}×"
