"""The built-in studies. Each suits the machine it is made for: workers go from one to one a core."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from manyhands.communication import futex
from manyhands.consistency import strategies
from manyhands.errors import ManyhandsError
from manyhands.studies.grid import ALTERNATIVES, PER_WORKER, Grid, Study, Value

Factors = dict[str, tuple[Value, ...]]

#: How often `compare` looks at each run on its way, so that times to a target can be told.
LOOKS = 10


def worker_counts(most: int) -> tuple[int, ...]:
    """1, 2, 4 … and ``most``.

    >>> worker_counts(6)
    (1, 2, 4, 6)
    """
    return (*(2**i for i in range(most.bit_length()) if 2**i < most), most)


def _workers(most: int | None) -> tuple[int, ...]:
    """To one a core; to 2 where there is one core, so that every strategy is seen at work."""
    return worker_counts(most or max(futex.cores(), 2))


def default(most: int | None = None, *, quick: bool = False) -> Study:
    """One network under every strategy on 2 … cores workers, real images, and what threads and gloo make of it.

    The convolutional network of the 2018 slides goes twice over 4,000 images of MNIST: enough for some 93 % right and
    for steps long enough that parallelism pays, and short enough for three rounds (two or one where the machine is
    busy). One process stands beside them, with one thread and with all cores as torch does, because that is what a user
    has without this library. Plain SGD at a rate that all strategies bear: with momentum 0.9 at 0.05, which suits
    lock-step, `asynchronous` and `downpour` learn nothing. ``quick``: 1,000 images once, and one round.
    """
    cores, workers = futex.cores(), _few(_workers(most))
    images, epochs = (1000, 1) if quick else (4000, 2)
    many = tuple(count for count in workers if count > 1)
    grids = [Grid(_one_process((1, cores) if cores > 1 else (1,)))]
    if many:
        grids.append(Grid({"plan.strategy": COMPARED, "plan.workers": many}))
        transports = ("threads", "gloo")
        grids.append(Grid({"plan.strategy": ("synchronous",), "plan.transport": transports, "plan.workers": many}))
    return Study(
        "default",
        task={
            "model": "cnn",
            "data": f"auto(limit={images})",
            "optimizer": "sgd(lr=0.15)",
            "batch_size": 100,
            "epochs": epochs,
        },
        plan={"threads": 1},
        grids=tuple(grids),
        repeats=1 if quick else 3,
        limit_s=150,
        evaluate="epoch",
    )


def _one_process(threads: tuple[int, ...]) -> Factors:
    """Under one strategy only, as it is plain SGD under each."""
    return {"plan.strategy": ("synchronous",), "plan.workers": (1,), "plan.threads": threads}


def quick(most: int | None = None) -> Study:
    """A first look in seconds: a perceptron on the embedded digits, two strategies on 1 … cores workers, once."""
    return Study(
        "quick",
        task={"model": "perceptron", "data": "digits", "optimizer": "sgd(lr=0.1)", "batch_size": 100, "epochs": 20},
        plan={"threads": 1},
        grids=(Grid({"plan.strategy": ("synchronous", "replica_average"), "plan.workers": _workers(most)}),),
        repeats=1,
        evaluate="epoch",
    )


def compare(most: int | None = None, *, quick: bool = False, task: Mapping[str, Value] | None = None) -> Study:
    """Which plan to use for a model and data: every strategy on 2 … cores workers beside one process of all threads.

    ``task`` is what a user says of the task, in place of what stands here (a perceptron on the embedded digits); a
    batch size or a seed said there is the only one. Else there are two batch sizes and two seeds, ``quick`` one of
    each and one round. The workers of a plan share the cores: each has cores / workers threads. One process stands
    under one strategy only, as it is plain SGD under each. Each run is looked at some `LOOKS` times on its way.
    """
    cores, workers = futex.cores(), _few(_workers(most))
    said = dict(task or {})
    table = _without_alternatives(
        {"model": "perceptron", "data": "digits", "optimizer": "sgd(lr=0.1)", "epochs": LOOKS}, said
    )
    batch_key = PER_WORKER if PER_WORKER in table else "batch_size"
    batches = (table.pop(batch_key),) if batch_key in table else (100,) if quick else (50, 200)
    seeds = (table.pop("seed"),) if "seed" in table else (0,) if quick else (0, 1)
    grids = []
    for batch in batches:
        of_task: Factors = {f"task.{batch_key}": (batch,), "task.seed": seeds}
        evaluate = _looks(table, batch if batch_key == "batch_size" else None)
        one = _one_process(_few(worker_counts(cores)))
        grids.append(Grid({**of_task, **one}, "one process", evaluate=evaluate))
        many = tuple(count for count in workers if count > 1)
        if many:
            plans: Factors = {"plan.strategy": COMPARED, "plan.workers": many}
            grids.append(Grid({**of_task, **plans}, "several workers", evaluate=evaluate))
    return Study(
        "compare",
        task=table,
        plan={"threads": 0},
        grids=tuple(grids),
        repeats=1 if quick else 3,
        limit_s=150,
        evaluate="epoch",
        analysis="compare",
    )


def _few(counts: tuple[int, ...], most: int = 4) -> tuple[int, ...]:
    """At most so many of them, the first and the last among these.

    >>> _few((1, 2, 4, 8, 16, 32, 64))
    (1, 4, 16, 64)
    """
    if len(counts) <= most:
        return counts
    return tuple(counts[round(i * (len(counts) - 1) / (most - 1))] for i in range(most))


def _without_alternatives(table: Mapping[str, Value], said: Mapping[str, Value]) -> dict[str, Value]:
    """``said`` before ``table``, key by key; steps in the place of epochs."""
    ousted = {key for pair in ALTERNATIVES if pair & said.keys() for key in pair}
    return {key: value for key, value in table.items() if key not in ousted} | dict(said)


def _looks(table: Mapping[str, Value], batch: Value | None) -> str | int:
    """When to evaluate, so that there are some `LOOKS` records: after each epoch, or every so many steps.

    Few epochs are divided where the number of samples can be known for little: of the embedded digits, and of data of
    one's own, which each run loads anyway. What cannot be loaded is refused by its runs.
    """
    steps, epochs = table.get("steps"), table.get("epochs", 1)
    if isinstance(steps, int):
        return max(1, steps // LOOKS)
    if not isinstance(epochs, int) or epochs > LOOKS // 2 or not isinstance(batch, int) or batch < 1:
        return "epoch"
    data = str(table.get("data", ""))
    if not (":" in data or data.startswith("digits")):
        return "epoch"
    from manyhands import data as data_sets

    try:
        samples = len(data_sets.load(data).train)
    except ManyhandsError:
        return "epoch"
    return max(1, epochs * -(-samples // batch) // LOOKS)


#: Strategies that learn from small batches at a rate that suits the others. `sandblaster` wants all data in a batch: in
#: the task of `spectrum` its training loss passes 1e5, where that of `synchronous` comes to 1.
COMPARED = tuple(name for name in strategies if name != "sandblaster")

#: Of a strategy what `spectrum` shows instead of its defaults, or beside them.
SHOWN: Mapping[str, tuple[str, ...]] = {
    "synchronous": ("synchronous", "synchronous(aggregate=median)"),
    "backup_workers": ("backup_workers", "backup_workers(backups=0, aggregate=median)"),
    "elastic": ("elastic", "elastic(mode='round_robin')", "elastic(momentum=0.9)"),
    "downpour": ("downpour(fetch=4, push=4)",),  # at every step it is asynchronous
    "gossip": ("gossip(graph='one_peer')",),
}


def spectrum(most: int | None = None, *, quick: bool = False) -> Study:
    """Every strategy once, from lock-step to lock-free: what agreeing costs on 2 workers, and whether they still learn.

    A perceptron goes three times over MNIST with plain SGD, so that no strategy has a state to lose, at one learning
    rate for all that are `COMPARED`. Three seeds, each under all strategies before the next; one process stands beside
    them. ``most`` is the number of workers. ``quick``: one seed, once over 10,000 images.
    """
    workers = most or 2
    shown = tuple(itertools.chain.from_iterable(SHOWN.get(name, (name,)) for name in COMPARED))
    grids = []
    for seed in (0,) if quick else (0, 1, 2):
        of_task: Factors = {"task.seed": (seed,)}
        grids.append(Grid({**of_task, **_one_process((1,))}, "one process"))
        if workers > 1:
            grids.append(Grid({**of_task, "plan.strategy": shown, "plan.workers": (workers,)}, "several workers"))
    return Study(
        "spectrum",
        task={
            "model": "perceptron(hidden=50)",
            "data": "auto(limit=10000)" if quick else "auto",
            "optimizer": "sgd(lr=0.1)",
            "batch_size": 100,
            "epochs": 1 if quick else 3,
        },
        plan={"threads": 1},
        grids=tuple(grids),
        repeats=1,
        evaluate="epoch",
        keep="rows",
    )


def scaling(most: int | None = None, *, quick: bool = False) -> Study:
    """How synchronous training scales on each transport: the same batch divided, and a batch for each worker.

    Strong scaling is what Amdahl's law speaks of, weak scaling what Gustafson's does; both want two counts above one
    worker, and the universal law four in all, so that a machine of four cores or more gets its answer. ``quick``:
    shared memory alone, fewer steps, and two rounds, without which no law has an interval.
    """
    most_workers = max(_workers(most))
    workers = tuple(sorted({*range(1, min(most_workers, 4) + 1), *worker_counts(most_workers)}))
    many = workers[1:]
    grids = []
    batches: dict[str, Factors] = {
        "strong scaling": {"task.batch_size": (240,)},
        "weak scaling": {"task.batch_per_worker": (60,)},
    }
    for name, batch in batches.items():
        said: Factors = {**batch, "plan.strategy": ("synchronous",)}
        grids.append(Grid({**said, "plan.workers": workers}, name))
        if many and not quick:
            grids.append(Grid({**said, "plan.transport": ("threads", "gloo"), "plan.workers": many}, name))
    return Study(
        "scaling",
        task={
            "model": "cnn",
            "data": "auto(limit=4000)",
            "optimizer": "sgd(lr=0.05, momentum=0.9)",
            "steps": 20 if quick else 40,
        },
        plan={"threads": 1},
        grids=tuple(grids),
        repeats=2 if quick else 3,
        limit_s=150,
    )
