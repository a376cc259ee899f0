"""A study as data: what every cell has in common, and the factors that are varied.

    [study]
    name = "scaling"
    repeats = 3
    limit_s = 600                           # no further round of repeats that would end later

    [task]                                  # fields of Task; batch_per_worker in place of batch_size: weak scaling
    model = "cnn"
    data = "auto(limit=4000)"
    epochs = 2

    [plan]                                  # fields of Plan
    threads = 1

    [grid]                                  # every combination of these is a cell
    plan.strategy = ["synchronous", "replica_average"]
    plan.workers = [1, 2]
    task.batch_per_worker = [50, 100]

``[[grid]]``, several times, makes several grids, one after the other. What a grid says goes before ``[task]`` and
``[plan]``; one value may stand without its list. Cells come in the order in which they are written, the last factor
turning fastest, and a cell that comes up twice counts once. Beside its factors a grid may say

    name = "time against nodes"             # by which an analysis finds its cells
    repeats = 1                             # other than the study's
    evaluate = "epoch"                      # likewise
    timed = false                           # its times are for nothing: a disturbed run is not done again
    measure = "noise"                       # not a training but the noise of its update (see gradient_noise)
    measure = "simulate"                    # likewise in virtual time, on ``cluster`` of ``[study]`` (see simulating)

``evaluate`` in ``[study]`` is when runs are evaluated: "end" (the default), "epoch", "never" or every so many steps.
``analysis`` names what is made of the rows: "general", "compare", "compression" or "xin-ma". ``keep = "rows"`` saves
the disk what runs leave there (``runs/``: a checkpoint each); the default is "runs". ``cluster``: what is simulated on,
a ready one's name or a file; the default is this machine's node, as often as needed, over 10 Gbit/s Ethernet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from manyhands.checks import is_positive, is_whole
from manyhands.communication.topology import Mesh
from manyhands.errors import BadInput, UnknownName
from manyhands.plan import Plan
from manyhands.studies import analyses
from manyhands.task import Task, from_table

Value = str | int | float | bool
#: What a cell does: trains, measures the noise of the update that its plan would apply, or trains in virtual time.
Measure = Literal["train", "noise", "simulate"]
MEASURES: tuple[str, ...] = get_args(Measure)

#: Not a field of `Task`: a cell turns it into ``batch_size``, as the global batch is its product with the workers.
PER_WORKER = "batch_per_worker"

TASK_KEYS = (*(f.name for f in dataclasses.fields(Task)), PER_WORKER)
PLAN_KEYS = tuple(f.name for f in dataclasses.fields(Plan))
HEAD = ("name", "repeats", "limit_s", "evaluate", "analysis", "keep", "cluster")
#: What stays of a run beside its row: its folder with the trained model, or nothing.
KEEP = ("runs", "rows")
GRID_HEAD = ("name", "repeats", "measure", "evaluate", "timed")
FACTORS = (*(f"plan.{k}" for k in PLAN_KEYS), *(f"task.{k}" for k in TASK_KEYS))

#: Two ways to say one thing: a factor of one kind takes the place of the other in ``[task]``.
ALTERNATIVES = ({"batch_size", PER_WORKER}, {"epochs", "steps"})


@dataclass(frozen=True)
class Grid:
    """Every combination of its factors' values."""

    factors: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    name: str = ""  # by which an analysis finds its cells; several grids may share one
    repeats: int | None = None  # None: as often as the study says
    measure: Measure = "train"
    evaluate: str | int | None = None  # None: as the study says
    timed: bool = True  # whether anybody reads its times


@dataclass(frozen=True)
class Cell:
    """One task and one plan, as tables of plain values."""

    task: Mapping[str, Value]
    plan: Mapping[str, Value]
    factors: tuple[str, ...] = field(default=(), compare=False)  # what its grid varies, e.g. "plan.workers"
    measure: Measure = "train"
    repeats: int = field(default=1, compare=False)
    grids: tuple[str, ...] = field(default=(), compare=False)  # names of the grids it belongs to
    evaluate: str | int = field(default="end", compare=False)
    timed: bool = field(default=True, compare=False)

    @property
    def id(self) -> str:
        """A folder's name: a few words, then a digest of task and plan. Equal cells of two studies have equal ids."""
        kind = [] if self.measure == "train" else [self.measure]
        text = json.dumps([dict(self.task), dict(self.plan), *kind], sort_keys=True)
        said = [*kind, *(str(self.plan[k]) for k in ("strategy", "workers", "transport") if k in self.plan)]
        words = re.sub(r"[^A-Za-z0-9_]+", "-", "-".join(said)).strip("-")[:60]
        return f"{words or 'cell'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def make(self) -> tuple[Task, Plan]:
        """The task and the plan; raises `BadInput` when there can be no such thing."""
        plan = from_table(Plan, self.plan, "[plan]")
        table = dict(self.task)
        per_worker = table.pop(PER_WORKER, None)
        if per_worker is not None:
            table["batch_size"] = _global_batch(per_worker, plan, table)
        return from_table(Task, table, "[task]"), plan


