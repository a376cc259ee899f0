"""A study's rows for other programs: CSV for spreadsheets, Parquet for data frames; a column for each figure.

    plan.strategy, task.model, measured.step_s.median, measured.versions.torch …

What is a list stays in one column, as JSON. A text that a spreadsheet would take for a formula gets an apostrophe in
front of it in CSV, as `OWASP <https://owasp.org/www-community/attacks/CSV_Injection>`_ advises.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from manyhands.errors import BadInput, ManyhandsError
from manyhands.studies.row import Row

Value = str | int | float | bool | None

SUFFIXES = (".csv", ".parquet")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def export(rows: Sequence[Row], file: str | os.PathLike[str]) -> Path:
    """Write the rows to ``file``, which ends in .csv or .parquet; an old one is replaced when the new one is whole."""
    path = Path(file)
    if path.suffix not in SUFFIXES:
        raise BadInput(f"{path} cannot be exported to: the file's name ends in {' or '.join(SUFFIXES)}.")
    head, body = flat(rows)
    fresh = path.with_name(f".{path.name}-new")
    try:
        if path.suffix == ".csv":
            fresh.write_text(as_csv(head, body), encoding="utf-8", newline="")
        else:
            _write_parquet(head, body, fresh)
        fresh.replace(path)
    except OSError as e:
        raise ManyhandsError(f"{path} cannot be written ({e.strerror or e}). Name another file.") from e
    finally:
        fresh.unlink(missing_ok=True)
    return path


def flat(rows: Iterable[Row]) -> tuple[list[str], list[list[Value]]]:
    """The names of the columns, in the order in which they come up, and the values."""
    tables = [dict(_flat(_renamed(row.as_dict()))) for row in rows]
    head = list(dict.fromkeys(name for table in tables for name in table))
    return head, [[table.get(name) for name in head] for table in tables]


def as_csv(head: Sequence[str], rows: Iterable[Sequence[Value]]) -> str:
    """Text that a spreadsheet takes for data and nothing else. None is an empty cell."""
    written = io.StringIO(newline="")
    writer = csv.writer(written)  # lines end as RFC 4180 says, so that either half of an end is quoted
    writer.writerow([_safe(x) for x in head])
    writer.writerows([_safe(x) for x in row] for row in rows)
    return encodable(written.getvalue())


def encodable(text: str) -> str:
    """Half of a pair of surrogates, as a file's name may hold it, written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _safe(value: Value) -> Value:
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _renamed(table: dict[str, Any]) -> dict[str, Any]:
    return {("measured" if k == "measurement" else k): v for k, v in table.items()}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Value]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", json.dumps(value)
        elif value is not None or not prefix:
            yield f"{prefix}{key}", value


def _write_parquet(head: Sequence[str], body: Sequence[Sequence[Value]], path: Path) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BadInput("Parquet needs pyarrow: pip install 'manyhands[parquet]'. CSV needs nothing more.") from None
    columns = {name: _of_one_type([row[i] for row in body]) for i, name in enumerate(head)}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _of_one_type(values: Sequence[Value]) -> list[Value]:
    """As they are, or all as text: 4 workers beside "auto"."""
    kinds = {type(v) for v in values if v is not None}
    if kinds == {int, float}:
        return [None if v is None else float(v) for v in values]
    return list(values) if len(kinds) < 2 else [None if v is None else str(v) for v in values]
