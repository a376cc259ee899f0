"""How well steps are told from operator tables alone, for networks that the table has never seen.

    python -m validation.operators             about six minutes on a quiet machine
    python -m validation.operators --quick     one, with fewer networks

One run measures all networks in rounds: in each slot steps with stamps, of which tables are made, alternate with steps
without, which are what is to be told. Then each network is held out in turn: a table is made of all others, its step is
traced on fake tensors, priced, and compared with what it took. `STRANGERS` are in no table at all. For one batch size
held out the table has the network at its other batches. The noise floor is how far the medians of a step's rounds, some
minutes apart, lie from their middle: nobody can tell a step better than it tells itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manyhands.modelling.operations import Operations, count
from manyhands.modelling.operators import price
from manyhands.modelling.operators.measuring import Observed, observe, table_of
from manyhands.modelling.operators.networks import NETWORKS, Cell, Network
from manyhands.models import losses, optimizers
from validation import scores

_OURS = "manyhands.modelling.operators.networks"

#: What people train, and sizes that no other network here has.
STRANGERS: tuple[Network, ...] = (
    Network("perceptron(hidden=50)", (784,), 10, (25, 100, 400)),
    Network("perceptron(hidden=(300, 100))", (784,), 10, (10, 50, 200)),
    Network("cnn", (1, 28, 28), 10, (25, 50, 100)),
    Network("gpt(layers=3, width=192, heads=6)", (64,), 65, (2, 6), words=True),
    Network("gpt", (64,), 65, (4, 12), words=True),
    Network("alexnet(scale=0.1875)", (3, 64, 64), 10, (8, 24)),
    Network(f"{_OURS}:lstm(width=96)", (20,), 50, (20, 50), words=True, one_class=True),
    Network(f"{_OURS}:residual(width=24)", (3, 32, 32), 10, (10, 32)),
)
ROUNDS = 4
SECONDS, QUICK_SECONDS = 330.0, 60.0
#: Of a quick run.
FEW = 10

HEAD = ("held out", "mean %", "median %", "p90 %", "max %", "bias %", "steps", "failures")


@dataclass(frozen=True)
class Told:
    """One step, as it was and as it was told."""

    held_out: str  # network, batch or stranger
    model: str
    batch: int
    optimizer: str
    measured_s: float
    predicted_s: float
    error_s: float
    shares: dict[str, float]
    seconds: dict[str, float]
    rounds: int
    floor: float  # of the rounds, relative


def validate(*, quick: bool, threads: int, co_runners: int) -> list[Told]:
    """Measure, then hold out."""
    networks = (*NETWORKS, *STRANGERS)
    if quick:
        networks = (*NETWORKS[:FEW], *STRANGERS[:4])
    strange = set(networks) - set(NETWORKS)
    seconds = QUICK_SECONDS if quick else SECONDS
    seen = observe(seconds, threads, co_runners, networks, rounds=ROUNDS)
    cells = list(dict.fromkeys(x.cell for x in seen))
    traced = {cell: _traced(cell) for cell in cells}
    usual = [x for x in seen if x.cell.network not in strange]
    found = []
    for cell in cells:
        ways: dict[str, Callable[[Observed], bool]] = {"stranger": lambda _: True}
        if cell.network not in strange:
            ways = {
                "network": lambda x, c=cell: x.cell.network != c.network,  # type: ignore[misc]
                "batch": lambda x, c=cell: x.cell != c,  # type: ignore[misc]
            }
        for held_out, stays in ways.items():
            table = table_of([x for x in usual if stays(x)])
            found.append(_told(held_out, cell, traced[cell], seen, table, threads, co_runners))
    return found


def _traced(cell: Cell) -> Operations:
    return count(cell.network.build(), *cell.network.samples(cell.batch), losses.build("cross_entropy"))


def _told(
    held_out: str,
    cell: Cell,
    operations: Operations,
    seen: Sequence[Observed],
    table: Sequence[Any],
    threads: int,
    co_runners: int,
) -> Told:
    optimizer = optimizers.trial(cell.optimizer)
    estimate = price(operations, table, threads=threads, co_runners=co_runners, optimizer=optimizer)
    rounds = [[sum(parts) for parts in x.rounds] for x in seen if x.cell == cell]
    by_round = [statistics.median(r) for r in zip(*rounds, strict=False)]
    measured_s = statistics.median(by_round)
    floor = statistics.fmean(abs(s / measured_s - 1) for s in by_round)
    return Told(
        held_out, cell.network.model, cell.batch, cell.optimizer, measured_s, estimate.total_s, estimate.error_s,
        estimate.shares, estimate.seconds, len(by_round), floor,
    )  # fmt: skip


def report(found: Sequence[Told]) -> list[str]:
    """The lines of the report, Markdown."""
    lines = [f"{platform.machine()}, torch {torch.__version__}; errors of a whole step with its update, %.", ""]
    by = {k: [x for x in found if x.held_out == k] for k in ("stranger", "network", "batch")}
    rows = []
    for name, some in by.items():
        if some:
            cells = scores.Score.of([(x.predicted_s, x.measured_s) for x in some]).cells()
            rows.append([f"one {name}" if name != "stranger" else "strangers to all tables", *cells])
    whole = [x for x in found if x.held_out != "batch"]
    rows.append(["networks and strangers", *scores.Score.of([(x.predicted_s, x.measured_s) for x in whole]).cells()])
    lines += scores.table(HEAD, rows)
    repeated = [x for x in whole if x.rounds > 1]
    floors = sorted(x.floor for x in repeated) or [float("nan")]
    within = statistics.fmean(abs(x.predicted_s - x.measured_s) <= x.error_s for x in whole)
    shares = {k: statistics.fmean(x.shares[k] for x in whole) for k in whole[0].shares}
    lines += [
        "",
        f"Rounds of each step: {min(x.rounds for x in whole)} to {max(x.rounds for x in whole)} of {ROUNDS}; fewer "
        "where the machine was too busy for the time given.",
        f"Noise floor (rounds of one step against their middle): mean {100 * statistics.fmean(floors):.1f} %, median "
        f"{100 * statistics.median(floors):.1f} %, p90 {100 * floors[int(0.9 * len(floors))]:.1f} %.",
        f"Within their error bars: {100 * within:.0f} %. Time from "
        + ", ".join(f"{k} {100 * v:.0f} %" for k, v in shares.items())
        + ".",
        "",
    ]
    ordered = sorted(whole, key=lambda x: -abs(x.predicted_s / x.measured_s - 1))
    lines += scores.table(
        ("step", "batch", "optimizer", "measured ms", "told ms", "error %", "bar %", "floor %"),
        [
            [
                x.model.removeprefix(f"{_OURS}:"), str(x.batch), x.optimizer.partition("(")[0],
                f"{1e3 * x.measured_s:.3f}", f"{1e3 * x.predicted_s:.3f}",
                f"{100 * (x.predicted_s / x.measured_s - 1):+.1f}", f"{100 * x.error_s / x.predicted_s:.0f}",
                f"{100 * x.floor:.1f}",
            ]
            for x in ordered
        ],
    )  # fmt: skip
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; with ``--json`` keep every step too."""
    parser = argparse.ArgumentParser(
        prog="python -m validation.operators", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer networks, a minute")
    parser.add_argument("--threads", type=int, default=1, help="of a worker")
    parser.add_argument("--co-runners", type=int, default=1, help="workers side by side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every step, for other programs")
    said = parser.parse_args(arguments)
    found = validate(quick=said.quick, threads=said.threads, co_runners=said.co_runners)
    print("\n".join(report(found)))
    if said.json:
        said.json.write_text(json.dumps([dataclasses.asdict(x) for x in found], indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
