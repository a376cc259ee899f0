"""A study as one HTML file: nothing is loaded, nothing runs, every string is escaped.

The page forbids itself all but its own style sheet and images that it holds, by a content-security policy that names
the sheet's digest. The same rows give the same bytes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import re
import urllib.parse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from manyhands.studies.analysis import Analysis, Chart, Verdict
from manyhands.studies.export import Value, as_csv, encodable
from manyhands.studies.grid import Study
from manyhands.studies.report import provenance
from manyhands.studies.report.draw import NARROW, WIDE, draw, drawn, left_out_words
from manyhands.studies.report.lettering import number
from manyhands.studies.report.provenance import Facts
from manyhands.studies.row import Row
from manyhands.studies.summary import Line
from manyhands.studies.table import Table

#: A figure's table shows so many rows; its CSV has them all. Keeps a report below its megabyte.
_TABLE_ROWS = 200
#: More rows than this and the table of cells is folded.
_FOLDED = 30
#: Characters of tracebacks in all; rows.jsonl has them all.
_TRACEBACKS = 150_000


@dataclass(frozen=True)
class Figure:
    """A chart, drawn for two widths, with its data."""

    name: str  # unique in the report, and of its files
    chart: Chart
    wide: str  # SVG
    narrow: str
    csv: str
    note: str

    @property
    def head(self) -> tuple[str, ...]:
        """Of its table: without the interval's ends where no point has them."""
        return self.chart.table()[0][: 5 if self._intervals else 3]

    @property
    def body(self) -> list[list[tuple[str, bool]]]:
        """Text of each cell, and whether it is a number."""
        rows = self.chart.table()[1][:_TABLE_ROWS]
        return [[_cell(value) for value in row[: len(self.head)]] for row in rows]

    @property
    def more(self) -> int:
        """Rows that only the CSV has."""
        return max(0, len(self.chart.table()[1]) - _TABLE_ROWS)

    @property
    def link(self) -> str:
        """The CSV as an address."""
        return f"data:text/csv;charset=utf-8,{urllib.parse.quote(self.csv, safe=',()')}"

    @property
    def _intervals(self) -> bool:
        return any(p.low is not None or p.high is not None for s in self.chart.series for p in s.points)


@dataclass(frozen=True)
class Trouble:
    """What went wrong in the same way, and where."""

    status: str
    reason: str
    cells: tuple[str, ...]
    traceback: str


@dataclass(frozen=True)
class Grid:
    """A grid of the study, in words."""

    name: str
    facts: Facts


@dataclass(frozen=True)
class Page:
    """All that the template shows."""

    title: str
    date: str
    scope: str
    analysis: Analysis
    figures: tuple[Figure, ...]
    table: Table
    left: frozenset[int]  # its columns that hold words
    statuses: tuple[str, ...]  # of the table's rows
    troubles: tuple[Trouble, ...]
    design: Facts
    grids: tuple[Grid, ...]
    task: Facts
    plan: Facts
    circumstances: Facts
    columns: Facts = provenance.COLUMNS

    @property
    def folded(self) -> bool:
        """Whether the table of cells is too long to stand open."""
        return len(self.table.body) > _FOLDED


def figures(charts: Sequence[Chart]) -> tuple[Figure, ...]:
    """Each chart drawn. Two of the same name get different ones."""
    taken: set[str] = set()
    return tuple(_figure(chart, _unique(chart.name, taken)) for chart in charts)


def page(
    study: Study,
    rows: Sequence[Row],
    lines: Sequence[Line],
    analysis: Analysis,
    drawn_figures: Sequence[Figure],
    table: Table,
    *,
    command: str,
) -> Page:
    """The view of a study."""
    return Page(
        title=study.name,
        date=provenance.span(rows),
        scope=_scope(study, rows, lines),
        analysis=analysis,
        figures=tuple(drawn_figures),
        table=table,
        left=_words(table),
        statuses=tuple(line.status for line in lines if line.cell.measure == "train"),
        troubles=tuple(_troubles(study, rows)),
        design=provenance.design(study),
        grids=tuple(Grid(name, facts) for name, facts in provenance.grids(study)),
        task=provenance.said(study.task),
        plan=provenance.said(study.plan),
        circumstances=provenance.circumstances(rows, command),
    )


