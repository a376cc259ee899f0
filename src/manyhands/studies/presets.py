"""The built-in studies. Each suits the machine it is made for: workers go from one to one a core."""

from __future__ import annotations

from manyhands.communication import futex
from manyhands.consistency import strategies
from manyhands.studies.grid import Study


def worker_counts(cores: int) -> tuple[int, ...]:
    """1, 2, 4 … and all cores; 2 also where there is one core, so that every strategy is seen at work.

    >>> worker_counts(6)
    (1, 2, 4, 6)
    """
    most = max(cores, 2)
    return (*(2**i for i in range(most.bit_length()) if 2**i < most), most)


def default(cores: int | None = None) -> Study:
    """One network under every strategy on 1 … cores workers, real images, and what threads and gloo make of it.

    The convolutional network of the 2018 slides learns 4,000 images of MNIST twice over: enough for some 95 % right
    and for steps long enough that parallelism pays, and short enough for three rounds. A single process that uses all
    cores as torch does stands beside them, because that is what a user has without this library.
    """
    cores = cores or futex.cores()
    workers = worker_counts(cores)
    grids: list[dict[str, tuple[str | int | float | bool, ...]]] = [
        {"plan.strategy": tuple(strategies), "plan.workers": workers},
        {"plan.strategy": ("synchronous",), "plan.transport": ("threads", "gloo"), "plan.workers": workers[1:]},
    ]
    if cores > 1:
        grids.append({"plan.strategy": ("synchronous",), "plan.workers": (1,), "plan.threads": (cores,)})
    return Study(
        "default",
        task={
            "model": "cnn",
            "data": "auto(limit=4000)",
            "optimizer": "sgd(lr=0.05, momentum=0.9)",
            "batch_size": 100,
            "epochs": 2,
        },
        plan={"threads": 1},
        grids=tuple(grids),
        repeats=3,
    )


def quick(cores: int | None = None) -> Study:
    """A first look in seconds: a perceptron on the embedded digits, two strategies on 1 … cores workers, once."""
    return Study(
        "quick",
        task={"model": "perceptron", "data": "digits", "optimizer": "sgd(lr=0.1)", "batch_size": 100, "epochs": 10},
        plan={"threads": 1},
        grids=(
            {
                "plan.strategy": ("synchronous", "replica_average"),
                "plan.workers": worker_counts(cores or futex.cores()),
            },
        ),
        repeats=1,
    )
