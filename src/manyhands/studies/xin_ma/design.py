"""Which runs the study makes: one factor at a time round a centre, not the product of all factors.

    centre                   U1, two nodes, batch 100 a node, shared memory
    time against nodes       each variant at 1 and 2 nodes; gloo and MPI at the centre; no evaluation, repeats
    time against batch       batch 50 … 200 a node at 1 and 2 nodes; repeats
    accuracy against batch   one node, batch 50 … 200: as many samples for each, and as many updates for each; seeds
    accuracy against nodes   U1 with 1 … 8 nodes at batch 50 and 200, as many updates for each; seeds
    noise                    variance of one update at 1 … 8 nodes under each variant
    learning                 (full form) the CNN trained out on two nodes, by synchronous and by U1s

Time at more nodes than cores would say nothing; accuracy does not depend on how fast it was reached. One node is plain
SGD under every variant, so it is measured once. Accuracy repeats by seed and not by round: equal seeds give equal bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from manyhands.studies.grid import Grid, Study
from manyhands.studies.xin_ma import ANN_10, ANN_50, ANN_50_CE, BATCHES, CNN, CNN_SQUARED, VARIANTS, Setting, Variant

U1 = VARIANTS[0]
CENTRE_BATCH = 100
NODES_FOR_TIME = (1, 2)
NODES_FOR_ACCURACY = (1, 2, 4, 8)
#: The batches between which conclusions (b) and (c) differ.
SMALL, LARGE = BATCHES[0], BATCHES[-1]
#: The noise is measured after so many trainings, so that its interval is one over trainings.
NOISE_SEEDS = (0, 1, 2)
LEARNING_OPTIMIZER = "sgd(lr=0.05, momentum=0.9)"

TIME_NODES, TIME_BATCH = "time against nodes", "time against batch"
SAMPLES, UPDATES = "accuracy against batch, equal samples", "accuracy against batch, equal updates"
ACCURACY_NODES, NOISE, LEARNING = "accuracy against nodes", "noise of an update", "learning"


@dataclass(frozen=True)
class Size:
    """How much is done of everything."""

    data: str
    seeds: int
    repeats: int
    timed_steps: dict[str, int]  # by model
    epochs: dict[str, int]  # for equal samples
    updates: dict[str, int]  # for equal updates
    batch_settings: tuple[Setting, ...]
    node_settings: tuple[Setting, ...]
    noise_settings: tuple[Setting, ...]
    learning_epochs: int


_ANN_10, _ANN_50, _CNN = ANN_10.model, ANN_50.model, CNN.model
QUICK = Size(
    data="mnist(limit=6000)",
    seeds=2,
    repeats=3,
    timed_steps={_ANN_50: 200, _CNN: 30},
    epochs={_ANN_10: 3, _ANN_50: 3, _CNN: 2},
    updates={_ANN_10: 300, _ANN_50: 300, _CNN: 120},
    batch_settings=(ANN_10, ANN_50, ANN_50_CE, CNN),
    node_settings=(ANN_50, ANN_50_CE),
    noise_settings=(ANN_50_CE,),
    learning_epochs=0,
)
FULL = Size(
    data="mnist",
    seeds=5,
    repeats=5,
    timed_steps={_ANN_50: 500, _CNN: 60},
    epochs={_ANN_10: 3, _ANN_50: 3, _CNN: 1},
    updates={_ANN_10: 1200, _ANN_50: 1200, _CNN: 300},
    batch_settings=(ANN_10, ANN_50, ANN_50_CE, CNN, CNN_SQUARED),
    node_settings=(ANN_50, ANN_50_CE, CNN),
    noise_settings=(ANN_50_CE, CNN),
    learning_epochs=8,
)


def xin_ma(most: int | None = None, *, quick: bool = False) -> Study:
    """The study; ``most``: at most so many nodes."""
    size = QUICK if quick else FULL
    grids = [
        *_time(size),
        *_accuracy(size),
        *_noise(size),
        *(_learning(size) if size.learning_epochs else ()),
    ]
    kept = [grid for grid in grids if most is None or grid.factors["plan.workers"][0] <= most]
    return Study(
        "xin-ma",
        task={"data": size.data},
        plan={"threads": 1},
        grids=tuple(kept),
        repeats=size.repeats,
        evaluate="end",
        analysis="xin-ma",
    )


def _cell(
    name: str,
    setting: Setting,
    variant: Variant,
    nodes: int,
    batch: int,
    transport: str | None = None,
    *,
    task: dict[str, Any] | None = None,
    **head: Any,
) -> Grid:
    size = {"batch_per_worker": batch} if variant.own_batch else {"batch_size": batch}
    told = setting.task(nodes, own_batch=variant.own_batch) | size | (task or {})
    plan = {"strategy": variant.strategy, "workers": nodes} | ({"transport": transport} if transport else {})
    factors = {f"task.{k}": v if isinstance(v, tuple) else (v,) for k, v in told.items()}
    factors |= {f"plan.{k}": (v,) for k, v in plan.items()}
    return Grid(factors, name, **head)


def _time(size: Size) -> Iterator[Grid]:
    for setting in (CNN, ANN_50):
        task = {"steps": size.timed_steps[setting.model]}
        for variant in VARIANTS:
            yield _cell(TIME_NODES, setting, variant, 2, CENTRE_BATCH, task=task, evaluate="never")
        yield _cell(TIME_NODES, setting, U1, 1, CENTRE_BATCH, task=task, evaluate="never")
        for transport in ("gloo", "mpi"):
            yield _cell(TIME_NODES, setting, U1, 2, CENTRE_BATCH, transport, task=task, evaluate="never")
        for nodes in NODES_FOR_TIME:
            for batch in BATCHES:
                yield _cell(TIME_BATCH, setting, U1, nodes, batch, task=task, evaluate="never")


def _accuracy(size: Size) -> Iterator[Grid]:
    seeds = {"seed": tuple(range(size.seeds))}
    for setting in size.batch_settings:
        for batch in BATCHES:
            by_samples = {"epochs": size.epochs[setting.model], **seeds}
            yield _cell(SAMPLES, setting, U1, 1, batch, task=by_samples, repeats=1, timed=False)
            by_updates = {"steps": size.updates[setting.model], **seeds}
            yield _cell(UPDATES, setting, U1, 1, batch, task=by_updates, repeats=1, timed=False)
    for setting in size.node_settings:
        task = {"steps": size.updates[setting.model], **seeds}
        for nodes in NODES_FOR_ACCURACY:
            for batch in (SMALL, LARGE):
                yield _cell(ACCURACY_NODES, setting, U1, nodes, batch, task=task, repeats=1, timed=False)


def _noise(size: Size) -> Iterator[Grid]:
    for setting in size.noise_settings:
        task = {"steps": size.updates[setting.model], "seed": NOISE_SEEDS}
        yield _cell(NOISE, setting, U1, 1, SMALL, task=task, repeats=1, measure="noise")
        for variant in VARIANTS:
            for nodes in NODES_FOR_ACCURACY[1:]:
                yield _cell(NOISE, setting, variant, nodes, SMALL, task=task, repeats=1, measure="noise")


def _learning(size: Size) -> Iterator[Grid]:
    """What the slides' CNN can do when it is trained out; the learning rate falls over the run."""
    task = {
        "optimizer": LEARNING_OPTIMIZER,
        "schedule": "cosine",
        "epochs": size.learning_epochs,
        "seed": (0, 1),
    }
    for strategy in ("synchronous", U1.strategy):
        shown = Variant(strategy, strategy, False, "")
        yield _cell(LEARNING, CNN, shown, 2, CENTRE_BATCH, task=task, repeats=1, evaluate="epoch", timed=False)
