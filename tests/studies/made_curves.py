"""Rows of runs that learned: histories along a line, with seeds."""

import dataclasses

from manyhands.contract import StepParts
from manyhands.studies.contenders import contenders
from manyhands.studies.summary import summarize
from tests.studies.made import cell, measurement, row

#: Samples of an epoch of the made runs.
EPOCH = 1000


def history(values, *, epoch_s=1.0, scale="test_accuracy"):
    """A record an epoch."""
    return [
        {
            "epoch": i,
            "step": 10 * (i + 1),
            "samples": EPOCH * (i + 1),
            "train_s": epoch_s * (i + 1),
            "train_loss": 1.0,
            "test_accuracy": None,
            "test_loss": None,
            scale: value,
        }
        for i, value in enumerate(values)
    ]


class Runs:
    """Cells and rows of a study under construction."""

    def __init__(self, *, cores=2, scale="test_accuracy"):
        self.cores, self.scale = cores, scale
        self.cells, self.rows = {}, []

    def add(
        self,
        strategy="synchronous",
        workers=1,
        *,
        speed=1.0,
        ends=0.95,
        runs=3,
        threads=1,
        seeds=(0,),
        task=None,
        values=None,
        spread=0.02,
        **measured,
    ):
        """Runs of a plan: ``speed`` × one worker's, learning to ``ends``; no two runs take quite the same time."""
        for seed in seeds:
            of = cell(strategy, workers, task={"seed": seed, **(task or {})}, threads=threads)
            self.cells[of.id] = of
            for repeat in range(1, runs + 1):
                slower = 1 + spread * ((repeat * 7 + workers * 3 + seed) % 5 - 2) / 2
                step_s = 0.010 * slower / speed
                batch = measured.get("global_batch", 100)
                share = (
                    {}
                    if workers == 1
                    else {"step_parts_s": StepParts(0.6 * step_s, 0.2 * step_s, 0.1 * step_s, 0.1 * step_s)}
                )
                done = measurement(
                    workers,
                    step_s,
                    test_accuracy=ends if self.scale == "test_accuracy" else None,
                    **{"global_batch": batch, **share, **measured},
                )
                curve = (
                    values or (0.5 * ends, 0.8 * ends, ends)
                    if self.scale == "test_accuracy"
                    else values or (3 * ends, 2 * ends, ends)
                )
                found = row(of, repeat, done, cores=self.cores, threads=threads)
                epoch_s = EPOCH / batch * step_s
                self.rows.append(dataclasses.replace(found, history=history(curve, epoch_s=epoch_s, scale=self.scale)))
        return self

    def fail(self, strategy="synchronous", workers=1, *, status="failed", reason="it broke"):
        """A plan without a run."""
        of = cell(strategy, workers, task={"seed": 0}, threads=1)
        self.cells[of.id] = of
        self.rows.append(row(of, status=status, reason=reason, cores=self.cores))
        return self

    @property
    def lines(self):
        return summarize(list(self.cells.values()), self.rows)

    @property
    def contenders(self):
        return contenders(self.lines, self.rows)
