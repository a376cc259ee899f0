"""Rows on disk: kept one by one, read back as they were, safe from a second writer and a foreign file."""

import dataclasses
import errno
import fcntl
import json
import os
import sqlite3
import subprocess
import sys

import pytest

from manyhands.errors import BadInput, ManyhandsError
from manyhands.studies.rows import LINES, ROWS, STUDY, Rows, finished, read
from tests.studies.made import cell, measurement, noise_row, row, study

ONE, TWO = cell(workers=1), cell(workers=2)


def test_rows_read_back_as_they_were(tmp_path):
    written = [
        row(ONE),
        row(TWO, repeat=2, measured=measurement(2, test_accuracy=None, train_loss=None)),
        row(TWO, status="refused", reason="it cannot be"),
        dataclasses.replace(row(ONE, repeat=2, status="failed", reason="it broke"), traceback="Traceback …"),
        dataclasses.replace(row(ONE, repeat=3), disturbance=1.75, noisy=True, attempts=2, history=[{"train_s": 0.5}]),
        noise_row(cell(measure="noise")),
    ]
    with Rows(tmp_path, study()) as rows:
        for one in written:
            rows.add(one)
        assert rows.all() == written
    assert read(tmp_path) == written
    lines = [json.loads(line) for line in (tmp_path / LINES).read_text().splitlines()]
    assert lines == [json.loads(json.dumps(one.as_dict())) for one in written]


def test_every_figure_has_a_column(tmp_path):
    with Rows(tmp_path, study()) as rows:
        rows.add(row(TWO))
    with sqlite3.connect(tmp_path / ROWS) as db:
        asked = "SELECT workers, measured_step_s_p90, measured_step_parts_s_compute, measured_test_accuracy FROM rows"
        found = db.execute(asked).fetchone()
    db.close()
    assert found == (2, 0.012, 0.009, 0.95)


def test_a_row_takes_the_place_of_an_earlier_one_of_the_same_run(tmp_path):
    with Rows(tmp_path, study()) as rows:
        rows.add(row(ONE, status="failed"))
        assert rows.done() == set()
        rows.add(row(ONE))
        assert rows.done() == {(ONE.id, 1)}
        assert [r.status for r in rows.all()] == ["done"]


def test_lines_follow_the_database_when_a_kill_cut_the_last_one(tmp_path):
    with Rows(tmp_path, study()) as rows:
        rows.add(row(ONE))
    with open(tmp_path / LINES, "a") as file:
        file.write('{"study": "te')
    with Rows(tmp_path, study()) as rows:
        rows.add(row(TWO))
    assert [json.loads(line)["cell"] for line in (tmp_path / LINES).read_text().splitlines()] == [ONE.id, TWO.id]


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path):
    with Rows(tmp_path, study()), pytest.raises(BadInput, match=f"in use by process {os.getpid()}"):
        Rows(tmp_path, study())
    Rows(tmp_path, study()).close()


@pytest.mark.parametrize("content", [b"not a database at all" * 100, None])
def test_a_foreign_file_is_refused(tmp_path, content):
    if content is None:
        with sqlite3.connect(tmp_path / ROWS) as db:
            db.execute("CREATE TABLE rows (cell TEXT)")
        db.close()
    else:
        (tmp_path / ROWS).write_bytes(content)
    with pytest.raises(BadInput, match="Choose another folder"):
        Rows(tmp_path, study())
    with pytest.raises(BadInput):
        read(tmp_path)
    (tmp_path / ROWS).unlink()
    Rows(tmp_path, study()).close()  # the refusal let go of the folder


def test_rows_of_another_version_are_refused_and_left_as_they_are(tmp_path):
    Rows(tmp_path, study()).close()
    with sqlite3.connect(tmp_path / ROWS) as db:
        db.execute("PRAGMA user_version = 1")
    db.close()
    before = (tmp_path / ROWS).read_bytes()
    for opening in (lambda: Rows(tmp_path, study()), lambda: read(tmp_path)):
        with pytest.raises(
            BadInput, match=r"another version of manyhands \(form 1, this is 4\).*Choose another folder"
        ):
            opening()
    assert (tmp_path / ROWS).read_bytes() == before


