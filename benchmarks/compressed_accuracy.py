"""What compression costs in accuracy: each scheme at its recommended setting against dense exchange, equal samples.

Two workers; all runs of a task and a seed start from the same parameters and see the same batches in the same order.
Traffic is what the communicator counted over the whole run, beginning included. The workers take turns in one process
(`simulate`), whose results are those of training on shared memory bit for bit, and which does not suffer from a busy
machine; ``--real`` trains on two processes.

    cnn         the convolutional network on MNIST, one epoch; target: within 0.5 points of dense
    perceptron  of a million parameters, likewise; Strom's threshold: ≥ 300 × less traffic there, ≥ 50 × on the cnn
    gpt         the character transformer on Tiny Shakespeare, 300 steps of 16 windows; target: test loss within 1 %

Settings are those of `manyhands.studies.compression.settings`, dense runs and what each is held against included. With
several seeds the verdict is on the mean of the differences from dense, run by run of the same seed.

    python benchmarks/compressed_accuracy.py [--models cnn gpt] [--schemes strom 'top_k(ratio=0.1)' …] [--seeds 1 2 3]
                                             [--results FILE]

A scheme's name stands for its recommended setting. All of it is about half an hour of one core a seed: with
``--results`` a run is kept as soon as it ends, and one that is kept is not made again, so it can be done in parts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import _measure as measure
import torch

import manyhands as mh
from manyhands.errors import NonFiniteLoss, WorkerFailed
from manyhands.studies.compression.settings import SETTINGS, Setting, Settings
from manyhands.training.allocator import tune

POINTS, LOSS_SHARE = 0.005, 0.01


@dataclass(frozen=True)
class Run:
    """What was trained; text only, so that it is found again."""

    model: str  # of `SETTINGS`
    compress: str
    optimizer: str
    seed: int
    data: str  # "": the task's


@dataclass(frozen=True)
class Outcome:
    """What came of it; without a score it diverged."""

    score: float | None  # accuracy or test loss
    sent_B: float = 0.0
    dense_B: float = 0.0
    error: float | None = None
    kept: float | None = None


class Runs:
    """Trains what is asked for, once."""

    def __init__(self, kept: Path | None, *, real: bool) -> None:
        self._kept, self._real = kept, real
        lines = kept.read_text().splitlines() if kept is not None and kept.exists() else []
        rows = [json.loads(line) for line in lines]
        self._known = {Run(**row["run"]): Outcome(**row["outcome"]) for row in rows}

    def __call__(self, run: Run) -> Outcome:
        """What came of it, now or before."""
        if run not in self._known:
            self._known[run] = found = train(run, real=self._real)
            if self._kept is not None:
                with self._kept.open("a") as file:
                    file.write(json.dumps({"run": asdict(run), "outcome": asdict(found)}) + "\n")
        return self._known[run]


def train(run: Run, *, real: bool) -> Outcome:
    """Train once."""
    said = {**SETTINGS[run.model].task, "optimizer": run.optimizer, "seed": run.seed}
    said |= {"data": run.data} if run.data else {}
    asked, plan = mh.Task(**said), mh.Plan(workers=2, threads=1, compress=run.compress)  # type: ignore[arg-type]
    looks: Any = said.get("steps", "epoch")
    try:
        if real:
            result: Any = mh.train(asked, replace(plan, transport="shared"), progress=False, evaluate=looks)
        else:
            result = mh.simulate(asked, plan, compute_s=1e-3, evaluate=looks)
    except (NonFiniteLoss, WorkerFailed):
        return Outcome(None)
    summary = result.summary
    return Outcome(
        result.history[-1]["test_loss" if SETTINGS[run.model].by_loss else "test_accuracy"],
        summary.sent_B_per_step,
        4.0 * summary.parameters,
        summary.compression_error,
        summary.compression_kept,
    )


def behind(task: Settings, scores: Sequence[float], dense: Sequence[float]) -> list[float]:
    """By how much each is worse than dense, in the target's units: shares of right answers, or of the test loss."""
    return [s / d - 1 if task.by_loss else d - s for s, d in zip(scores, dense, strict=True)]


