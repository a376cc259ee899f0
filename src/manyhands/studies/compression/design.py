"""Which runs the study makes: each compressor at its recommended setting, once, beside dense exchange.

    image    the convolutional network on MNIST, one epoch
    text     (full form) the character transformer on Tiny Shakespeare

All runs of a task begin with the same parameters and see the same batches. They run on shared memory, where nothing is
sent: what a link would take is computed afterwards (`report`).
"""

from __future__ import annotations

from manyhands.studies.compression.settings import SETTINGS, Settings
from manyhands.studies.grid import Grid, Study, Value

#: Names of the grids, by the task in `SETTINGS`.
TASKS = {"cnn": "image", "gpt": "text"}
#: How often a run is evaluated, in steps.
LOOK = {"cnn": 100, "gpt": 50}
QUICK_LOOK = 20
WORKERS = 2


def compression(most: int | None = None, *, quick: bool = False) -> Study:
    """Accuracy against bytes, and against time on a slow link, under every compressor; 2 workers.

    ``most`` is the number of workers. ``quick``: the images only, 10,000 of them.
    """
    looks = {"cnn": QUICK_LOOK} if quick else LOOK
    grids = [grid for name, look in looks.items() for grid in _grids(name, SETTINGS[name], most or WORKERS, look)]
    return Study(
        "compression",
        task={**SETTINGS["cnn"].task, **({"data": "mnist(limit=10000)"} if quick else {}), "seed": 1},
        plan={"threads": 1, "strategy": "synchronous"},
        grids=tuple(grids),
        repeats=1,
        evaluate="epoch",
        analysis="compression",
        keep="rows",
    )


def _grids(name: str, of: Settings, workers: int, look: int) -> list[Grid]:
    """One for each optimizer."""
    said: dict[str, tuple[Value, ...]] = {}
    if name != "cnn":
        said = {f"task.{key}": (value,) for key, value in of.task.items()}
    found = []
    for optimizer in dict.fromkeys(setting.optimizer for setting in of.settings):
        texts = tuple(s.compress for s in of.settings if s.optimizer == optimizer)
        factors = {**said, "task.optimizer": (optimizer,), "plan.compress": texts, "plan.workers": (workers,)}
        found.append(Grid(factors, TASKS[name], evaluate=look))
    return found
