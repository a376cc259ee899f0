"""A study's row: what became of one run, and how that lies in a table, a column for each figure."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from manyhands.contract import Measurement, Spread, StepParts
from manyhands.studies.grid import Measure

Status = Literal["done", "refused", "failed"]


@dataclass(frozen=True)
class Row:
    """What became of one run: its measurement, or why there is none."""

    study: str
    cell: str
    repeat: int
    status: Status
    task: dict[str, Any]
    plan: dict[str, Any]  # as asked
    workers: int | None  # as decided, None where nothing was
    threads: int | None
    transport: str | None
    cores: int
    host: str
    processor: str
    started_at: str
    seconds: float  # from start to end: workers started, data loaded, model evaluated
    load_average: float  # of the minute before the start
    measure: Measure = "train"
    reason: str = ""
    traceback: str = ""
    disturbance: float | None = None  # the calibration loop about this run over the study's quickest, see calibration
    noisy: bool = False  # that is beyond the bound, also when the run was repeated
    attempts: int = 1
    history: list[dict[str, Any]] = field(default_factory=list)  # see training.conclusion.record
    noise: dict[str, float] | None = None  # of a noise cell, see gradient_noise.Noise
    predicted_step_s: float | None = None  # the median step as it was predicted before the run
    prediction_error: float | None = None  # the error bar of that, relative
    unpredicted: str = ""  # why there is no prediction
    simulated_on: str = ""  # of a simulated run: the cluster, and where its costs come from
    measurement: Measurement | None = field(default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return dataclasses.asdict(self)


def _measured() -> dict[str, tuple[tuple[str, ...], Any]]:
    """Column → where its figure lies in a measurement, and the type: ``step_s`` becomes ``measured_step_s_median`` …"""
    found: dict[str, tuple[tuple[str, ...], Any]] = {}
    for name, hint in get_type_hints(Measurement).items():
        inner = get_type_hints(hint) if hint in (Spread, StepParts) else {}
        for key, kind in inner.items():
            found[f"measured_{name}_{key}"] = (name, key), kind
        if not inner:
            found[f"measured_{name}"] = (name,), hint
    return found


def _sql_type(hint: Any) -> str:
    text = str(hint)
    if _is_json(hint):
        return "TEXT"
    return "REAL" if "float" in text else "INTEGER" if "int" in text or "bool" in text else "TEXT"


def _is_json(hint: Any) -> bool:
    """Whether a column holds a table or a list, as JSON."""
    return "dict" in str(hint) or "list" in str(hint)


# Names of columns come from our own classes; values go in as parameters only.
_OWN = {name: hint for name, hint in get_type_hints(Row).items() if name != "measurement"}
_MEASURED = _measured()
COLUMNS = {**_OWN, **{name: hint for name, (_, hint) in _MEASURED.items()}}
CREATE = (
    "CREATE TABLE rows ("
    + ", ".join(f"{name} {_sql_type(hint)}" for name, hint in COLUMNS.items())
    + ", PRIMARY KEY (cell, repeat))"
)
INSERT = f"INSERT OR REPLACE INTO rows VALUES ({', '.join('?' * len(COLUMNS))})"


def flat(row: Row) -> dict[str, Any]:
    """``row`` by column, tables as JSON."""
    table = row.as_dict()
    measured = table.pop("measurement")
    for column, (path, _) in _MEASURED.items():
        table[column] = None if measured is None else functools.reduce(operator.getitem, path, measured)
    return {k: json.dumps(v) if isinstance(v, Mapping | list) else v for k, v in table.items()}


def _read(value: Any, hint: Any) -> Any:
    if value is None:
        return None
    return json.loads(value) if _is_json(hint) else bool(value) if hint is bool else value


def row_of(values: tuple[Any, ...]) -> Row:
    """What `flat` was made of."""
    table = {name: _read(value, hint) for (name, hint), value in zip(COLUMNS.items(), values, strict=True)}
    measured: dict[str, Any] = {}
    for column, (path, _) in _MEASURED.items():
        value = table.pop(column)
        if len(path) == 1:
            measured[path[0]] = value
        else:
            measured.setdefault(path[0], {})[path[1]] = value
    if measured["steps"] is None:
        return Row(**table)
    measured |= {"step_s": Spread(**measured["step_s"]), "step_parts_s": StepParts(**measured["step_parts_s"])}
    return Row(**table, measurement=Measurement(**measured))
