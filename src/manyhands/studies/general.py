"""What any study's rows say: the fastest plan, every surprise, and charts of speed, time in parts and learning."""

from __future__ import annotations

from collections.abc import Sequence

from manyhands.studies.analysis import Analysis
from manyhands.studies.findings import findings
from manyhands.studies.grid import Study
from manyhands.studies.rows import Row
from manyhands.studies.summary import Line


def analyse(study: Study, rows: Sequence[Row], lines: Sequence[Line]) -> Analysis:
    """See the file's head."""
    said = findings(lines)
    return Analysis(tuple(said[:5]), notes=tuple(said[5:]))
