"""A study's rows: one for each cell and repeat, in a folder of their own.

    study.toml     the description
    rows.sqlite    the rows, a column for each figure; this file is the truth
    rows.jsonl     the same rows, a line each, for tools that read text; written anew when the folder is opened
    runs/          the runs themselves, see run_folder

A row is there as soon as its run has ended, so whatever ends a study costs the run under way and no other. One process
at a time writes to a folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from manyhands.errors import BadInput, ManyhandsError
from manyhands.studies.grid import Cell, Study
from manyhands.studies.row import COLUMNS, CREATE, INSERT, Row, flat, row_of
from manyhands.training.metrics import json_text

STUDY, ROWS, LINES, LOCK = "study.toml", "rows.sqlite", "rows.jsonl", ".lock"

#: Of the table's form; another number, another form.
VERSION = 4


#: What a folder knows beside its rows; older folders get it when they are opened.
_CREATE_KNOWN = "CREATE TABLE IF NOT EXISTS known (name TEXT PRIMARY KEY, value REAL)"


class Rows:
    """The rows of one folder, open for writing; a context manager."""

    def __init__(self, folder: Path, study: Study) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / LOCK, "a+")  # noqa: SIM115
        except OSError as e:
            raise _unwritable(folder, e.strerror or e) from e
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
        except OSError as e:
            if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise BadInput(
                    f"the study's folder {self.folder} cannot be locked ({e.strerror or e}): its file system does not "
                    "keep a second writer out. Choose a folder on a local disk with out= (--out)."
                ) from e
            self._lock.seek(0)
            raise BadInput(
                f"the study's folder {self.folder} is in use by process {self._lock.read().strip() or '?'}: one at a "
                "time writes there. Wait for it, or choose another folder with out= (--out)."
            ) from None
        try:
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()))
            self._lock.flush()
        except OSError as e:
            raise _unwritable(self.folder, e.strerror or e) from e

    def _open(self) -> sqlite3.Connection:
        path = self.folder / ROWS
        try:
            db = sqlite3.connect(path)
        except sqlite3.Error as e:
            raise _unwritable(self.folder, e) from e
        try:
            if not _has_tables(db, path):  # a new file, or one whose maker was killed at once
                _create(db, self.folder)
            _check(db, path)
            with contextlib.suppress(sqlite3.OperationalError):  # see `remember`
                db.execute(_CREATE_KNOWN)
        except BaseException:
            db.close()
            raise
        return db

    def all(self) -> list[Row]:
        """Every row, in the order of writing."""
        return _select(self._db, self.folder / ROWS)

    def add(self, row: Row) -> None:
        """Keep ``row``; it takes the place of an earlier one of the same cell and repeat.

        Unless that is done and this is not: a measurement is lost to no failure.
        """
        values = flat(row)
        try:
            if row.status != "done" and (row.cell, row.repeat) in self.done():
                return
            with self._db:
                self._db.execute(INSERT, [values[name] for name in COLUMNS])
            with open(self.folder / LINES, "a", encoding="utf-8") as file:
                file.write(_line(row))
        except (sqlite3.Error, OSError) as e:
            raise lost(self.folder, e) from e

    def done(self) -> set[tuple[str, int]]:
        """(cell, repeat) of what was measured; which of these need not run again, `finished` says."""
        return set(self._db.execute("SELECT cell, repeat FROM rows WHERE status = ?", ("done",)))

    def recall(self, name: str) -> float | None:
        """What `remember` kept under ``name``; None: nothing."""
        try:
            found = self._db.execute("SELECT value FROM known WHERE name = ?", (name,)).fetchone()
        except sqlite3.Error:
            return None
        return None if found is None else float(found[0])

    def remember(self, name: str, value: float) -> None:
        """Keep a figure that is none of a row's, for whoever goes on. The rows matter more: a full disk is passed over
        here, and ends the study at its next row.
        """
        with contextlib.suppress(sqlite3.OperationalError), self._db:
            self._db.execute("INSERT OR REPLACE INTO known VALUES (?, ?)", (name, value))

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
    try:
        return _read_as(path, "ro")
    except _Unready:  # a writer was killed within a row, which only one who may write can undo
        return _read_as(path, "rw")


def _read_as(path: Path, mode: str) -> list[Row]:
    try:
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True)
    except sqlite3.Error as e:
        raise _bad(path, e) from None
    try:
        if not _has_tables(db, path):  # its maker has not come further
            return []
        _check(db, path)
        return _select(db, path)
    finally:
        db.close()


def finished(rows: Iterable[Row], cells: Iterable[Cell]) -> set[tuple[str, int]]:
    """(cell, repeat) of what need not run again: done, and looked at as often as ``cells`` now ask.

    Refused and failed ones are tried anew: what was wrong may be mended since.
    """
    asked = {cell.id: cell.evaluate for cell in cells}
    return {
        (row.cell, row.repeat)
        for row in rows
        if row.status == "done" and (row.cell not in asked or _looked_at(row, asked[row.cell]))
    }


def _looked_at(row: Row, evaluate: str | int) -> bool:
    """Whether the row's history is as fine as ``evaluate`` asks. One that has no accuracy at all may have no test set,
    and would not get one from a further run.
    """
    if evaluate in ("end", "never") or row.measurement is None or row.measurement.test_accuracy is None:
        return True
    looks = [record for record in row.history if {record.get("test_accuracy"), record.get("test_loss")} - {None}]
    if isinstance(evaluate, str):
        return bool(looks)
    return bool(looks) and len(looks) >= looks[-1]["step"] // evaluate


class _Unready(BadInput):
    """The file cannot be read as it lies there; after whoever writes it has finished or been undone it may be."""


def _bad(path: Path, e: Exception) -> BadInput:
    """What is wrong with a file of rows."""
    torn = not isinstance(e, sqlite3.Error) or any(word in str(e) for word in ("malformed", "decode"))
    if isinstance(e, sqlite3.OperationalError) and not torn:
        return _Unready(
            f"{path} cannot be read now ({e}): another process may be writing it, or must be let write there to undo "
            "what it left half done. Try again, as who may write in its folder."
        )
    if torn:
        return BadInput(
            f"{path} is damaged ({e}). {LINES} beside it holds the same rows as text. Choose another folder with out= "
            "(--out)."
        )
    return BadInput(f"{path} is no file of rows ({e}). Choose another folder with out= (--out).")


def _has_tables(db: sqlite3.Connection, path: Path) -> bool:
    try:
        return bool(db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    except sqlite3.Error as e:
        raise _bad(path, e) from None


def _create(db: sqlite3.Connection, folder: Path) -> None:
    """All of it or nothing."""
    try:
        with db:
            db.execute("BEGIN IMMEDIATE")
            db.execute(f"PRAGMA user_version = {VERSION}")
            db.execute(CREATE)
            db.execute(_CREATE_KNOWN)
    except sqlite3.Error as e:
        raise _unwritable(folder, e) from e


def _select(db: sqlite3.Connection, path: Path) -> list[Row]:
    try:
        return [row_of(values) for values in db.execute("SELECT * FROM rows ORDER BY rowid")]
    except (sqlite3.Error, ValueError, TypeError) as e:
        raise _bad(path, e) from None


def _check(db: sqlite3.Connection, path: Path) -> None:
    """Refuse what is not a table of this form."""
    try:
        found = db.execute("PRAGMA user_version").fetchone()[0]
        names = [column[1] for column in db.execute("PRAGMA table_info(rows)")]
    except sqlite3.Error as e:
        raise _bad(path, e) from None
    if found != VERSION or names != list(COLUMNS):
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
        raise lost(folder, e) from e


def _unwritable(folder: Path, reason: object) -> BadInput:
    return BadInput(f"the study's folder {folder} cannot be written ({reason}). Choose another with out= (--out).")


def lost(folder: Path, e: Exception) -> ManyhandsError:
    """What ends a study whose folder can no longer be written."""
    return ManyhandsError(
        f"the study's folder {folder} cannot be written ({e}). The rows so far are kept; free some space and go on "
        f"with out={str(folder)!r} (--out {folder})."
    )


def _line(row: Row) -> str:
    return json_text(row.as_dict()) + "\n"
