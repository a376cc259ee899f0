"""What compression costs in accuracy: each scheme at its recommended setting against dense exchange, equal samples.

Two workers, one seed: all runs of a task start from the same parameters and see the same batches in the same order.
Traffic is what the communicator counted over the whole run, beginning included. The workers take turns in one process
(`simulate`), whose results are those of training on shared memory bit for bit, and which does not suffer from a busy
machine; ``--real`` trains on two processes.

    cnn         the convolutional network on MNIST, two epochs; target: within 0.5 points of dense
    gpt         the character transformer on Tiny Shakespeare, 300 steps of 16 windows; target: test loss within 1 %
    perceptron  of a million parameters on MNIST, two epochs; Strom's threshold: ≥ 300 × less traffic within 0.5 points

`dgc` brings its momentum, so its optimizer has none, and it is held against dense training with plain SGD of the same
momentum. `sign_sgd` votes without a magnitude and has a learning rate of its own.

    python benchmarks/compressed_accuracy.py [--only cnn|gpt|perceptron] [--schemes A --schemes B …] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import _measure as measure
import torch

import manyhands as mh
from manyhands.errors import NonFiniteLoss, WorkerFailed
from manyhands.studies.compression.settings import SETTINGS, Setting
from manyhands.training.allocator import tune

POINTS, LOSS_SHARE = 0.005, 0.01


@dataclass(frozen=True)
class Outcome:
    """One run."""

    setting: Setting
    score: float  # accuracy or test loss
    sent_B: float
    dense_B: float
    error: float | None
    kept: float | None
    wall_s: float


def run(task: str, setting: Setting, changed: dict[str, Any], *, real: bool) -> Outcome:
    """Train once."""
    said = {**SETTINGS[task].task, **changed, "optimizer": setting.optimizer, "seed": 1}
    asked, plan = mh.Task(**said), mh.Plan(workers=2, threads=1, compress=setting.compress)  # type: ignore[arg-type]
    looks: Any = said.get("steps", "epoch")
    began = time.perf_counter()
    if real:
        result: Any = mh.train(asked, replace(plan, transport="shared"), progress=False, evaluate=looks)
    else:
        result = mh.simulate(asked, plan, compute_s=1e-3, evaluate=looks)
    summary = result.summary
    return Outcome(
        setting,
        result.history[-1]["test_loss" if SETTINGS[task].by_loss else "test_accuracy"],
        summary.sent_B_per_step,
        4.0 * summary.parameters,
        summary.compression_error,
        summary.compression_kept,
        time.perf_counter() - began,
    )


def verdict(task: str, found: Outcome, base: Outcome) -> tuple[str, bool]:
    """How far from dense, and whether that is within the target, with as few bytes as asked."""
    if SETTINGS[task].by_loss:
        off = found.score / base.score - 1
        return f"{100 * off:+.2f} %", off <= LOSS_SHARE
    off = found.score - base.score
    enough = found.setting.fewer is None or found.dense_B / found.sent_B >= found.setting.fewer
    return f"{100 * off:+.2f}", off >= -POINTS and enough


def main() -> None:
    """All tasks, or one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", choices=tuple(SETTINGS))
    parser.add_argument("--schemes", action="append", help="compressors in place of those listed, e.g. 'strom'")
    parser.add_argument("--optimizer", help="of --schemes")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--data", help="in place of the task's, e.g. 'mnist(limit=20000)' for a trial")
    parser.add_argument("--real", action="store_true", help="two processes in real time; the same results bit for bit")
    parser.add_argument("--json", type=Path, metavar="FILE")
    said = parser.parse_args()
    tune()
    torch.set_num_threads(1)
    facts = measure.machine()
    print(f"{facts['processor']}, {facts['cores']} cores, {facts['system']}; load {facts['load']}")
    rows = []
    for name in [said.only] if said.only else SETTINGS:
        task = SETTINGS[name]
        settings = task.settings
        changed = {k: v for k, v in {"epochs": said.epochs, "data": said.data}.items() if v is not None}
        if said.schemes:
            known = {setting.compress: setting for setting in task.schemes}
            optimizer = task.dense[0].optimizer
            schemes = [
                Setting(text, said.optimizer, said.optimizer)
                if said.optimizer
                else known.get(text, Setting(text, optimizer))
                for text in said.schemes
            ]
            used = {setting.against or setting.optimizer for setting in schemes}
            settings = (*(d for d in task.dense if d.optimizer in used or d is task.dense[0]), *schemes)
        print(f"\n{name}: {', '.join(f'{k}={v}' for k, v in {**task.task, **changed}.items())}\n")
        score = "test loss" if task.by_loss else "test accuracy"
        print(f"| scheme | optimizer | {score} | against dense | bytes a step | fewer | error | kept | within |")
        print("|---|---|---|---|---|---|---|---|---|")
        bases: dict[str, Outcome] = {}
        for setting in settings:
            try:
                found = run(name, setting, changed, real=said.real)
            except (NonFiniteLoss, WorkerFailed) as e:
                print(f"| `{setting.compress}` | `{setting.optimizer}` | diverged | {e} | | | | | MISS |", flush=True)
                continue
            if setting.compress == "none":
                bases[setting.optimizer] = found
            own = setting.optimizer if setting.compress == "none" else setting.against
            base = bases.get(own, next(iter(bases.values())))
            off, within = verdict(name, found, base)
            rows.append({"task": name, **asdict(found), "off": off, "within": within})
            shown = f"{found.score:.4f}" if task.by_loss else f"{100 * found.score:.2f} %"
            fewer = found.dense_B / found.sent_B if found.sent_B else float("inf")
            error, kept = ("" if x is None else f"{x:.3g}" for x in (found.error, found.kept))
            head = f"| `{setting.compress}` | `{setting.optimizer}` | {shown} | {off} | {found.sent_B:,.0f} "
            print(f"{head}| {fewer:.4g} × | {error} | {kept} | {'yes' if within else 'MISS'} |", flush=True)
    if said.json:
        said.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
