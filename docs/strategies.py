"""The picture and the measured table of docs/strategies.md.

    python docs/strategies.py           draws docs/strategies.svg
    python docs/strategies.py FOLDER    and writes the table into the page, from a folder of `manyhands study spectrum`

What is drawn is computed from the classes: traffic, promises, and on which transports a strategy runs. What a strategy
waits for is said in `PLACES` alone.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from manyhands.consistency.ssp import StaleSynchronous
from manyhands.contract import Setting, Strategy
from manyhands.plan import ONE_SIDED, SHARE_MEMORY, strategy_from
from manyhands.studies.report.canvas import Canvas, settings
from manyhands.studies.report.palette import Style
from manyhands.studies.row import Row
from manyhands.studies.rows import read

HERE = Path(__file__).parent
PAGE, PICTURE = HERE / "strategies.md", HERE / "strategies.svg"
BEGIN, END = "<!-- measured: python docs/strategies.py FOLDER -->", "<!-- end of what was measured -->"

FEWEST, SHOWN, MOST = 2, 8, 64  # workers: the ends of a bar, and its mark
N = 2**20  # parameters: enough to be cut among 64 workers without rounding

#: Whom a worker waits for, in two lines, and who does: from lock-step to lock-free.
PLACES: Sequence[tuple[str, str, Sequence[str]]] = (
    (
        "everybody,",
        "every step",
        (
            "synchronous",
            "synchronous(aggregate=median)",
            "replica_average",
            "slice_update",
            "slice_own_batch",
            "sandblaster(units=3)",
        ),
    ),
    ("all but the b", "slowest", ("backup_workers", "backup_workers(backups=0, aggregate=median)")),
    (
        "everybody,",
        "every k-th step",
        ("local", "diloco", "elastic", "elastic(mode='round_robin')", "elastic(momentum=0.9)"),
    ),
    ("neighbours", "in a graph", ("gossip(graph='one_peer')", "push_sum", "gossip")),
    ("the slowest,", "s steps back", ("ssp",)),
    (
        "nobody",
        "",
        ("asynchronous", "asynchronous_gossip", "downpour(fetch=4, push=4)", "hogwild", "parallel_sgd"),
    ),
)
#: How the picture calls what would be too long, or would say less than it means.
CALLED = {
    "synchronous(aggregate=median)": "synchronous(aggregate=…)",
    "gossip(graph='one_peer')": "gossip(one_peer)",
    "gossip": "gossip(ring)",
    "sandblaster(units=3)": "sandblaster(3)",
    "local": "local(16)",
    "diloco": "diloco(16)",
    "elastic": "elastic(4)",
    "elastic(mode='round_robin')": "elastic(round_robin)",
    "elastic(momentum=0.9)": "elastic(momentum=…)",
    "backup_workers(backups=0, aggregate=median)": "backup_workers(aggregate=…)",
    "downpour(fetch=4, push=4)": "downpour(4, 4)",
    "ssp": "ssp(3)",
}

EXACT = Style("equal to one worker", "c1", "o", False, "", ())
REPEATS = Style("approximate, repeats bit for bit", "c2", "s", False, "", ())
RACES = Style("approximate, a race decides", "c3", "D", True, "", ())


#: Payload of a worker and step over n with `FEWEST`, `SHOWN` and `MOST` workers.
Sent = tuple[float, float, float]


def setting(transport: str) -> Setting:
    """Plain SGD on enough workers for any rule."""
    shares = transport in SHARE_MEMORY
    one_sided = transport in ONE_SIDED
    return Setting(SHOWN, transport, shares_memory=shares, elementwise=True, stateless=True, one_sided=one_sided)


def promise(strategy: Strategy) -> Style:
    """What it promises with plain SGD, by its looks."""
    if strategy.exact(setting("shared")):
        return EXACT
    return REPEATS if strategy.deterministic else RACES


def sent(strategy: Strategy, workers: int) -> float:
    """Payload of a worker and step over n, a mean over many steps."""
    return strategy.traffic(N, workers, 1).sent_B_per_step / N


def places(names: Iterable[str]) -> dict[Sent, list[str]]:
    """Those that send as much share a place; what grows most comes first."""
    found: dict[Sent, list[str]] = defaultdict(list)
    for name in names:
        strategy = strategy_from(name)
        few, some, many = (sent(strategy, workers) for workers in (FEWEST, SHOWN, MOST))
        if isinstance(strategy, StaleSynchronous):  # a pull a step at most; one in s + 1 where workers keep pace
            few = 1 + 1 / (strategy.staleness + 1)
        found[few, some, many].append(name)
    return dict(sorted(found.items(), key=lambda item: -item[0][2]))


# -- the picture -------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 848, 482
LEFT, TOP, BOTTOM = 64, 34, 384  # of the field in which marks stand
COLUMNS = (196, 106, 102, 134, 84, 160)
NOTHING = BOTTOM + 22
LOW, HIGH = 1 / 24, 90.0
TICKS = ((1 / 16, "n/16"), (1 / 4, "n/4"), (1, "n"), (4, "4 n"), (16, "16 n"), (64, "64 n"))
LINE = 14.0


def height(times_n: float) -> float:
    """Where so much stands, on a logarithmic scale; nothing below it."""
    if not times_n:
        return NOTHING
    return BOTTOM - (BOTTOM - TOP) * math.log(times_n / LOW) / math.log(HIGH / LOW)


def draw() -> str:
    """The picture, as SVG."""
    with settings():
        canvas = Canvas(WIDTH, HEIGHT)
        edges = list(itertools.accumulate(COLUMNS, initial=LEFT))
        for times_n, label in TICKS:
            y = height(times_n)
            canvas.line([LEFT, edges[-1]], [y, y], "grid", width=1.6 if times_n == 1 else 1.0)
            canvas.text(LEFT - 8, y + 4, label, anchor="end")
        canvas.text(LEFT - 8, NOTHING + 4, "nothing", anchor="end")
        canvas.text(4, 16, "What a worker sends in a step", colour="ink")
        canvas.text(194, 16, f"n parameters; the mark: {SHOWN} workers, its bar: from {FEWEST} to {MOST}")
        for x in edges[1:-1]:
            canvas.line([x, x], [TOP, NOTHING + 16], "grid")
        canvas.line([LEFT, edges[-1]], [NOTHING + 16, NOTHING + 16], "ideal")
        for left, (first, second, names) in zip(edges, PLACES, strict=False):
            canvas.text(left + 8, NOTHING + 32, first, colour="ink")
            canvas.text(left + 8, NOTHING + 46, second, colour="ink")
            _column(canvas, left + 14, places(names))
        _axis(canvas, edges[-1])
        _legend(canvas)
        return canvas.svg(
            "spectrum",
            title="The spectrum of strategies",
            description="From lock-step to lock-free, by whom a worker waits for, and what it sends in a step.",
        )


def _column(canvas: Canvas, x: float, placed: Mapping[Sent, Sequence[str]]) -> None:
    """Bars beside each other where they overlap; on each the names that share it, a row each about its height."""
    taken: list[tuple[float, float]] = []
    for (few, some, many), names in placed.items():
        low, high = sorted((height(few) + 8, height(many) - 8))
        at = x + 13 * sum(1 for begin, end in taken if begin < high and low < end)
        taken.append((low, high))
        if few != many:
            canvas.line([at, at], [height(few), height(many)], "ideal", width=2.0)
            for end in (few, many):
                canvas.line([at - 3, at + 3], [height(end), height(end)], "ideal", width=2.0)
        for i, name in enumerate(names):
            y = height(some) + LINE * (i - (len(names) - 1) / 2)
            canvas.markers([at], [y], promise(strategy_from(name)), size=8.5)
            canvas.text(at + 10, y + 4, CALLED.get(name, name), colour="ink")


def _axis(canvas: Canvas, right: float) -> None:
    y = HEIGHT - 10
    canvas.text(LEFT + 8, y, "lock-step", colour="soft")
    canvas.text(right - 4, y, "lock-free", anchor="end", colour="soft")
    canvas.text((LEFT + right) / 2, y, "whom a worker waits for", anchor="middle", colour="ink")
    for a, b in ((LEFT + 70, (LEFT + right) / 2 - 82), ((LEFT + right) / 2 + 82, right - 66)):
        canvas.line([a, b], [y - 4, y - 4], "ideal")
    tip = right - 66
    canvas.line([tip - 6, tip, tip - 6], [y - 8, y - 4, y], "ideal")


def _legend(canvas: Canvas) -> None:
    """Where nothing else stands, on paper that hides the lines below."""
    x, y = LEFT + COLUMNS[0] + 14, height(36)
    canvas.box(x - 8, y - 12, 224, 60, Style("", "paper", "", False, "", ()))
    for i, style in enumerate((EXACT, REPEATS, RACES)):
        canvas.markers([x], [y + 18 * i], style, size=8.5)
        canvas.text(x + 12, y + 18 * i + 4, style.label)


# -- the table ---------------------------------------------------------------------------------------------------------

HEAD = (
    "strategy",
    "promises",
    "several hosts",
    "sends a step",
    "step",
    "speed-up",
    "waits",
    "staleness",
    "test accuracy",
)
SAYS = {EXACT: "exact", REPEATS: "repeats", RACES: "a race"}


def table(rows: Sequence[Row]) -> str:
    """The rows of a folder of `spectrum`, a line a strategy, and how they came to be."""
    done = [row for row in rows if row.measurement is not None]
    runs: dict[tuple[str, int], dict[int, Row]] = defaultdict(dict)
    for row in done:
        runs[row.plan["strategy"], row.plan["workers"]][row.task["seed"]] = row
    alone = next(found for (_, workers), found in runs.items() if workers == 1)
    order = [name for _, _, names in PLACES for name in names]
    shown = sorted((name for name, workers in runs if workers > 1), key=order.index)
    workers = max(workers for _, workers in runs)
    lines = [_line("one process", alone, alone)]
    lines += [_line(name, runs[name, workers], alone) for name in shown]
    rule = "|---" * 3 + "|---:" * (len(HEAD) - 3) + "|"
    return "\n".join([f"| {' | '.join(HEAD)} |", rule, *lines, "", _circumstances(rows, done)])


def _line(name: str, found: dict[int, Row], alone: dict[int, Row]) -> str:
    measured = {seed: row.measurement for seed, row in found.items() if row.measurement is not None}
    base = {seed: row.measurement for seed, row in alone.items() if row.measurement is not None}
    single = found is alone
    strategy = strategy_from("synchronous" if single else name)
    step_s = statistics.median(m.step_s.median for m in measured.values())
    ratios = [base[seed].step_s.median / m.step_s.median for seed, m in measured.items() if seed in base]
    # Waits are means, so they are a share of the mean step.
    waits = [max(m.wait_s_by_worker, default=0.0) * m.samples_per_s / m.global_batch for m in measured.values()]
    late = [m.staleness_mean for m in measured.values() if m.staleness_mean is not None]
    sizes = [m.sent_B_per_step / 4 / m.parameters for m in measured.values()]
    right = [100 * m.test_accuracy for m in measured.values() if m.test_accuracy is not None]
    cells = [
        name if single else f"`{name}`",
        "" if single else SAYS[promise(strategy)],
        "" if single else _several_hosts(strategy),
        "" if single else _sizes(statistics.median(sizes)),
        f"{1e6 * step_s:.0f} µs",
        "1" if single else f"{statistics.median(ratios):.2f}",
        "" if single else f"{100 * statistics.median(waits):.0f} %",
        f"{statistics.mean(late):.2f}" if late else "",
        f"{statistics.mean(right):.1f} ± {(max(right) - min(right)) / 2:.1f} %",
    ]
    return f"| {' | '.join(cells)} |"


def _several_hosts(strategy: Strategy) -> str:
    if not strategy.problems(setting("gloo")):
        return "yes"
    return "no" if strategy.problems(setting("mpi")) else "over MPI"


def _sizes(times_n: float) -> str:
    return f"{times_n:.3g} n" if times_n else "nothing"


def _circumstances(rows: Sequence[Row], done: Sequence[Row]) -> str:
    one = done[0]
    assert one.measurement is not None
    m, seeds = one.measurement, sorted({row.task["seed"] for row in done})
    versions = ", ".join(
        f"{name} {m.versions[name]}" for name in ("manyhands", "torch", "python") if name in m.versions
    )
    noisy, lost = sum(row.noisy for row in done), len(rows) - len(done)
    load = statistics.median(row.load_average for row in done)
    workers = max(row.plan["workers"] for row in done)
    said = [
        f"Measured {one.started_at[:10]} on {one.cores} cores of an {one.processor} ({m.versions.get('system', '')}); "
        f"{versions}; load average {load:.1f}.",
        f"{one.task['model']} ({m.parameters:,} parameters) on {m.data}, {one.task['optimizer']}, global batch "
        f"{m.global_batch}, {m.epochs:g} epochs, {workers} workers of one thread on {done[-1].transport}, "
        f"{len(seeds)} seeds.",
        f"{len(done)} runs" + (f", {lost} more came to nothing" if lost else "") + f"; {_noisy(noisy)}",
    ]
    command = "manyhands study spectrum --out FOLDER && python docs/strategies.py FOLDER"
    return " ".join(said) + f"\nCommand: `{command}`."


def _noisy(runs: int) -> str:
    if not runs:
        return "none was disturbed."
    return f"disturbed by other processes, also when repeated: {runs}. The times of such runs are upper bounds."


def write(folder: Path) -> None:
    """The table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(read(folder))}\n\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    """See the file's head."""
    PICTURE.write_text(draw(), encoding="utf-8")
    if arguments:
        write(Path(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
