"""What predictions, searches and simulations cost themselves: ``python -m validation.costs [--quick] [--write]``.

Seconds of one process on this machine, whatever else it does, so they are those of a quiet one or too large. Steps and
exchanges are measured before they count, but for the first row. ``--quick`` leaves out the longest simulation.
``--write`` puts the table into docs/validation.md, between its marks.
"""

from __future__ import annotations

import argparse
import logging
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import manyhands as mh
from manyhands.modelling.search.ranking import Ranking
from validation import page, scores

TASK = mh.Task(model="perceptron(hidden=50)", data="digits", batch_size=256)
#: What is searched: 1,000 plans and more.
WORKERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
COMPRESSORS = ("none", "bfloat16", "top_k", "powersgd")
STRATEGIES = (
    "synchronous",
    "synchronous(update='replicated')",
    "local",
    "local(every=4)",
    "diloco",
    "elastic",
    "ssp(servers=1)",
    "gossip",
)
LATE = "lognormal(sigma=0.3)"
#: What, seconds, the target.
Row = tuple[str, float, str]


def rows(*, quick: bool) -> Iterator[Row]:
    """One after the other."""
    plan = mh.Plan(workers=2, transport="shared", threads=1)
    yield "a model's first prediction, with its measuring", _seconds(lambda: mh.predict(TASK, plan, fresh=True)), "15 s"
    again_s = statistics.median(_seconds(lambda: mh.predict(TASK, plan)) for _ in range(5))
    yield "predict one plan, the median of five", again_s, "0.5 s"
    _search()
    found = _search()
    plans, took_s = found.looked_at, found.took_s
    yield f"search, for 1,000 plans ({plans:,} took {took_s:.1f} s)", 1000 * took_s / plans, "10 s"
    yield "simulate sizes, folded, 1,024 × 1,000", _sizes("synchronous", 1024, 1000), "2 s"
    yield "simulate sizes, folded, 10,000 × 100", _sizes("synchronous", 10_000, 100), "2 s"
    yield "the same late by chance, synchronous, 1,024 × 1,000", _sizes("synchronous", 1024, 1000, LATE), "60 s"
    if not quick:
        late_s = _sizes("ssp(staleness=3, servers=1)", 1024, 1000, LATE)
        yield "the same late by chance, ssp(staleness=3, servers=1), 1,024 × 1,000", late_s, "60 s"
    yield "64 virtual workers, values, an epoch of MNIST, beside one real process", _values(), "2 times"


def _seconds(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def _search() -> Ranking:
    return mh.search(
        TASK,
        "ethernet_10g",
        workers=WORKERS,
        meshes=("data",),
        micro_batches=(1, 2),
        compressors=COMPRESSORS,
        strategies=STRATEGIES,
        limit=2000,
    )


def _sizes(strategy: str, workers: int, steps: int, late: str | None = None) -> float:
    task = mh.Task(model="perceptron(hidden=50)", data="digits", batch_size=8 * workers, steps=steps)
    plan = mh.Plan(strategy=strategy, workers=workers)
    return _seconds(
        lambda: mh.simulate(task, plan, "ethernet_10g", sizes=True, compute_s=0.01, update_s=0.0, stragglers=late)
    )


def _values() -> float:
    """One process that takes 64 times as many steps of 50 samples computes the same gradients."""
    many = mh.Task(model="perceptron(hidden=50)", data="mnist", batch_size=64 * 50, epochs=1)
    one = mh.Task(model="perceptron(hidden=50)", data="mnist", batch_size=50, epochs=1)
    plan, alone = mh.Plan(workers=64), mh.Plan(workers=1, transport="single", threads=1)
    ratios = []
    for _ in range(3):
        virtual_s = _seconds(lambda: mh.simulate(many, plan, "ethernet_10g", compute_s=0.01, evaluate="never"))
        real_s = _seconds(lambda: mh.train(one, alone, evaluate="never", progress=False))
        ratios.append(virtual_s / real_s)
    return statistics.median(ratios)


def report(found: Sequence[Row]) -> list[str]:
    """Markdown."""
    lines = [
        [what, f"{value:.2f} {'times' if 'times' in target else 's'}", target, "" if _kept(value, target) else "missed"]
        for what, value, target in found
    ]
    peak_GB = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return [*scores.table(("what", "measured", "at most", ""), lines), "", f"Largest resident set: {peak_GB:.1f} GB."]


def _kept(value: float, target: str) -> bool:
    return value <= float(target.split()[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="python -m validation.costs", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the longest simulation")
    parser.add_argument("--write", action="store_true", help="put the table into docs/validation.md")
    said = parser.parse_args(arguments)
    logging.getLogger("manyhands").setLevel(logging.ERROR)
    found = []
    for row in rows(quick=said.quick):
        print(f"{row[0]}: {row[1]:.2f}", file=sys.stderr, flush=True)
        found.append(row)
    lines = report(found)
    print("\n".join(lines))
    if said.write:
        page.write("costs", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