def _global_batch(per_worker: Value, plan: Plan, table: Mapping[str, Value]) -> int:
    if "batch_size" in table:
        raise BadInput(
            f"batch_size={table['batch_size']!r} and {PER_WORKER}={per_worker!r}: the global batch is said once. "
            "Give one of them."
        )
    if not isinstance(per_worker, int) or not is_whole(per_worker, 1):
        raise BadInput(f"{PER_WORKER}={per_worker!r}: it is a whole number from 1. E.g. {PER_WORKER}=50.")
    workers = plan.mesh.size if isinstance(plan.mesh, Mesh) and plan.workers is None else plan.workers
    if not isinstance(workers, int):
        raise BadInput(
            f"{PER_WORKER}={per_worker} without workers: the global batch is their product. Say plan.workers, too."
        )
    return per_worker * workers


@dataclass(frozen=True)
class Study:
    """Grids with a name, and how often each cell is measured. `parse` reads back what `to_toml` writes."""

    name: str
    task: Mapping[str, Value] = field(default_factory=dict)
    plan: Mapping[str, Value] = field(default_factory=dict)
    grids: tuple[Grid, ...] = ()
    repeats: int = 3
    limit_s: float | None = None  # no further round of repeats begins that would end later than this
    evaluate: str | int = "end"
    analysis: str = "general"
    keep: str = "runs"
    cluster: str = ""  # of what is simulated

    def __post_init__(self) -> None:
        if not str(self.name).strip() or type(self.name) is not str:
            raise BadInput(f'name={self.name!r} in [study]: it is a text. E.g. name = "scaling".')
        if not is_whole(self.repeats, 1):
            raise BadInput(f"repeats={self.repeats!r} in [study]: it is a whole number from 1. E.g. repeats = 3.")
        if self.limit_s is not None and not is_positive(self.limit_s):
            raise BadInput(
                f"limit_s={self.limit_s!r} in [study]: it is a positive number of seconds. E.g. limit_s = 600."
            )
        _check("[task]", self.task, TASK_KEYS, self.task.values())
        _check("[plan]", self.plan, PLAN_KEYS, self.plan.values())
        _check_evaluate("[study]", self.evaluate)
        if self.analysis not in analyses:
            raise UnknownName("analysis", str(self.analysis), analyses)
        if self.keep not in KEEP:
            raise UnknownName("keep in [study]", str(self.keep), KEEP)
        if type(self.cluster) is not str:
            raise BadInput(
                f'cluster={self.cluster!r} in [study]: it is a name or a file. E.g. cluster = "ethernet_1g".'
            )
        for grid in self.grids:
            if grid.repeats is not None and not is_whole(grid.repeats, 1):
                raise BadInput(f"repeats={grid.repeats!r} in [grid]: it is a whole number from 1. E.g. repeats = 3.")
            if type(grid.timed) is not bool:
                raise BadInput(f"timed={grid.timed!r} in [grid]: it is true or false.")
            if grid.evaluate is not None:
                _check_evaluate("[grid]", grid.evaluate)
            if type(grid.name) is not str:
                raise BadInput(f'name={grid.name!r} in [grid]: it is a text. E.g. name = "speed".')
            if grid.measure not in MEASURES:
                raise UnknownName("measure in [grid]", str(grid.measure), MEASURES)
            _check("[grid]", grid.factors, FACTORS, itertools.chain.from_iterable(grid.factors.values()))
            for factor, values in grid.factors.items():
                if not values:
                    raise BadInput(
                        f"{factor} = [] in [grid]: a factor has at least one value. Name one, or leave {factor} out."
                    )

    def cells(self) -> list[Cell]:
        """Every cell once, in the order written."""
        found: dict[str, Cell] = {}
        for grid in self.grids or (Grid(),):
            names = (grid.name,) if grid.name else ()
            for values in itertools.product(*grid.factors.values()):
                said = dict(zip(grid.factors, values, strict=True))
                cell = Cell(
                    over(self.task, {k.removeprefix("task."): v for k, v in said.items() if k.startswith("task.")}),
                    over(self.plan, {k.removeprefix("plan."): v for k, v in said.items() if k.startswith("plan.")}),
                    tuple(grid.factors),
                    grid.measure,
                    self.repeats if grid.repeats is None else grid.repeats,
                    names,
                    self.evaluate if grid.evaluate is None else grid.evaluate,
                    grid.timed,
                )
                found[cell.id] = _joined(found[cell.id], cell) if cell.id in found else cell
        return list(found.values())

    def to_toml(self) -> str:
        """The study as a file."""
        import tomli_w

        head: dict[str, Value] = {"name": self.name, "repeats": self.repeats}
        if self.limit_s is not None:
            head["limit_s"] = self.limit_s
        if self.evaluate != "end":
            head["evaluate"] = self.evaluate
        if self.analysis != "general":
            head["analysis"] = self.analysis
        if self.keep != "runs":
            head["keep"] = self.keep
        if self.cluster:
            head["cluster"] = self.cluster
        grids = [_table(grid) for grid in self.grids]
        tables = {"study": head, "task": dict(self.task), "plan": dict(self.plan), "grid": grids}
        return tomli_w.dumps({k: v for k, v in tables.items() if v})


