"""The built-in studies. Each suits the machine it is made for: workers go from one to one a core."""

from __future__ import annotations

from manyhands.communication import futex
from manyhands.consistency import strategies
from manyhands.studies.grid import Grid, Study


def worker_counts(most: int) -> tuple[int, ...]:
    """1, 2, 4 … and ``most``.

    >>> worker_counts(6)
    (1, 2, 4, 6)
    """
    return (*(2**i for i in range(most.bit_length()) if 2**i < most), most)


def _workers(most: int | None) -> tuple[int, ...]:
    """To one a core; to 2 where there is one core, so that every strategy is seen at work."""
    return worker_counts(most or max(futex.cores(), 2))


def default(most: int | None = None) -> Study:
    """One network under every strategy on 1 … cores workers, real images, and what threads and gloo make of it.

    The convolutional network of the 2018 slides goes twice over 4,000 images of MNIST: enough for some 95 % right and
    for steps long enough that parallelism pays, and short enough for three
    rounds (two or one where the machine is busy). A single process that uses all
    cores as torch does stands beside them, because that is what a user has without this library.
    """
    cores, workers = futex.cores(), _workers(most)
    grids = [Grid({"plan.strategy": tuple(strategies), "plan.workers": workers})]
    if len(workers) > 1:
        transports = ("threads", "gloo")
        grids.append(
            Grid({"plan.strategy": ("synchronous",), "plan.transport": transports, "plan.workers": workers[1:]})
        )
    if cores > 1:
        grids.append(Grid({"plan.strategy": ("synchronous",), "plan.workers": (1,), "plan.threads": (cores,)}))
    return Study(
        "default",
        task={
            "model": "cnn",
            "data": "auto(limit=4000)",
            "optimizer": "sgd(lr=0.1, momentum=0.9)",
            "batch_size": 100,
            "epochs": 2,
        },
        plan={"threads": 1},
        grids=tuple(grids),
        repeats=3,
        limit_s=120,
    )


def quick(most: int | None = None) -> Study:
    """A first look in seconds: a perceptron on the embedded digits, two strategies on 1 … cores workers, once."""
    return Study(
        "quick",
        task={"model": "perceptron", "data": "digits", "optimizer": "sgd(lr=0.1)", "batch_size": 100, "epochs": 20},
        plan={"threads": 1},
        grids=(Grid({"plan.strategy": ("synchronous", "replica_average"), "plan.workers": _workers(most)}),),
        repeats=1,
    )