def signed(task: Settings, off: Iterable[float]) -> str:
    """The mean with its spread: points, better above 0; per cent of the test loss, better below."""
    shown = [100 * (x if task.by_loss else 0.0 - x) for x in off]
    spread = f" ({min(shown):+.2f} … {max(shown):+.2f})" if len(shown) > 1 else ""
    return f"{statistics.fmean(shown):+.2f}{' %' if task.by_loss else ''}{spread}"


def row(task: Settings, setting: Setting, found: Sequence[Outcome], bases: Sequence[Sequence[Outcome]]) -> str:
    """Of the table; ``bases``: the dense runs that it is held against, and the best dense ones."""
    head = f"| `{setting.compress}` | `{setting.optimizer}` "
    scores = [outcome.score for outcome in found if outcome.score is not None]
    if len(scores) < len(found):
        return f"{head}| diverged | | | | | MISS |"
    mean = statistics.fmean(scores)
    offs = [behind(task, scores, [o.score for o in base if o.score is not None]) for base in bases]
    sent_B = statistics.fmean(outcome.sent_B for outcome in found)
    fewer = found[0].dense_B / sent_B if sent_B else float("inf")
    near = statistics.fmean(offs[0]) <= (LOSS_SHARE if task.by_loss else POINTS)
    enough = setting.fewer is None or fewer >= setting.fewer
    asked = f" (target {setting.fewer:g})" if setting.fewer else ""
    verdict = "" if setting.compress == "none" else "yes" if near and enough else "MISS"
    shown = f"{mean:.4f}" if task.by_loss else f"{100 * mean:.2f} %"
    against = "" if setting.compress == "none" else signed(task, offs[0])
    best = "" if found is bases[1] else signed(task, offs[1])
    return f"{head}| {shown} | {against} | {best} | {sent_B:,.0f} | {fewer:.4g} ×{asked} | {verdict} |"


def asked_for(task: Settings, schemes: Sequence[str], optimizer: str | None) -> list[Setting]:
    """The settings of the schemes that are named (all: none is), with another optimizer if one is said."""
    by_name = {setting.compress.partition("(")[0]: setting for setting in task.schemes}
    by_text = {setting.compress: setting for setting in task.schemes}
    first = task.dense[0].optimizer
    found = [by_text.get(text) or by_name.get(text) or Setting(text, first) for text in schemes] or [*task.schemes]
    return [replace(s, optimizer=optimizer, against=s.base) for s in found] if optimizer else found


def main() -> None:
    """All tasks, or some."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--schemes", nargs="+", default=[], help="names, or compressors as for --compress")
    parser.add_argument("--optimizer", help="of the schemes, in place of what is recommended")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--data", default="", help="in place of the task's, e.g. 'mnist(limit=20000)' for a trial")
    parser.add_argument("--real", action="store_true", help="two processes in real time; the same results bit for bit")
    parser.add_argument("--results", type=Path, metavar="FILE", help="keep runs here, and take those that are")
    said = parser.parse_args()
    tune()
    torch.set_num_threads(1)
    facts = measure.machine()
    print(f"{facts['processor']}, {facts['cores']} cores, {facts['system']}; load {facts['load']}")
    runs = Runs(said.results, real=said.real)
    for name in said.models:
        task = SETTINGS[name]
        schemes = asked_for(task, said.schemes, said.optimizer)
        needed = {task.dense[0].optimizer, *(setting.base for setting in schemes)}
        dense = [setting for setting in task.dense if setting.optimizer in needed]
        seeds = ", ".join(map(str, said.seeds))
        print(f"\n{name}: {', '.join(f'{k}={v}' for k, v in task.task.items())}; 2 workers, seeds {seeds}")
        print(f"target: {'test loss within 1 %' if task.by_loss else 'within 0.5 points'} of dense exchange\n")
        score = "test loss" if task.by_loss else "test accuracy"
        print(f"| scheme | optimizer | {score} | against dense | the best dense | bytes a step | fewer | within |")
        print("|---|---|---|---|---|---|---|---|")
        outcomes: dict[str, list[Outcome]] = {}
        for setting in [*dense, *schemes]:
            each = (Run(name, setting.compress, setting.optimizer, seed, said.data) for seed in said.seeds)
            found = [runs(run) for run in each]
            if setting.compress == "none":
                outcomes[setting.optimizer] = found
            print(row(task, setting, found, [outcomes[setting.base], outcomes[task.dense[0].optimizer]]), flush=True)


if __name__ == "__main__":
    main()
