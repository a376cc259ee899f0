"""What any study's rows say: the fastest plan, every surprise, charts of speed, parts and learning, and laws."""

from __future__ import annotations

from collections.abc import Sequence

from manyhands.studies import charts, findings, fits, learning_charts, simulated
from manyhands.studies.analysis import Analysis
from manyhands.studies.contenders import Contender, contenders
from manyhands.studies.grid import PER_WORKER, Study
from manyhands.studies.row import Row
from manyhands.studies.summary import Line


def analyse(study: Study, rows: Sequence[Row], lines: Sequence[Line]) -> Analysis:
    """See the file's head."""
    trained = [line for line in lines if line.cell.measure == "train"]
    found = contenders(trained, rows)
    fastest = findings.fastest(found)
    sentences = [
        *fastest[:1],
        *findings.learning(trained),
        *_limits(found),
        *findings.trust(trained),
        *findings.wrong(trained),
    ]
    drawn = (
        *charts.speed_up(found),
        *simulated.scaling(lines),
        *charts.parts(found),
        *charts.throughput(found),
        *learning_charts.against_samples(found),
        *learning_charts.against_seconds(found),
        *learning_charts.against_batch(found),
        *charts.sent(found),
    )
    notes = (*fastest[1:], *findings.surprises(trained), *laws(found), *simulated.sentences(lines))
    return Analysis(tuple(sentences[:5]), drawn, notes=notes)


def _limits(found: Sequence[Contender]) -> list[str]:
    """Of the fastest plan of several workers."""
    many = [each for each in found if not each.alone and not each.oversubscribed]
    best = max(many, key=lambda each: each.samples_per_s, default=None)
    return findings.limits(best) if best is not None else []


def laws(found: Sequence[Contender]) -> list[str]:
    """What Amdahl's, Gustafson's and the universal law make of each strategy's speeds, or why they make nothing of
    them. A reason that several strategies share is said once.
    """
    said: dict[str, list[str]] = {}
    for name, plans in _scalings(found).items():
        for sentence in _laws(plans):
            said.setdefault(sentence, []).append(name)
    return [f"{_named(names)}: {sentence}" for sentence, names in said.items()]


def _named(names: Sequence[str]) -> str:
    """A few by name, many by the first and their number."""
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} others"


def _scalings(found: Sequence[Contender]) -> dict[str, list[Contender]]:
    """Plans that differ in nothing but the workers, where there are several workers in one at least."""
    alone: dict[tuple[object, ...], list[Contender]] = {}
    series: dict[tuple[object, ...], list[Contender]] = {}
    for each in found:
        if each.oversubscribed or charts.speed_up_of(each) is None:
            continue
        if each.alone:
            alone.setdefault((each.group, each.threads, each.strategy), []).append(each)
        else:
            rest = {k: v for k, v in each.lines[0].cell.plan.items() if k not in ("workers", "threads", "mesh")}
            key = (each.group, each.threads, each.strategy, repr(sorted(rest.items())))
            series.setdefault(key, []).append(each)
    transports = len({each.lines[0].transport for plans in series.values() for each in plans}) > 1
    named: dict[str, list[Contender]] = {}
    for (group, threads, strategy, _), plans in series.items():
        on = f" on {plans[0].lines[0].transport}" if transports else ""
        name = f"{strategy}{on}" + (f" ({group})" if group else "")
        named[name] = [*alone.get((group, threads, strategy), []), *plans]
    return named


def _laws(plans: Sequence[Contender]) -> list[str]:
    weak = any(PER_WORKER in each.lines[0].cell.task for each in plans)
    gained = [(float(each.workers), ratio) for each in plans for ratio in charts.speed_ups_of(each)]
    speeds = [(float(each.workers), speed) for each in plans for speed in each.speeds.values()]
    law = fits.gustafson(gained) if weak else fits.amdahl(gained)
    return [law.sentence(), fits.usl(speeds).sentence()]
