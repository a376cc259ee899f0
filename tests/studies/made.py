"""Rows and cells as a study would make them, and factories that its cells may name."""

import dataclasses

from torch import nn

from manyhands.contract import Measurement, Spread, StepParts
from manyhands.studies.grid import Cell, Grid, Study
from manyhands.studies.row import Row

TINY = {"model": "logistic", "data": "digits(limit=200)", "batch_size": 50, "epochs": 5}


class Broken(nn.Module):
    """Fails in its third forward pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("the third is one too many")
        return self.linear(x.flatten(1))


def study(grid=None, **fields):
    grids = () if grid is None else (Grid({k: tuple(v) for k, v in grid.items()}),)
    return Study(**{"name": "test", "task": TINY, "plan": {"threads": 1}, "grids": grids, "repeats": 2, **fields})


def cell(
    strategy="synchronous", workers=1, factors=("plan.strategy", "plan.workers"), task=None, measure="train", **plan
):
    return Cell({**TINY, **(task or {})}, {"strategy": strategy, "workers": workers, **plan}, factors, measure)


def measurement(workers=1, step_s=0.010, **fields):
    return Measurement(
        **{
            "strategy": "synchronous",
            "model": "logistic",
            "data": "digits",
            "workers": workers,
            "transport": "single" if workers == 1 else "shared",
            "device": "cpu",
            "parameters": 650,
            "global_batch": 100,
            "steps": 4,
            "epochs": 1.0,
            "seed": 0,
            "train_loss": 0.5,
            "test_accuracy": 0.95,
            "samples_per_s": 9000.0,
            "step_s": Spread(step_s, 0.9 * step_s, 1.2 * step_s),
            "step_parts_s": StepParts(0.009, 0.0, 0.0, 0.001),
            "sent_B_per_step": 0.0 if workers == 1 else 2600.0,
            "moved_B_per_step": 0.0 if workers == 1 else 1300.0,
            "peak_memory_B": 200_000_000,
            "wall_s": 0.5,
            "versions": {"torch": "2.13.0"},
            **fields,
        }
    )


def row(of, repeat=1, measured=None, *, status="done", cores=2, threads=1, reason="", load=0.5):
    done = measured or measurement(of.plan["workers"])
    return Row(
        study="test",
        cell=of.id,
        repeat=repeat,
        status=status,
        task=dict(of.task),
        plan=dict(of.plan),
        workers=None if status == "refused" else of.plan["workers"],
        threads=None if status == "refused" else threads,
        transport=None if status == "refused" else done.transport,
        cores=cores,
        host="here",
        processor="a processor",
        started_at="2030-01-01T00:00:00+00:00",
        seconds=1.0,
        load_average=load,
        reason=reason,
        measurement=done if status == "done" else None,
    )


def noise_row(of, repeat=1, **fields):
    """The row of a cell that measures its update's noise."""
    noise = {"batch": 50, "workers": of.plan["workers"], "draws": 64, "parameters": 650, "variance": 0.4, **fields}
    done = row(of, repeat)
    return dataclasses.replace(
        done, measure="noise", noise={"mean_square": 0.5, "square_of_mean": 0.1, **noise}, measurement=None
    )


def slower(of, factor):
    """The same measurement on a machine that is ``factor`` times slower."""
    times = dataclasses.asdict(of.step_s)
    return dataclasses.replace(of, step_s=Spread(**{k: factor * v for k, v in times.items()}))