def html(shown: Page) -> str:
    """The file's text."""
    style = _file("style.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    template = _environment().get_template("report.html.j2")
    text = template.render(
        page=shown, style=Markup(style), digest=digest, svg=Markup, mark=_mark, breakable=_breakable, bound=_bound
    )
    return encodable(text) + "\n"


@functools.cache
def _environment() -> Environment:
    return Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=PackageLoader("manyhands.studies.report", package_path=""),
    )


@functools.cache
def _file(name: str) -> str:
    return resources.files("manyhands.studies.report").joinpath(name).read_text(encoding="utf-8")


def _figure(chart: Chart, name: str) -> Figure:
    head, rows = chart.table()
    notes = (chart.note, left_out_words(drawn(chart)[1]))
    return Figure(
        name=name,
        chart=chart,
        wide=draw(chart, width=WIDE, prefix=f"{name}-w"),
        narrow=draw(chart, width=NARROW, prefix=f"{name}-n"),
        csv=as_csv(head, rows),
        note=" ".join(filter(None, notes)),
    )


def _unique(name: str, taken: set[str]) -> str:
    """Letters, digits and hyphens, unlike every other."""
    base = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:60] or "figure"
    found, again = base, 2
    while found.lower() in taken:
        found, again = f"{base}-{again}", again + 1
    taken.add(found.lower())
    return found


def _cell(value: Value) -> tuple[str, bool]:
    if value is None:
        return "", True
    if isinstance(value, str):
        return value, False
    return (number(value, 5) if math.isfinite(value) else str(value)), True


def _scope(study: Study, rows: Sequence[Row], lines: Sequence[Line]) -> str:
    cells = len(study.cells())
    seen = f"{cells:,}" if len(lines) == cells else f"{len(lines):,} of {cells:,}"
    return f"{seen} {'cell' if cells == 1 else 'cells'}, {len(rows):,} {'run' if len(rows) == 1 else 'runs'}"


def _words(table: Table) -> frozenset[int]:
    """The columns where a cell begins with a letter."""
    found = {i for row in table.body for i, text in enumerate(row) if text[:1].isalpha()}
    return frozenset(found | table.left)


def _troubles(study: Study, rows: Sequence[Row]) -> Iterable[Trouble]:
    """Failures and refusals, alike ones together, failures first."""
    factors = {cell.id: cell.factors for cell in study.cells()}
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in sorted((r for r in rows if r.status != "done"), key=lambda r: r.status):
        alike.setdefault((row.status, row.reason), []).append(row)
    left = _TRACEBACKS
    for (status, reason), found in alike.items():
        text = next((row.traceback for row in found if row.traceback), "")
        if len(text) > left:
            text = "There are more tracebacks than fit here; rows.jsonl in the study's folder has this one."
        left -= len(text)
        names = dict.fromkeys(_named(row, factors.get(row.cell, ())) for row in found)
        yield Trouble(status, reason or "no reason was given", tuple(names), text)


def _named(row: Row, factors: Sequence[str]) -> str:
    """What its grid varies."""
    tables = {"task": row.task, "plan": row.plan}
    told = {f.partition(".")[2]: tables[f.partition(".")[0]].get(f.partition(".")[2]) for f in factors}
    words = ", ".join(f"{key}={value}" for key, value in told.items() if value is not None)
    return words or row.cell


def _mark(verdict: Verdict) -> str:
    """The class of its badge."""
    return verdict.outcome.replace(" ", "-")


def _breakable(text: str) -> Markup:
    """A name that may go on in the next line after a sign."""
    return Markup("<wbr>").join(Markup.escape(part) for part in re.split(r"(?<=[_(,.:])(?=.)", text))


def _bound(text: str) -> str:
    """A number and its per cent sign stay on one line."""
    return re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", text)