def test_on_a_full_disk_the_rows_so_far_are_kept(tmp_path):
    with Rows(tmp_path, study()) as rows:
        rows.add(row(ONE))
        # sqlite's own limit answers as a full disk does
        rows._db.execute(f"PRAGMA max_page_count = {rows._db.execute('PRAGMA page_count').fetchone()[0]}")
        with pytest.raises(ManyhandsError, match=r"full.*rows so far are kept; free some space and go on with out="):
            rows.add(dataclasses.replace(row(TWO), traceback="x" * 100_000))
    assert read(tmp_path) == [row(ONE)]
    with Rows(tmp_path, study()) as rows:
        rows.add(row(TWO))
    assert read(tmp_path) == [row(ONE), row(TWO)]


def test_a_disk_that_fills_up_before_the_line_keeps_the_row(tmp_path, monkeypatch):
    with Rows(tmp_path, study()) as rows:

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("builtins.open", full)
        with pytest.raises(ManyhandsError, match="No space left"):
            rows.add(row(ONE))
        monkeypatch.undo()
    assert read(tmp_path) == [row(ONE)]
    Rows(tmp_path, study()).close()
    assert len((tmp_path / LINES).read_text().splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        Rows(tmp_path / "file", study())


def test_a_folder_without_rows_is_not_read(tmp_path):
    with pytest.raises(BadInput, match="holds no rows"):
        read(tmp_path)


def test_the_description_lies_beside_the_rows(tmp_path):
    from manyhands.studies.grid import parse

    one = study({"plan.workers": [1, 2]})
    Rows(tmp_path, one).close()
    assert parse((tmp_path / STUDY).read_text()) == one


def test_another_study_does_not_move_into_a_folder(tmp_path):
    one = study()
    with Rows(tmp_path, one) as rows:
        rows.add(row(cell()))
    with Rows(tmp_path, dataclasses.replace(one, repeats=5)):  # an edited one goes on
        pass
    with pytest.raises(BadInput, match="holds the study test, and this is other"):
        Rows(tmp_path, dataclasses.replace(one, name="other"))


@pytest.mark.parametrize("status", ["failed", "refused"])
def test_a_measurement_is_replaced_by_no_failure(tmp_path, status):
    with Rows(tmp_path, study()) as rows:
        rows.add(row(ONE))
        rows.add(row(ONE, status=status))
        assert rows.all() == [row(ONE)]
    assert len((tmp_path / LINES).read_text().splitlines()) == 1


@pytest.mark.parametrize("version", [None, 0, 2])
def test_a_file_whose_maker_was_killed_at_once_is_made_anew(tmp_path, version):
    if version is None:
        (tmp_path / ROWS).touch()
    else:
        with sqlite3.connect(tmp_path / ROWS) as db:
            db.execute(f"PRAGMA user_version = {version}")
        db.close()
    assert read(tmp_path) == []
    with Rows(tmp_path, study()) as rows:
        rows.add(row(ONE))
    assert read(tmp_path) == [row(ONE)]


def test_a_disk_that_is_full_at_the_start_is_refused_plainly(tmp_path, monkeypatch):
    connect = sqlite3.connect

    def full(*where, **how):
        db = connect(*where, **how)
        db.execute("PRAGMA max_page_count = 1")
        return db

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", full)
        with pytest.raises(BadInput, match=r"cannot be written \(database or disk is full\). Choose another with out="):
            Rows(tmp_path, study())
    Rows(tmp_path, study()).close()  # nothing half made is left


KILLED = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = 1")  # so that pages go to the file before the commit
db.execute("BEGIN")
db.execute("UPDATE rows SET traceback = hex(randomblob(200000))")
db.execute("CREATE TABLE more AS SELECT hex(randomblob(500000))")
os._exit(9)
"""


def test_rows_whose_writer_was_killed_are_read(tmp_path):
    with Rows(tmp_path, study()) as rows:
        rows.add(row(ONE))
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / ROWS], check=False)
    assert (tmp_path / f"{ROWS}-journal").stat().st_size > 0
    assert read(tmp_path) == [row(ONE)]


def test_rows_that_another_process_holds_are_not_called_something_else(tmp_path, monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *where, **how: connect(*where, timeout=0.01, **how))
    with Rows(tmp_path, study()) as rows:
        rows.add(row(ONE))
    holder = connect(tmp_path / ROWS, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        for opening in (lambda: read(tmp_path), lambda: Rows(tmp_path, study())):
            with pytest.raises(BadInput, match=r"cannot be read now \(database is locked\)"):
                opening()
    finally:
        holder.close()
    assert read(tmp_path) == [row(ONE)]


def test_a_damaged_page_is_said_plainly(tmp_path):
    with Rows(tmp_path, study()) as rows:
        for repeat in range(1, 40):
            rows.add(row(ONE, repeat=repeat))
    whole = (tmp_path / ROWS).read_bytes()
    (tmp_path / ROWS).write_bytes(whole[: len(whole) // 2] + b"\xff" * (len(whole) - len(whole) // 2))
    for opening in (lambda: read(tmp_path), lambda: Rows(tmp_path, study())):
        with pytest.raises(BadInput, match=r"is damaged .*rows.jsonl beside it holds the same rows"):
            opening()
    assert len((tmp_path / LINES).read_text().splitlines()) == 39


def test_a_file_system_that_cannot_lock_is_not_called_another_process(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(BadInput, match=r"cannot be locked \(No locks available\).*local disk"):
        Rows(tmp_path, study())


def test_a_folder_keeps_a_figure_beside_its_rows(tmp_path):
    with Rows(tmp_path, study()) as rows:
        assert rows.recall("quickest") is None
        rows.remember("quickest", 2.5)
        rows.remember("quickest", 1.5)
    with Rows(tmp_path, study()) as rows:
        assert rows.recall("quickest") == 1.5


def test_a_folder_from_before_there_were_such_figures_goes_on(tmp_path):
    with Rows(tmp_path, study()) as rows:
        rows.add(row(ONE))
        rows._db.execute("DROP TABLE known")
    with Rows(tmp_path, study()) as rows:
        rows.remember("quickest", 1.5)
        assert rows.recall("quickest") == 1.5
        assert rows.all() == [row(ONE)]


def records(*steps, seen=True):
    return [{"step": step, "test_accuracy": 0.9 if seen else None, "test_loss": None} for step in steps]


@pytest.mark.parametrize(
    ("history", "evaluate", "counts"),
    [
        ([], "end", True),
        ([], "never", True),
        ([], "epoch", False),
        (records(4, 8, seen=False), "epoch", False),
        (records(4, 8, seen=False), 2, False),
        (records(4, 8), "epoch", True),
        (records(4, 8), 4, True),
        (records(4, 8), 2, False),
        (records(3, 6, 8), 3, True),
        (records(8), 10, True),
    ],
)
def test_a_row_counts_if_it_was_looked_at_as_often_as_asked(history, evaluate, counts):
    asked = dataclasses.replace(ONE, evaluate=evaluate)
    held = dataclasses.replace(row(ONE), history=history)
    assert finished([held], [asked]) == ({(ONE.id, 1)} if counts else set())


def test_a_row_without_a_test_set_is_not_run_for_ever():
    held = row(ONE, measured=measurement(1, test_accuracy=None))
    assert finished([held], [dataclasses.replace(ONE, evaluate="epoch")]) == {(ONE.id, 1)}
    assert finished([row(ONE, status="failed")], [ONE]) == set()