def _check_evaluate(where: str, evaluate: object) -> None:
    if evaluate not in ("end", "epoch", "never") and not is_whole(evaluate, 1):
        raise BadInput(f"evaluate={evaluate!r} in {where}: it is end, epoch, never, or a whole number of steps from 1.")


def _often(evaluate: str | int) -> tuple[int, int]:
    """Sorts evaluations by what they tell: never, end, epoch, every so many steps."""
    return (3, -evaluate) if isinstance(evaluate, int) else (("never", "end", "epoch").index(evaluate), 0)


def _joined(first: Cell, again: Cell) -> Cell:
    """One cell for two grids: measured and evaluated as often as the more demanding of them asks."""
    return dataclasses.replace(
        first,
        factors=tuple(dict.fromkeys((*first.factors, *again.factors))),
        repeats=max(first.repeats, again.repeats),
        grids=tuple(dict.fromkeys((*first.grids, *again.grids))),
        evaluate=max(first.evaluate, again.evaluate, key=_often),
        timed=first.timed or again.timed,
    )


def _table(grid: Grid) -> dict[str, Any]:
    default = Grid()
    head = {k: getattr(grid, k) for k in GRID_HEAD if getattr(grid, k) != getattr(default, k)}
    return head | {factor: list(values) for factor, values in grid.factors.items()}


def over(base: Mapping[str, Value], said: Mapping[str, Value]) -> dict[str, Value]:
    """``base`` but for what is ``said``, and for what that takes the place of."""
    replaced = with_alternatives(said)
    return {k: v for k, v in base.items() if k not in replaced} | dict(said)


def with_alternatives(said: Iterable[str]) -> set[str]:
    """Keys of ``[task]`` that give way to ``said``."""
    keys = set(said)
    return keys.union(*(pair for pair in ALTERNATIVES if pair & keys))


def _check(where: str, table: Mapping[str, Any], known: Iterable[str], values: Iterable[Any]) -> None:
    for key in table:
        if key not in known:
            also = f"A grid may also say {', '.join(GRID_HEAD)}." if where == "[grid]" else ""
            raise UnknownName(f"factor in {where}" if where == "[grid]" else f"key in {where}", key, known, also=also)
    for value in values:
        if not isinstance(value, str | int | float):
            raise BadInput(f"{where} holds {value!r}: a value is a text, a number, true or false.")


def parse(text: str, *, name: str = "study", where: str = "the study") -> Study:
    """A study from TOML; ``name`` is what it is called when the text does not say."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise BadInput(f"{where} is not TOML: {e}.") from None
    for key in table:
        if key not in ("study", "task", "plan", "grid"):
            raise UnknownName(f"table in {where}", key, ("study", "task", "plan", "grid"))
    grids = table.pop("grid", [])
    grids = grids if isinstance(grids, list) else [grids]
    for part in [*table.values(), *grids]:
        if not isinstance(part, dict):
            raise BadInput(f"{where} says {part!r} where a table is expected: [study], [task], [plan], [grid].")
    head = table.get("study", {})
    for key in head:
        if key not in HEAD:
            raise UnknownName("key in [study]", key, HEAD)
    return Study(
        name=head.get("name", name),
        task=table.get("task", {}),
        plan=table.get("plan", {}),
        grids=tuple(_grid(grid) for grid in grids),
        **{k: v for k, v in head.items() if k != "name"},
    )


def _grid(table: Mapping[str, Any]) -> Grid:
    head = {k: v for k, v in table.items() if k in GRID_HEAD}
    return Grid(_factors({k: v for k, v in table.items() if k not in GRID_HEAD}), **head)


def _factors(grid: Mapping[str, Any]) -> dict[str, tuple[Value, ...]]:
    """``plan.workers = [1, 2]``, with or without quotes about the key; the order is that of the file."""
    found: dict[str, tuple[Value, ...]] = {}
    for key, value in grid.items():
        inner = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        for factor, values in inner.items():
            if factor in found:
                raise BadInput(f"{factor} stands twice in one [grid]: a factor is said once. Join the two lists.")
            found[factor] = tuple(values) if isinstance(values, list) else (values,)
    return found
