"""A study's cells as they were decided for this machine, before anything is started, and what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manyhands import verbs
from manyhands.cluster import Cluster
from manyhands.errors import BadInput
from manyhands.plan import Plan
from manyhands.studies.grid import Cell, Value
from manyhands.studies.summary import called
from manyhands.task import Task

#: Factors that a cell's name tells anyway.
TOLD = ("plan.strategy", "plan.workers", "plan.threads", "plan.transport")


@dataclass(frozen=True)
class Planned:
    """A cell as it was decided for this machine, or why it cannot work."""

    cell: Cell
    task: Task | None = None
    plan: Plan | None = None
    refused: str = ""


def planned(cell: Cell, cluster: Cluster | None = None) -> Planned:
    """Every ``auto`` decided, for this machine or for a ``cluster`` that is simulated."""
    try:
        task, plan = cell.make()
        nodes = None if cluster is None else cluster.nodes_for(plan.workers or 1)
        return Planned(cell, task, verbs.resolved(task, plan, nodes=nodes).plan)
    except BadInput as e:
        return Planned(cell, refused=str(e))


def names(cells: Sequence[Planned]) -> dict[str, str]:
    """By cell, how progress and estimates call it: its plan, and what else varies within its grid."""
    grids: dict[str, list[Planned]] = {}
    for each in cells:
        grids.setdefault((each.cell.grids or ("",))[0], []).append(each)
    return {each.cell.id: _name(each, _varying(grid)) for grid in grids.values() for each in grid}


def _name(each: Planned, varying: Sequence[str]) -> str:
    cell, plan = each.cell, each.plan
    said = [called(cell, plan.workers, plan.threads, plan.transport) if plan else called(cell, None, None, None)]
    told = TOLD if plan else TOLD[:1]
    values = {factor: _value(cell, factor) for factor in varying if factor not in told}
    said += [f"{factor.partition('.')[2]}={value}" for factor, value in values.items() if value is not None]
    return ", ".join(said + ([cell.measure] if cell.measure != "train" else []))


def _varying(cells: Sequence[Planned]) -> list[str]:
    factors = dict.fromkeys(factor for each in cells for factor in each.cell.factors)
    return [factor for factor in factors if len({_value(each.cell, factor) for each in cells}) > 1]


def _value(cell: Cell, factor: str) -> Value | None:
    kind, _, key = factor.partition(".")
    return (cell.task if kind == "task" else cell.plan).get(key)
