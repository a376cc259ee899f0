"""Rows for other programs."""

import csv
import io
import sys

import pytest

from manyhands.errors import BadInput, ManyhandsError
from manyhands.studies.export import as_csv, export, flat
from tests.studies.made import cell, row
from tests.studies.reported import rows_of

ROWS = rows_of()


def test_csv_has_a_column_for_each_figure(tmp_path):
    path = export(ROWS, tmp_path / "rows.csv")
    with open(path, newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(ROWS)
    done = next(r for r in ROWS if r.measurement is not None)
    first = read[ROWS.index(done)]
    assert first["plan.strategy"] == done.plan["strategy"]
    assert float(first["measured.step_s.median"]) == done.measurement.step_s.median
    assert first["measured.versions.torch"] == "2.13.0"
    assert first["noisy"] == "false"
    refused = read[next(i for i, r in enumerate(ROWS) if r.status == "refused")]
    assert refused["measured.step_s.median"] == ""
    assert refused["reason"] == next(r.reason for r in ROWS if r.status == "refused")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_text_is_a_formula(start):
    text = as_csv(["a", f"{start}b"], [[f"{start}1+1", -1.5]])
    head, (formula, value) = csv.reader(io.StringIO(text, newline=""))
    assert head[1] == f"'{start}b"
    assert formula == f"'{start}1+1"
    assert value == "-1.5"


def test_parquet_has_the_same(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    mixed = [row(cell(workers=2, transport="shared", threads=1)), row(cell(workers=2, threads="auto"))]
    for rows in (ROWS, mixed, []):
        table = parquet.read_table(export(rows, tmp_path / "rows.parquet"))
        head, body = flat(rows)
        assert table.column_names == head
        assert table.num_rows == len(body)
    export(ROWS, tmp_path / "rows.parquet")
    read = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [r["measured.step_s.median"] for r in read] == [r.measurement and r.measurement.step_s.median for r in ROWS]


def test_without_pyarrow_parquet_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadInput, match=r"pip install 'manyhands\[parquet\]'"):
        export(ROWS, tmp_path / "rows.parquet")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(BadInput, match=r"ends in \.csv or \.parquet"):
        export(ROWS, tmp_path / "rows.xlsx")
    with pytest.raises(ManyhandsError, match="cannot be written"):
        export(ROWS, tmp_path / "no" / "rows.csv")
