"""What a study's rows say: sentences, verdicts on claims, charts. Types only; `general`, `compare` and `xin_ma` fill
them in, `report` draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from manyhands.studies.grid import Study
from manyhands.studies.row import Row
from manyhands.studies.summary import Line

#: How sure the rows are about a claim.
Outcome = Literal["supported", "not supported", "undecided"]
#: measured: what this study found; ideal, fit, published and computed are drawn beside it, as lines without points;
#: simulated as dashed lines with hollow ones.
Role = Literal["measured", "ideal", "fit", "published", "simulated", "computed"]
#: lines or single points over a number; bars or stacked bars over a name.
Kind = Literal["lines", "points", "bars", "stack"]


@dataclass(frozen=True)
class Point:
    """One value with its 95 % interval, where there is one."""

    x: float | str
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """What is called by one name in a chart."""

    name: str
    points: tuple[Point, ...]
    role: Role = "measured"


@dataclass(frozen=True)
class Chart:
    """One figure as data: drawn as SVG, and given as a table and as CSV."""

    name: str  # of its files: letters, digits and hyphens
    title: str  # the finding, in words
    x: str  # axis with its unit
    y: str
    series: tuple[Series, ...]
    kind: Kind = "lines"
    log_x: bool = False
    log_y: bool = False
    note: str = ""  # what a reader must know to read it rightly

    def table(self) -> tuple[tuple[str, ...], tuple[tuple[str | float | None, ...], ...]]:
        """Head and rows: series, x, y and the interval's ends."""
        head = ("series", self.x, self.y, "low", "high")
        return head, tuple((s.name, p.x, p.y, p.low, p.high) for s in self.series for p in s.points)


@dataclass(frozen=True)
class Verdict:
    """A claim of somebody's, and what the rows say to it."""

    claim: str
    outcome: Outcome
    why: str  # the numbers, in a sentence
    test: str  # the rule by which the outcome follows from them


@dataclass(frozen=True)
class Listing:
    """A table of an analysis, as text by row and column; the first column names, the others stand on the right."""

    title: str
    head: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    note: str = ""  # what a reader must know to read it rightly


@dataclass(frozen=True)
class Analysis:
    """What stands in a report beside the table."""

    sentences: tuple[str, ...]  # the summary, at most five
    charts: tuple[Chart, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    command: str = ""  # what the study recommends to run
    notes: tuple[str, ...] = ()  # further findings, in full
    tables: tuple[Listing, ...] = ()


#: From a study, its rows and a line a cell to what they say; pure.
Analyse = Callable[[Study, Sequence[Row], Sequence[Line]], Analysis]
