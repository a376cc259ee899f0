"""What a study's figures depend on, as (name, text): its design, the machine, the versions, how quiet it was."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from manyhands.studies.grid import Grid, Study
from manyhands.studies.row import Row

Facts = tuple[tuple[str, str], ...]

#: What the columns of the table hold (see `manyhands.studies.summary`).
COLUMNS: Facts = (
    (
        "step ms [p10 … p90]",
        "Time of an optimizer step: the median over repeats of each run's median, tenth and ninetieth percentile. "
        "Steps before caches and allocators have settled do not count.",
    ),
    ("samples/s", "Samples of a step, of all workers together, over the median time of a step."),
    (
        "speed-up",
        "samples/s over those of one worker with the same task, strategy and batch: a ratio within each repeat, as "
        "repeats take turns and lie close in time, and the median of the ratios.",
    ),
    ("efficiency", "Speed-up over the number of times as many cores that are used. Cores used: workers × threads."),
    ("accuracy", "Share of the test set that is classified rightly at the end: the median over repeats."),
    (
        "sent/step, sent/sample",
        "Payload that one worker sends in a step, and that all of them send for a sample, counted under the reference "
        "algorithms: the same on every transport.",
    ),
    (
        "correctness only",
        "Workers × threads are more than the machine's cores: the result counts, its speed does not, and none is "
        "stated.",
    ),
)


def design(study: Study) -> Facts:
    """What was varied, and how often each cell is measured."""
    cells = study.cells()
    head = [
        ("cells", f"{len(cells):,}"),
        ("repeats", f"{study.repeats}, taking turns"),
        ("evaluated", f"every {study.evaluate} steps" if isinstance(study.evaluate, int) else _when(study.evaluate)),
    ]
    if study.limit_s is not None:
        head.append(("limit", f"{study.limit_s:g} s"))
    return tuple(head)


def _when(evaluate: str) -> str:
    return {"end": "at the end", "epoch": "after every epoch"}.get(evaluate, evaluate)


def grids(study: Study) -> tuple[tuple[str, Facts], ...]:
    """What each grid varies; those of one name together, as an analysis sees them."""
    named: dict[str, list[Grid]] = {}
    for i, grid in enumerate(study.grids, 1):
        named.setdefault(f"Grid: {grid.name}" if grid.name else f"Grid {i}", []).append(grid)
    return tuple((name, _grid_facts(study, alike)) for name, alike in named.items())


def _grid_facts(study: Study, alike: Sequence[Grid]) -> Facts:
    values: dict[str, dict[str, None]] = {}
    for grid in alike:
        for factor, said in grid.factors.items():
            values.setdefault(factor, {}).update(dict.fromkeys(map(str, said)))
    facts = [(factor, ", ".join(found)) for factor, found in values.items()]
    cells = len(dataclasses.replace(study, grids=tuple(alike)).cells())
    some = "" if cells == math.prod(map(len, values.values())) else ", not every combination"
    facts.append(("cells", f"{cells:,}{some}"))
    repeats = dict.fromkeys(str(study.repeats if grid.repeats is None else grid.repeats) for grid in alike)
    if list(repeats) != [str(study.repeats)]:
        facts.append(("repeats", _all(repeats)))
    if any(grid.measure != "train" for grid in alike):
        facts.append(("measures", _all(grid.measure for grid in alike)))
    return tuple(facts)


def said(table: Mapping[str, object]) -> Facts:
    """A table of plain values."""
    return tuple((key, str(value)) for key, value in table.items())


def circumstances(rows: Sequence[Row], command: str) -> Facts:
    """Where, when and with what; values that differ between rows stand side by side."""
    measured = [row.measurement for row in rows if row.measurement is not None]
    versions: dict[str, dict[str, None]] = {}
    for m in measured:
        for name, version in m.versions.items():
            versions.setdefault(name, {})[version] = None
    facts = {
        "command": command,
        "machine": _all(f"{row.host}, {row.processor}, {row.cores} cores" for row in rows),
        "device": _all(m.device for m in measured),
        "data": _all(m.data for m in measured),
        "parameters": _all(f"{m.parameters:,}" for m in measured),
        "versions": ", ".join(f"{name} {_all(found)}" for name, found in versions.items()),
        "measured": span(rows),
        "runs": runs(rows),
        "load average before a run": _between([row.load_average for row in rows]),
        "disturbance": disturbance(rows),
    }
    return tuple((name, text) for name, text in facts.items() if text)


def span(rows: Sequence[Row]) -> str:
    """From the first run's start to the last one's."""
    if not rows:
        return ""
    first, last = (_clock(f(row.started_at for row in rows)) for f in (min, max))
    if first == last:
        return first
    if first.endswith(" UTC") and first[:10] == last[:10]:
        return f"{first.removesuffix(' UTC')} … {last[11:]}"
    return f"{first} … {last}"


def _clock(iso: str) -> str:
    """2030-01-01T10:20:30+00:00 without its seconds."""
    day, _, time = iso.partition("T")
    return f"{day} {time[:5]} UTC" if iso.endswith("+00:00") and len(time) >= 5 else iso


def runs(rows: Sequence[Row]) -> str:
    """How many, what became of them, and how long they took."""
    if not rows:
        return "none"
    counted = {status: sum(row.status == status for row in rows) for status in ("done", "failed", "refused")}
    text = ", ".join(f"{count:,} {status}" for status, count in counted.items() if count)
    return f"{text}; {_duration(sum(row.seconds for row in rows))} in all"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _between(values: Sequence[float]) -> str:
    return f"{min(values):.1f} … {max(values):.1f}" if values else ""


def disturbance(rows: Sequence[Row]) -> str:
    """What the calibration loop about each run saw of other work on the machine."""
    found = [row.disturbance for row in rows if row.disturbance is not None]
    if not found:
        return ""
    noisy, again = sum(row.noisy for row in rows), sum(row.attempts > 1 for row in rows)
    text = (
        f"a loop of known length about each run took {statistics.median(found):.2f} times its shortest time in the "
        f"median, {max(found):.2f} at most; {noisy} of {len(rows)} rows count as noisy"
    )
    return f"{text}, {again} {'was' if again == 1 else 'were'} measured again" if again else text


def _all(values: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(values))
