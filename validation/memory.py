"""Predicted memory against measured: ``python -m validation.memory [--quick] [--write]``.

Real runs, each in a team of its own; the measured figure is ``peak_memory_B`` of the run's summary, the largest
resident set of any worker. The rows of `SEEN` were looked at when the rules were written, those of `HELD_OUT` were not,
and are the ones that count. A resident set does not depend on how busy a machine is.

``--write`` puts the report into docs/validation.md, between its marks; ``--quick`` takes every fifth row.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import manyhands as mh
from manyhands import verbs
from manyhands.modelling.memory.footprint import footprint
from manyhands.modelling.memory.parts import Memory
from manyhands.training.rehearsal import rehearsed
from validation import page
from validation.scores import Score

#: Enough for the heap to have found its form.
TURNS = 6

SGD, MOMENTUM, ADAM = "sgd(lr=0.01)", "sgd(lr=0.01,momentum=0.9)", "adam(lr=0.001)"
WIDE, DEEP = "perceptron(hidden=(2000,2000))", "perceptron(hidden=(1500,1500,1500))"
CNN, GPT, ALEX = "cnn", "gpt", "alexnet(scale=0.5)"
DIGITS, MNIST, TEXT = "digits", "mnist(limit=5000)", "markov"
IMAGES = "synthetic(inputs=(3,64,64),samples=400)"


@dataclass(frozen=True)
class Row:
    """One run."""

    model: str
    data: str
    optimizer: str
    batch_size: int
    plan: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        said = ", ".join(f"{k}={v}" for k, v in self.plan.items())
        return f"{self.model}, {self.data}, {self.optimizer}, batch {self.batch_size}, {said}"


def _plan(workers: int, transport: str, **more: Any) -> dict[str, Any]:
    return {"workers": workers, "transport": transport, **more}


ONE, TWO, GLOO = _plan(1, "shared"), _plan(2, "shared"), _plan(2, "gloo")
SEEN = (
    Row("perceptron", DIGITS, SGD, 50, ONE),
    Row(CNN, MNIST, SGD, 1000, ONE),
    Row(CNN, MNIST, SGD, 1000, TWO),
    Row("perceptron(hidden=(3000,3000))", DIGITS, SGD, 64, ONE),
    Row("perceptron(hidden=(3000,3000))", DIGITS, ADAM, 64, ONE),
    Row("perceptron(hidden=(3000,3000))", DIGITS, SGD, 64, TWO),
    Row("perceptron(hidden=(3000,3000))", DIGITS, SGD, 64, GLOO),
    Row("perceptron(hidden=(3000,3000))", DIGITS, ADAM, 64, GLOO),
    Row("perceptron(hidden=(3000,3000))", DIGITS, ADAM, 64, {**GLOO, "shard": 3}),
    Row("gpt", "tinyshakespeare", SGD, 32, ONE),
    Row(ALEX, IMAGES, SGD, 100, ONE),
    Row("perceptron", MNIST, MOMENTUM, 100, TWO),
    Row("perceptron", DIGITS, ADAM, 50, GLOO),
    Row(CNN, DIGITS, SGD, 50, TWO),
    Row(CNN, MNIST, ADAM, 200, ONE),
    Row(CNN, MNIST, MOMENTUM, 400, TWO),
    Row(CNN, MNIST, SGD, 600, GLOO),
    Row(CNN, MNIST, SGD, 300, {**TWO, "mesh": "pipeline=2"}),
    Row(CNN, MNIST, SGD, 200, {**TWO, "strategy": "local(every=4)"}),
    Row(WIDE, DIGITS, MOMENTUM, 64, ONE),
    Row(WIDE, DIGITS, MOMENTUM, 64, TWO),
    Row(WIDE, DIGITS, ADAM, 128, TWO),
    Row(WIDE, DIGITS, SGD, 128, {**TWO, "strategy": "synchronous(update='replicated')"}),
    Row(WIDE, DIGITS, ADAM, 64, {**GLOO, "shard": 1}),
    Row(WIDE, DIGITS, SGD, 64, {**GLOO, "shard": 2}),
    Row(WIDE, DIGITS, SGD, 64, {**TWO, "shard": 3}),
    Row(WIDE, DIGITS, ADAM, 64, {**TWO, "mesh": "tensor=2"}),
    Row(WIDE, DIGITS, MOMENTUM, 64, {**TWO, "mesh": "pipeline=2"}),
    Row(WIDE, DIGITS, SGD, 64, {**TWO, "strategy": "diloco(inner=4)"}),
    Row(WIDE, DIGITS, SGD, 64, {**GLOO, "strategy": "local(every=4)"}),
    Row(WIDE, DIGITS, SGD, 64, {**ONE, "allocator": "plain"}),
    Row(DEEP, DIGITS, SGD, 256, {**ONE, "micro_batches": 4}),
    Row(DEEP, DIGITS, ADAM, 256, GLOO),
    Row(GPT, TEXT, ADAM, 16, ONE),
    Row(GPT, TEXT, SGD, 64, TWO),
    Row(GPT, TEXT, ADAM, 32, {**TWO, "mesh": "tensor=2"}),
    Row(GPT, TEXT, ADAM, 32, {**TWO, "mesh": "pipeline=2"}),
    Row(GPT, TEXT, SGD, 32, {**TWO, "mesh": "pipeline=2", "recompute": True}),
    Row("gpt(width=256)", TEXT, ADAM, 16, {**GLOO, "shard": 3}),
    Row(ALEX, IMAGES, MOMENTUM, 100, TWO),
    Row(ALEX, IMAGES, ADAM, 50, ONE),
    Row(ALEX, IMAGES, SGD, 200, GLOO),
)
HELD_OUT = (
    Row("logistic", MNIST, SGD, 500, GLOO),
    Row("perceptron(hidden=(2400,1200))", MNIST, MOMENTUM, 128, ONE),
    Row("perceptron(hidden=(1800,1800))", MNIST, ADAM, 100, TWO),
    Row("perceptron(hidden=(1600,1600,1600))", DIGITS, ADAM, 64, {**TWO, "mesh": "pipeline=2"}),
    Row("perceptron(hidden=(2500,2500))", DIGITS, SGD, 96, {**GLOO, "mesh": "tensor=2"}),
    Row("perceptron(hidden=(2500,2500))", DIGITS, ADAM, 96, {**GLOO, "shard": 3}),
    Row("perceptron(hidden=(1200,1200))", DIGITS, MOMENTUM, 200, {**TWO, "strategy": "gossip"}),
    Row("perceptron(hidden=(2200,2200))", DIGITS, SGD, 80, {**TWO, "strategy": "ssp(staleness=2)"}),
    Row("perceptron(hidden=(2200,2200))", DIGITS, MOMENTUM, 80, {**GLOO, "strategy": "local(every=2)"}),
    Row(CNN, "mnist(limit=10000)", MOMENTUM, 800, GLOO),
    Row(CNN, "mnist(limit=10000)", SGD, 1200, TWO),
    Row(CNN, MNIST, ADAM, 500, {**ONE, "micro_batches": 2}),
    Row("gpt(layers=6,width=192)", "tinyshakespeare", ADAM, 24, ONE),
    Row("gpt(layers=2,width=256)", TEXT, MOMENTUM, 48, TWO),
    Row("gpt(width=192)", TEXT, SGD, 32, {**TWO, "mesh": "tensor=2"}),
    Row("gpt(width=320)", TEXT, SGD, 24, {**GLOO, "shard": 2}),
    Row("gpt(layers=6)", TEXT, MOMENTUM, 64, {**GLOO, "mesh": "pipeline=2"}),
    Row("alexnet(scale=0.4)", IMAGES, ADAM, 80, TWO),
    Row("alexnet(scale=0.6)", IMAGES, MOMENTUM, 60, GLOO),
    Row("alexnet(scale=0.5)", IMAGES, SGD, 80, {**TWO, "strategy": "local(every=3)"}),
)


@dataclass(frozen=True)
class Found:
    """What was predicted of a row, and measured."""

    row: Row
    predicted: Memory
    measured_B: int

    @property
    def beyond(self) -> tuple[float, float]:
        """(predicted, measured) beyond the idle process."""
        process_B = self.predicted.largest.process_B
        return self.predicted.resident_B - process_B, self.measured_B - process_B


def run(row: Row) -> Found:
    """Predict, then train."""
    task = mh.Task(model=row.model, data=row.data, optimizer=row.optimizer, batch_size=row.batch_size, steps=TURNS)
    plan = mh.Plan(**row.plan)
    decided = verbs.resolved(task, plan)
    model, splits = verbs.built(task, None)
    decided = rehearsed(decided, model, task, splits.train)
    predicted = footprint(task, decided.plan, model, splits)
    summary = verbs.train(task, plan, progress=False).summary
    assert summary is not None
    return Found(row, predicted, int(summary.peak_memory_B))


def report(found: Sequence[Found], failed: Sequence[str]) -> list[str]:
    """As Markdown."""
    held_out = [f for f in found if f.row in HELD_OUT]
    seen = [f for f in found if f.row in SEEN]
    groups = {
        "**resident peak, held out**": _pairs(held_out),
        "resident peak, seen": _pairs(seen),
        "beyond the idle process, held out": [f.beyond for f in held_out],
        "beyond the idle process, seen": [f.beyond for f in seen],
    }
    lines = [
        "| prediction | mean % | median % | p90 % | max % | bias % | rows | failures |",
        "|---|---|---|---|---|---|---|---|",
        *(f"| {name} | {' | '.join(Score.of(pairs).cells())} |" for name, pairs in groups.items() if pairs),
        "",
        "| run | measured MB | predicted MB | error % | beyond the process: measured | predicted |",
        "|---|---|---|---|---|---|",
    ]
    for f in found:
        error = 100 * (f.predicted.resident_B / f.measured_B - 1)
        ours, real = (f"{x / 1e6:.0f}" for x in f.beyond)
        name = f"{f.row} (seen)" if f.row in SEEN else str(f.row)
        measured, predicted = (f"{x / 1e6:.1f}" for x in (f.measured_B, f.predicted.resident_B))
        lines.append(f"| {name} | {measured} | {predicted} | {error:+.1f} | {real} | {ours} |")
    return [*lines, *(f"\nFailed: {why}" for why in failed)]


def _pairs(found: Sequence[Found]) -> list[tuple[float | None, float]]:
    return [(f.predicted.resident_B, f.measured_B) for f in found]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; with ``--write`` also into the page."""
    parser = argparse.ArgumentParser(prog="python -m validation.memory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every fifth row")
    parser.add_argument("--write", action="store_true", help="put the report into docs/validation.md")
    said = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    found, failed = [], []
    for row in (HELD_OUT + SEEN)[:: 5 if said.quick else 1]:
        try:
            found.append(run(row))
        except Exception as e:  # counted, and the others go on
            failed.append(f"{row}: {type(e).__name__}: {str(e)[:200]}")
            print(failed[-1], file=sys.stderr, flush=True)
            continue
        told = found[-1]
        print(
            f"{row}: {told.measured_B / 1e6:.1f} MB, predicted {told.predicted.resident_B / 1e6:.1f} "
            f"({100 * (told.predicted.resident_B / told.measured_B - 1):+.1f} %)",
            file=sys.stderr,
            flush=True,
        )
    lines = report(found, failed)
    print("\n".join(lines))
    if said.write:
        page.write("memory", lines)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
