"""The tables under [measured] of a cluster file: read with every number checked, and written, a line a curve.

    [measured]
    when = "2026-11-21T19:00:00Z"
    [measured.host]                   # plain values
    cores = 2
    [measured.curves]                 # by transport, operation and ranks
    shared.all_reduce.2 = { unit = "s", sizes_B = [64, 4096], times = [1.1e-05, 1.5e-05], spread = [0.02, 0.01] }
    [measured.operators]
    unit = "s"
    columns = ["name", "phase", …]
    rows = [
      ["addmm", "forward", …],
    ]

A time may be in any unit of time. A rate that no memory has (`FASTEST_BPS`) is refused: it is a time in the wrong unit.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import tomli_w

from manyhands.cluster.figure import UNITS, Plausible
from manyhands.cluster.measured import COMMON_GATHER, OPERATIONS, REREAD, TRANSPORTS, Curve, Measured, OperatorTime

#: Refuses an entry: where it stands, and why.
Refuse = Callable[[tuple[str, ...], str], NoReturn]
#: Refuses entries of a table that are not among these names: table, names, where it stands.
Only = Callable[[Mapping[str, Any], Any, tuple[str, ...]], None]

_ROOT = ("measured",)
_TIME = Plausible("the time of an operation", "time", 1e-9, 1e4, "12 us")
_SIZE = Plausible("the size of a tensor", "size", 0, 1e13, "4096 B")
#: Ten times what the fastest memory of an accelerator moves.
FASTEST_BPS = 1e14
#: Of a few bytes a rank may have all it needs before the last rank comes, and time counts from then.
SHORTEST_S = 1e-8
#: Of these no time follows from the bytes: nothing may move, or nothing may be lost.
_WITHOUT_RATE = ("barrier", COMMON_GATHER, REREAD)
_CURVE = ("unit", "sizes_B", "times", "spread", "oversubscribed", "probe")
_COLUMNS = tuple(f.name for f in dataclasses.fields(OperatorTime))


def measured_text(measured: Measured) -> str:
    """As `measured_from` reads it back to an equal `Measured`."""
    head: dict[str, Any] = {"when": measured.when}
    if measured.notes:
        head["notes"] = list(measured.notes)
    if measured.host:
        head["host"] = dict(measured.host)
    text = tomli_w.dumps({"measured": head})
    if measured.curves:
        text += "\n# Median from the arrival of the last rank, by the bytes of one rank's tensor; relative spread.\n"
        text += "[measured.curves]\n" + "".join(map(_curve_line, measured.curves))
    if measured.operators:
        columns = ", ".join(map(_value, _COLUMNS))
        text += f'\n[measured.operators]\nunit = "s"\ncolumns = [{columns}]\nrows = [\n'
        text += "".join(f"  {_value([getattr(o, c) for c in _COLUMNS])},\n" for o in measured.operators) + "]\n"
    return text


def _curve_line(curve: Curve) -> str:
    said: dict[str, Any] = {"unit": "s", "sizes_B": curve.sizes_B, "times": curve.seconds, "spread": curve.spread}
    if curve.oversubscribed:
        said["oversubscribed"] = True
    if curve.probe_s:
        said["probe"] = curve.probe_s
    inside = ", ".join(f"{name} = {_value(value)}" for name, value in said.items())
    return f"{curve.transport}.{curve.operation}.{curve.ranks} = {{ {inside} }}\n"


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")


def measured_from(table: Mapping[str, Any], only: Only, refuse: Refuse) -> Measured:
    """What the table [measured] says."""
    only(table, ("when", "notes", "host", "curves", "operators"), _ROOT)
    when = table.get("when")
    try:
        datetime.datetime.fromisoformat(when)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        refuse((*_ROOT, "when"), 'it has to be said, as text; e.g. when = "2026-11-21T19:00:00Z".')
    notes = table.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(n, str) for n in notes):
        refuse((*_ROOT, "notes"), "notes are a list of texts.")
    host = _table(table, "host", refuse)
    for name, value in host.items():
        if not _plain(value):
            refuse((*_ROOT, "host", name), "of the host there are numbers, texts and lists of them.")
    reader = _Tables(only, refuse)
    return Measured(
        when=str(when),
        curves=tuple(reader.curves(_table(table, "curves", refuse))),
        operators=tuple(reader.operators(_table(table, "operators", refuse))),
        host=dict(host),
        notes=tuple(notes),
    )


def _table(table: Mapping[str, Any], name: str, refuse: Refuse) -> Mapping[str, Any]:
    found = table.get(name, {})
    if not isinstance(found, dict):
        refuse((*_ROOT, name), f"[measured.{name}] is a table.")
    return found


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


class _Tables:
    """Reads the two tables of times."""

    def __init__(self, only: Only, refuse: Refuse) -> None:
        self._only, self._refuse = only, refuse

    def curves(self, table: Mapping[str, Any]) -> list[Curve]:
        at, found = (*_ROOT, "curves"), []
        self._only(table, TRANSPORTS, at)
        for transport, operations in table.items():
            self._is_table((*at, transport), operations)
            self._only(operations, OPERATIONS, (*at, transport))
            for operation, sizes in operations.items():
                self._is_table((*at, transport, operation), sizes)
                for ranks, said in sizes.items():
                    here = (*at, transport, operation, ranks)
                    if not (ranks.isascii() and ranks.isdigit() and 2 <= int(ranks) <= 1_000_000):
                        self._refuse(here, f"{ranks!r} is no number of ranks; from 2, e.g. {transport}.{operation}.2.")
                    found.append(self._curve(transport, operation, int(ranks), said, here))
        return found

    def _curve(self, transport: str, operation: str, ranks: int, said: Any, at: tuple[str, ...]) -> Curve:
        self._is_table(at, said)
        self._only(said, _CURVE, at)
        for name in _CURVE[:4]:
            if name not in said:
                self._refuse(at, f'{name} is missing; a curve is {{ unit = "s", sizes_B = …, times = …, spread = … }}.')
        sizes, spread = said["sizes_B"], self._numbers(said["spread"], "spread", at)
        times = [self._seconds(t, said["unit"], at) for t in self._numbers(said["times"], "times", at)]
        for size in self._numbers(sizes, "sizes_B", at):
            if complaint := _SIZE.complaint(size, "B"):
                self._refuse(at, complaint)
            if not isinstance(size, int):
                self._refuse(at, f"a size of {size} B: bytes are whole.")
        if not len(sizes) == len(times) == len(spread) > 0:
            self._refuse(at, f"{len(sizes)} sizes, {len(times)} times, {len(spread)} spreads: as many of each, from 1.")
        if any(b <= a for a, b in itertools.pairwise(sizes)):
            self._refuse(at, "the sizes do not grow.")
        if wrong := next((s for s in spread if not 0 <= s < 10), None):
            self._refuse(at, f"{wrong} is no spread; it is relative, 0.02 for ±2 %.")
        oversubscribed, probe = said.get("oversubscribed", False), said.get("probe", [])
        if not isinstance(oversubscribed, bool):
            self._refuse(at, "oversubscribed is true or false.")
        if operation not in _WITHOUT_RATE:
            self._check_rate(sizes, times, said["unit"], at)
        probes = tuple(self._seconds(t, said["unit"], at) for t in self._numbers(probe, "probe", at))
        return Curve(
            transport=transport,
            operation=operation,
            ranks=ranks,
            sizes_B=tuple(sizes),
            seconds=tuple(times),
            spread=tuple(map(float, spread)),
            oversubscribed=oversubscribed,
            probe_s=probes,
        )

    def _check_rate(self, sizes: Sequence[int], times: Sequence[float], unit: str, at: tuple[str, ...]) -> None:
        for size, time in zip(sizes, times, strict=True):
            if size > FASTEST_BPS * max(time, SHORTEST_S):
                written = time / UNITS[unit][1]
                self._refuse(
                    at, f"{size} B in {written:g} {unit} cannot be right: no memory is so fast. Is {unit} meant?"
                )

    def operators(self, table: Mapping[str, Any]) -> list[OperatorTime]:
        if not table:
            return []
        at = (*_ROOT, "operators")
        self._only(table, ("unit", "columns", "rows"), at)
        columns, rows, unit = table.get("columns"), table.get("rows"), table.get("unit")
        if not isinstance(columns, list) or sorted(map(str, columns)) != sorted(_COLUMNS):
            self._refuse((*at, "columns"), f"the columns are {', '.join(_COLUMNS)}.")
        if not isinstance(rows, list):
            self._refuse((*at, "rows"), "rows is a list of rows, an operator each.")
        return [self._operator(columns, row, unit, (*at, "rows", str(i))) for i, row in enumerate(rows)]

    def _operator(self, columns: Sequence[str], row: Any, unit: Any, at: tuple[str, ...]) -> OperatorTime:
        if not isinstance(row, list) or len(row) != len(columns):
            self._refuse(at, f"a row has {len(columns)} values, one for each column.")
        said = dict(zip(columns, row, strict=True))
        for name in ("name", "phase", "options", "dtype", "layout"):
            if not isinstance(said[name], str):
                self._refuse(at, f"{name} is text, not {said[name]!r}.")
        for name in ("operands", "results"):
            if not _shapes(said[name]):
                self._refuse(at, f"{name} are shapes, e.g. [[64, 784], [784, 50]], not {said[name]!r}.")
        for name, least in (("threads", 1), ("co_runners", 1), ("flops", 0), ("moved_B", 0)):
            if isinstance(said[name], bool) or not isinstance(said[name], int) or said[name] < least:
                self._refuse(at, f"{name} is a whole number from {least}, not {said[name]!r}.")
        time, spread = (self._numbers([said[name]], name, at)[0] for name in ("seconds", "spread"))
        if not 0 <= spread < 10:
            self._refuse(at, f"{spread} is no spread; it is relative, 0.02 for ±2 %.")
        shapes = {name: tuple(tuple(shape) for shape in said[name]) for name in ("operands", "results")}
        return OperatorTime(**{**said, **shapes, "seconds": self._seconds(time, unit, at), "spread": float(spread)})

    def _seconds(self, value: float, unit: Any, at: tuple[str, ...]) -> float:
        if not isinstance(unit, str):
            self._refuse(at, f"{unit!r} is no unit; {_TIME.about} is given in {', '.join(_TIME.units)}.")
        if value == 0 and unit in _TIME.units:  # too short to be seen
            return 0.0
        if complaint := _TIME.complaint(value, unit):
            self._refuse(at, complaint)
        return value * UNITS[unit][1]

    def _numbers(self, values: Any, name: str, at: tuple[str, ...]) -> list[float]:
        if not isinstance(values, list):
            self._refuse(at, f"{name} is a list of numbers.")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                self._refuse(at, f"{name}: {value!r} is no finite number.")
        return values

    def _is_table(self, at: tuple[str, ...], value: Any) -> None:
        if not isinstance(value, dict):
            self._refuse(at, "it is a table: by transport, operation and ranks, e.g. shared.all_reduce.2 = { … }.")


def _shapes(value: Any) -> bool:
    def whole(n: Any) -> bool:
        return isinstance(n, int) and not isinstance(n, bool) and n >= 0

    return isinstance(value, list) and all(isinstance(s, list) and all(map(whole, s)) for s in value)
