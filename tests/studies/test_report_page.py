"""The report as a file: one, strict, escaped, the same every time, with every number in it."""

import base64
import csv
import dataclasses
import hashlib
import html
import io
import json
import re
import time
import urllib.parse
from html.parser import HTMLParser

import pytest
from rich.console import Console

from manyhands.studies import reporting
from manyhands.studies.analysis import Analysis, Chart, Listing, Point, Series
from manyhands.studies.grid import Grid, Study
from manyhands.studies.report.lettering import number
from tests.studies.made import TINY, row
from tests.studies.reported import ANALYSIS, CHARTS, EVIL, result, rows_of, written

VOID = {"meta", "link", "br", "wbr"}
OMITTED = {"td", "th", "tr", "thead", "tbody"}  # their end tags may be left out


class Parsed(HTMLParser):
    """Elements with their attributes, and text by element; complains about what is not closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID | OMITTED:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in OMITTED:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return written(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def parsed(page):
    return Parsed(page)


def tables_of(text):
    """Each table of a text as rows of cells."""
    found = []
    for table in re.findall(r"<table.*?</table>", text, re.DOTALL):
        rows = [re.split(r"<t[dh][^>]*>", r)[1:] for r in re.split(r"<tr[^>]*>", table)[1:]]
        found.append([[html.unescape(re.sub("<[^>]*>", "", c)).strip() for c in r] for r in rows])
    return found


def test_nothing_runs_and_nothing_is_loaded(page, parsed):
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "base", "video", "audio"}
    assert [a for t, a in parsed.elements if t == "link"] == [{"rel": "icon", "href": "data:,"}]
    for tag, attributes in parsed.elements:
        assert not [k for k in attributes if k.startswith("on") or k in ("style", "src", "srcset")], tag
        for key in ("href", "xlink:href"):
            if tag != "link" and key in attributes:
                assert attributes[key].startswith(("#", "data:text/csv;charset=utf-8,"))
    assert "@import" not in page
    assert set(re.findall(r"https?://[^\s\"'<)]*", page)) <= {"http://www.w3.org/2000/svg"}


def test_the_policy_names_the_digest_of_the_only_style_sheet(page, parsed):
    policies = [a["content"] for t, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"]
    sheets = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert (len(policies), len(sheets)) == (1, 1)
    digest = base64.b64encode(hashlib.sha256(sheets[0].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policies[0]
    assert "default-src 'none'" in policies[0]
    assert "unsafe" not in policies[0]
    assert "url(" not in sheets[0]
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_every_string_is_escaped(tmp_path):
    evil = Study(EVIL, task={**TINY, "model": EVIL}, grids=(Grid({"plan.workers": (1, 2)}, name=EVIL),))
    rows = [row(cell, status="failed", reason=EVIL) for cell in evil.cells()]
    chart = Chart(EVIL, EVIL, EVIL, EVIL, (Series(EVIL, (Point(EVIL, 1.0), Point("b", 2.0))),), "bars", note=EVIL)
    said = Analysis((EVIL,), (chart,), ANALYSIS.verdicts, EVIL, (EVIL,))
    for text in (written(tmp_path, study=evil, rows=rows, analysis=said), written(tmp_path)):
        found = Parsed(text)
        assert "script" not in {tag for tag, _ in found.elements}
        assert "alert('x')" in "".join(found.texts)
        assert "49" not in "".join(t for t in found.texts if "alert" in t)


def test_the_same_rows_give_the_same_bytes(tmp_path, page):
    first = written(tmp_path)
    names = sorted(p.name for p in (tmp_path / "figures").iterdir())
    before = {name: (tmp_path / "figures" / name).read_bytes() for name in names}
    assert written(tmp_path) == first
    assert {name: (tmp_path / "figures" / name).read_bytes() for name in names} == before
    assert names == sorted(f"{c.name}.{s}" for c in CHARTS for s in ("csv", "svg"))


def test_every_chart_has_its_numbers_as_a_table_and_as_csv(page, tmp_path):
    written(tmp_path)
    figures = re.findall(r"<figure .*?</figure>", page, re.DOTALL)
    assert len(figures) == len(CHARTS)
    for figure, chart in zip(figures, CHARTS, strict=True):
        head, rows = chart.table()
        link = html.unescape(re.search(r'href="(data:[^"]*)"', figure)[1])
        text = urllib.parse.unquote(link.partition(",")[2])
        assert text == (tmp_path / "figures" / f"{chart.name}.csv").read_bytes().decode()
        got_head, *got = csv.reader(io.StringIO(text, newline=""))
        assert tuple(got_head) == head
        assert [[x and type(y)(x) for x, y in zip(a, b, strict=True)] for a, b in zip(got, rows, strict=True)] == [
            ["" if y is None else pytest.approx(y, rel=0, abs=0, nan_ok=True) if y != y else y for y in b] for b in rows
        ]
        (shown_head, *shown) = tables_of(figure)[0]
        assert shown_head == list(head[: len(shown_head)])
        assert [r[0] for r in shown] == [r[0] for r in rows][: len(shown)]
        assert [r[2] for r in shown] == [number(r[2], 5) for r in rows][: len(shown)]


def test_a_long_table_ends_and_names_the_csv(tmp_path):
    many = Chart("many", "t", "x", "y", (Series("a", tuple(Point(i, float(i)) for i in range(300))),))
    text = written(tmp_path, analysis=Analysis((), (many,)))
    assert len(tables_of(text)[0]) == 201
    assert "100 further rows are in the CSV." in text
    assert len((tmp_path / "figures/many.csv").read_text().splitlines()) == 301


def test_what_stands_in_the_report(parsed):
    text = " ".join("".join(parsed.texts).split())
    said = [
        *ANALYSIS.sentences,
        *ANALYSIS.notes,
        ANALYSIS.command,
        *(x for v in ANALYSIS.verdicts for x in (v.claim, v.why, v.test, v.outcome)),
        *(x for c in CHARTS for x in (c.title, c.note)),
        "Least time to 95 %",
        "14 cells, 42 runs",
        "2030-01-01 00:00 UTC",
        "rank 2: <script>",
        "What would fit: 2.",
        "x" * 300,
        "here, a processor, 4 cores",
        "torch 2.13.0",
        "manyhands study",
        "36 done, 3 failed, 3 refused",
        "time against nodes",
        "0 of 42 rows count as noisy",
        "1 value has no place in the drawing",
    ]
    assert [x for x in said if " ".join(x.split()) not in text] == []


def test_alike_failures_stand_once_and_tracebacks_have_a_limit(tmp_path):
    study = Study("s", task=TINY, grids=(Grid({"plan.workers": tuple(range(1, 101))}),), repeats=1)
    alike = [row(cell, status="failed", reason="the same") for cell in study.cells()]
    text = written(tmp_path, study=study, rows=alike, analysis=Analysis(()))
    assert text.count("the same</p>") == 1
    assert "workers=100" in text
    long = [dataclasses.replace(r, reason=f"reason {i}", traceback=f"{i}" + "y" * 20_000) for i, r in enumerate(alike)]
    text = written(tmp_path, study=study, rows=long, analysis=Analysis(()))
    assert len(text) < 300_000
    assert all(f"reason {i}<" in text for i in range(100))
    assert "rows.jsonl in the study&#39;s folder has this one" in text


@pytest.mark.parametrize("kind", ["nothing", "one row", "all refused"])
def test_poor_studies_have_a_report_too(tmp_path, kind):
    study = Study("poor", task=TINY, grids=(Grid({"plan.workers": (1, 2)}),))
    rows = {
        "nothing": [],
        "one row": [row(study.cells()[0])],
        "all refused": [row(c, status="refused", reason="it cannot be") for c in study.cells()],
    }[kind]
    found = reporting.made_of(study, tmp_path, rows)
    reporting.write_page(found)
    text = found.report.read_text()
    Parsed(text)
    assert ("it cannot be" in text) == (kind == "all refused")
    assert "poor" in "\n".join(found.lines()) or found.lines()
    json.dumps(found.as_dict())


def test_what_is_no_unicode_is_written_out(tmp_path):
    study = Study("s", task=TINY, plan={"workers": 1})
    lost = [row(c, status="failed", reason="file \udcff\x00") for c in study.cells()]
    chart = Chart("c", "\udcff", "x", "y", (Series("\udcff", (Point(1, 1.0),)),))
    text = written(tmp_path, study=study, rows=lost, analysis=Analysis(("\udcff",), (chart,)))
    assert "file \\udcff" in text


def test_a_cell_of_noise_is_in_no_row_of_the_table_and_shifts_none(tmp_path):
    grids = (Grid({"plan.workers": (1,)}, measure="noise"), Grid({"plan.workers": (1, 2)}))
    study = Study("s", task=TINY, grids=grids, repeats=1)
    noise, one, two = study.cells()
    rows = [
        dataclasses.replace(row(noise), measurement=None, measure="noise"),
        row(one),
        row(two, status="failed", reason="broken"),
    ]
    text = written(tmp_path, study=study, rows=rows, analysis=Analysis(()))
    assert len(re.findall(r'<tr class="?failed"?>', text)) == 1
    assert re.search(r'<tr class="?failed"?>.*\bfailed\n', text)


def test_charts_of_one_name_get_files_of_their_own(tmp_path):
    twin = Chart("../a b", "t", "x", "y", (Series("s", (Point(1, 1.0),)),))
    text = written(tmp_path, analysis=Analysis((), (twin, twin, CHARTS[1])))
    assert sorted(p.name for p in (tmp_path / "figures").glob("*.svg")) == [
        "a-b-2.svg",
        "a-b.svg",
        "time-against-nodes.svg",
    ]
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_a_thousand_rows_are_below_a_megabyte(tmp_path, capsys):
    grid = {"plan.strategy": tuple(f"replica_average(period={n})" for n in range(1, 26)), "plan.workers": range(1, 11)}
    study = Study("large", task=TINY, grids=(Grid({k: tuple(v) for k, v in grid.items()}),), repeats=4)
    rows = rows_of(study)
    assert len(rows) == 1000
    began = time.perf_counter()
    found = reporting.made_of(study, tmp_path, rows)
    found = result(tmp_path, study=study, rows=rows, analysis=ANALYSIS)
    reporting.write_page(found)
    size = found.report.stat().st_size
    with capsys.disabled():
        print(f"\n1,000 rows: {size / 1e3:.0f} kB, drawn in {time.perf_counter() - began:.2f} s")  # noqa: T201
    assert size < 1_000_000


def test_the_result_tells_the_same_as_the_report(tmp_path):
    found = result(tmp_path)
    assert found.findings == (*ANALYSIS.sentences, *ANALYSIS.notes)
    told = found.as_dict()
    json.dumps(told)
    assert told["sentences"] == list(ANALYSIS.sentences)
    assert [v["outcome"] for v in told["verdicts"]] == ["supported", "not supported", "undecided"]
    assert told["charts"] == [c.name for c in CHARTS]
    assert told["command"] == ANALYSIS.command
    assert {"study", "folder", "report", "findings", "cells", "rows"} <= told.keys()
    shown = "\n".join(found.lines())
    assert "Accuracy does not depend on the number of nodes: not supported.\n    It falls by" in shown
    assert shown.endswith(f"Report: {tmp_path / 'report.html'}")


def test_a_terminal_and_a_pipe_get_the_tables_of_the_analysis_in_place_of_the_general_one(tmp_path):
    found = result(tmp_path)
    drawn = io.StringIO()
    found.show(Console(file=drawn, force_terminal=True, color_system=None, width=100))
    for text in (drawn.getvalue(), "\n".join(found.lines()), found.table):
        assert text.startswith("Least time to 95 %")
        assert re.search(r"^synchronous with 4 workers +3\.1 +95\.0 %", text, re.MULTILINE)
        assert "Of the plans that came so far." in text
        assert "step ms" not in text
    general = result(tmp_path, analysis=Analysis(()))
    assert "step ms [p10 … p90]" in "\n".join(general.lines())
    assert "step ms [p10 … p90]" in general.table


def test_a_table_longer_than_a_screen_is_left_to_the_report(tmp_path):
    long = Listing("All of them", ("plan", "seconds"), tuple((f"plan {i}", "1") for i in range(100)))
    shown = "\n".join(result(tmp_path, analysis=Analysis((), tables=(long,))).lines())
    assert "All of them, 100 rows: the table is in the report." in shown
    assert "plan 7" not in shown
