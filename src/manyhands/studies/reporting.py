"""What a study found: its rows, one line a cell, what they say, and the page ``report.html`` that shows it.

report.html    sentences, verdicts, figures, table, failures, circumstances; one file, for any browser
figures/       each figure as NAME.svg and NAME.csv
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from manyhands.errors import BadInput, ManyhandsError
from manyhands.studies import analyses, predicting
from manyhands.studies.analysis import Analysis
from manyhands.studies.grid import Study, parse
from manyhands.studies.row import Row
from manyhands.studies.rows import STUDY, read, write
from manyhands.studies.summary import Line, counted, summarize
from manyhands.studies.table import Table, listed, table

REPORT, FIGURES = "report.html", "figures"


#: Rows up to which a terminal shows a table: a screen.
MOST_SHOWN = 40


@dataclass(frozen=True)
class StudyResult:
    """What a study found, and where it lies."""

    study: Study
    folder: Path
    rows: tuple[Row, ...]
    summary: tuple[Line, ...]
    analysis: Analysis
    drawn: Table

    @property
    def findings(self) -> tuple[str, ...]:
        """The sentences of the summary, and those that go into detail."""
        return (*self.analysis.sentences, *self.analysis.notes)

    @property
    def verdicts(self) -> tuple[str, ...]:
        """A line for each claim."""
        return tuple(
            f"{v.claim}: {v.outcome}.\n" + "\n".join(f"    {line}" for line in v.why.splitlines())
            for v in self.analysis.verdicts
        )

    @property
    def tables(self) -> tuple[Table, ...]:
        """What is shown: the analysis's own, where it has any, else that of all cells."""
        return tuple(listed(each) for each in self.analysis.tables) or (self.drawn,)

    @property
    def table(self) -> str:
        """The tables as plain text, and the findings."""
        return "\n".join([*(line for each in self.tables for line in (each.plain(), "")), *self._said()]).rstrip()

    @property
    def report(self) -> Path:
        """The page."""
        return self.folder / REPORT

    @property
    def exit_code(self) -> int:
        """0 when what can work was measured, 1 when something failed, 2 when nothing can work."""
        if any(line.failures for line in self.summary):
            return 1
        return 0 if any(line.status == "done" for line in self.summary) else 2

    def show(self, console: Console) -> None:
        """Tables, findings and the page's place: drawn on a terminal, plain text elsewhere."""
        for i, each in enumerate(self.tables):
            if i:
                console.print()
            if len(each.body) > MOST_SHOWN:
                text = f"{counted(len(each.body), 'row')}: the table is in the report."
                console.print(Text(f"{each.title}, {text}" if each.title else text), soft_wrap=True)
            else:
                each.show(console)
        for sentence in ("", *self._said(), "", f"Report: {self.report}"):
            console.print(Text(sentence), soft_wrap=not console.is_terminal)

    def lines(self) -> list[str]:
        """The same as lines for standard output."""
        console = Console()
        with console.capture() as captured:
            self.show(console)
        return captured.get().splitlines()

    def as_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return {
            "study": self.study.name,
            "folder": str(self.folder),
            "report": str(self.report),
            "findings": list(self.findings),
            "sentences": list(self.analysis.sentences),
            "verdicts": [dataclasses.asdict(verdict) for verdict in self.analysis.verdicts],
            "command": self.analysis.command,
            "tables": [dataclasses.asdict(listing) for listing in self.analysis.tables],
            "charts": [chart.name for chart in self.analysis.charts],
            "cells": [_plain(line) for line in self.summary],
            "rows": [row.as_dict() for row in self.rows],
        }

    def _said(self) -> list[str]:
        recommended = [f"Recommended: {self.analysis.command}"] if self.analysis.command else []
        return [*self.findings, *self.verdicts, *recommended]


def made_of(study: Study, folder: Path, rows: Iterable[Row]) -> StudyResult:
    """The result of the rows that belong to ``study``; a folder may hold more."""
    cells = {cell.id: cell for cell in study.cells()}
    own = tuple(row for row in rows if row.cell in cells and row.repeat <= cells[row.cell].repeats)
    summary = summarize(list(cells.values()), own)
    analysis = analyses.load(study.analysis)(study, own, summary)
    trained = [line for line in summary if line.cell.measure == "train"]
    analysis = dataclasses.replace(
        analysis,
        charts=(*analysis.charts, *predicting.charts(trained)),
        notes=(*analysis.notes, *predicting.sentences(trained)),
    )
    return StudyResult(study, folder, own, summary, analysis, table(summary))


def report(folder: str | os.PathLike[str]) -> StudyResult:
    """Draw ``report.html`` and its figures again from the rows that a study's folder holds."""
    place = Path(folder)
    rows = read(place)
    try:
        text = (place / STUDY).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{place} holds no readable {STUDY} ({e}): name the folder of a study.") from e
    result = made_of(parse(text, where=str(place / STUDY)), place, rows)
    write_page(result)
    return result


def write_page(result: StudyResult) -> None:
    """``report.html`` and the figures: each file old or new, never half."""
    from manyhands.studies.report import html  # matplotlib takes its time

    figures = html.figures(result.analysis.charts)
    shown = html.page(
        result.study,
        result.rows,
        result.summary,
        result.analysis,
        figures,
        result.drawn,
        command=command(result.folder),
    )
    if figures:
        try:
            (result.folder / FIGURES).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ManyhandsError(f"{result.folder / FIGURES} cannot be made ({e.strerror or e}).") from e
    for figure in figures:
        write(result.folder / FIGURES, f"{figure.name}.svg", figure.wide)
        write(result.folder / FIGURES, f"{figure.name}.csv", figure.csv)
    write(result.folder, REPORT, html.html(shown))


def command(folder: Path) -> str:
    """What measures the same study in the same folder: goes on where it was, or has nothing to do."""
    return shlex.join(["manyhands", "study", str(folder / STUDY), "--out", str(folder)])


def _plain(line: Line) -> dict[str, Any]:
    return {
        "cell": line.cell.id,
        "measure": line.cell.measure,
        "status": line.status,
        "reason": line.reason,
        "strategy": line.strategy,
        "workers": line.workers,
        "threads": line.threads,
        "transport": line.transport,
        "oversubscribed": line.oversubscribed,
        "repeats": line.repeats,
        "failures": line.failures,
        "step_s": dataclasses.asdict(line.step_s) if line.step_s else None,
        "predicted_step_s": line.predicted_step_s,
        "prediction_error": line.prediction_error,
        "prediction_off": line.prediction_off,
        "unpredicted": line.unpredicted,
        "simulated_on": line.simulated_on,
        "step_parts_s": dataclasses.asdict(line.parts_s) if line.parts_s else None,
        "samples_per_s": line.samples_per_s,
        "speed_up": line.speed_up,
        "speed_up_against": line.base.cell.id if line.base else None,
        "efficiency": line.efficiency,
        "test_accuracy": line.accuracy,
        "sent_B_per_step": line.sent_B_per_step,
        "sent_B_per_sample": line.sent_B_per_sample,
        "wait_s": line.wait_s,
        "staleness_mean": line.staleness_mean,
        "staleness_max": line.staleness_max,
    }
