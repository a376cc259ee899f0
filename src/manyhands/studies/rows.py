"""A study's rows: one for each cell and repeat, in a folder of their own.

    study.toml     the description
    rows.sqlite    the rows, a column for each figure; this file is the truth
    rows.jsonl     the same rows, a line each, for tools that read text; written anew when the folder is opened

A row is there as soon as its run has ended, so whatever ends a study costs the run under way and no other. One process
at a time writes to a folder.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import json
import operator
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from manyhands.contract import Measurement, Spread, StepParts
from manyhands.errors import BadInput, ManyhandsError
from manyhands.studies.grid import Measure, Study
from manyhands.training.metrics import json_text

STUDY, ROWS, LINES, LOCK = "study.toml", "rows.sqlite", "rows.jsonl", ".lock"

#: Of the table's form; another number, another form.
VERSION = 2

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
    history: list[dict[str, Any]] = field(default_factory=list)  # a record an evaluation, see training.loop.record
    noise: dict[str, float] | None = None  # of a noise cell, see gradient_noise.Noise
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
    return "dict" in str(hint)


# Names of columns come from our own classes; values go in as parameters only.
_OWN = {name: hint for name, hint in get_type_hints(Row).items() if name != "measurement"}
_MEASURED = _measured()
_COLUMNS = {**_OWN, **{name: hint for name, (_, hint) in _MEASURED.items()}}
_CREATE = (
    "CREATE TABLE IF NOT EXISTS rows ("
    + ", ".join(f"{name} {_sql_type(hint)}" for name, hint in _COLUMNS.items())
    + ", PRIMARY KEY (cell, repeat))"
)
_INSERT = f"INSERT OR REPLACE INTO rows VALUES ({', '.join('?' * len(_COLUMNS))})"


class Rows:
    """The rows of one folder, open for writing; a context manager."""

    def __init__(self, folder: Path, study: Study) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / LOCK, "a+")  # noqa: SIM115
        except OSError as e:
            raise BadInput(
                f"the study's folder {folder} cannot be written ({e.strerror or e}). Choose another with out= (--out)."
            ) from e
        try:
            self._claim()
            self._db = self._open()
            try:
                self._check_study(study)
                write(folder, STUDY, study.to_toml())
                write(folder, LINES, "".join(_line(row) for row in self.all()))
            except BaseException:
                self._db.close()
                raise
        except BaseException:
            self._lock.close()
            raise

    def _check_study(self, study: Study) -> None:
        """One study a folder: an edited one keeps what is still true of its rows, another one's would be mixed up."""
        others = {row.study for row in self.all()} - {study.name}
        if others:
            raise BadInput(
                f"{self.folder} holds the study {' and '.join(sorted(others))}, and this is {study.name}: one study a "
                "folder. Choose another with out= (--out)."
            )

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            raise BadInput(
                f"the study's folder {self.folder} is in use by process {self._lock.read().strip() or '?'}: one at a "
                "time writes there. Wait for it, or choose another folder with out= (--out)."
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def _open(self) -> sqlite3.Connection:
        path = self.folder / ROWS
        fresh = not path.exists()
        db = sqlite3.connect(path)
        try:
            if fresh:
                with db:
                    db.execute(f"PRAGMA user_version = {VERSION}")
                    db.execute(_CREATE)
            _check(db, path)
        except BaseException:
            db.close()
            raise
        return db

    def all(self) -> list[Row]:
        """Every row, in the order of writing."""
        return [_row(values) for values in self._db.execute("SELECT * FROM rows ORDER BY rowid")]

    def add(self, row: Row) -> None:
        """Keep ``row``; it takes the place of an earlier one of the same cell and repeat."""
        flat = _flat(row)
        try:
            with self._db:
                self._db.execute(_INSERT, [flat[name] for name in _COLUMNS])
            with open(self.folder / LINES, "a", encoding="utf-8") as file:
                file.write(_line(row))
        except (sqlite3.Error, OSError) as e:
            raise _lost(self.folder, e) from e

    def done(self) -> set[tuple[str, int]]:
        """(cell, repeat) of what need not run again. Refused and failed ones are tried anew: what was wrong may be
        mended since.
        """
        return set(self._db.execute("SELECT cell, repeat FROM rows WHERE status = ?", ("done",)))

    def close(self) -> None:
        """Let others write to the folder."""
        self._db.close()
        self._lock.close()

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(folder: Path) -> list[Row]:
    """The rows of a study's folder, which may be in use."""
    path = folder / ROWS
    if not path.is_file():
        raise BadInput(
            f"{folder} holds no {ROWS}: name the folder of a study, e.g. one that `manyhands study` printed."
        )
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        _check(db, path)
        return [_row(values) for values in db.execute("SELECT * FROM rows ORDER BY rowid")]
    finally:
        db.close()


def _check(db: sqlite3.Connection, path: Path) -> None:
    """Refuse what is not a table of this form."""
    try:
        found = db.execute("PRAGMA user_version").fetchone()[0]
        names = [column[1] for column in db.execute("PRAGMA table_info(rows)")]
    except sqlite3.DatabaseError as e:
        raise BadInput(f"{path} is no file of rows ({e}). Choose another folder with out= (--out).") from None
    if found != VERSION or names != list(_COLUMNS):
        raise BadInput(
            f"{path} was written by something else or by another version of manyhands (form {found}, this is "
            f"{VERSION}): rows of two forms do not mix. Choose another folder with out= (--out)."
        )


def write(folder: Path, name: str, text: str) -> None:
    """A whole file of a study's folder: old or new, never half."""
    fresh = folder / f".{name}-new"
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(folder / name)
    except OSError as e:
        raise _lost(folder, e) from e


def _lost(folder: Path, e: Exception) -> ManyhandsError:
    return ManyhandsError(
        f"the study's folder {folder} cannot be written ({e}). The rows so far are kept; free some space and go on "
        f"with out={str(folder)!r} (--out {folder})."
    )


def _line(row: Row) -> str:
    return json_text(row.as_dict()) + "\n"


def _flat(row: Row) -> dict[str, Any]:
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


def _row(values: tuple[Any, ...]) -> Row:
    """What `_flat` was made of."""
    table = {name: _read(value, hint) for (name, hint), value in zip(_COLUMNS.items(), values, strict=True)}
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
