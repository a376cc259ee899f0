"""Many plans side by side: a grid of plans, its rows on disk, one table.

`studies` lists the built-in ones; your own is a TOML file (see `manyhands.studies.grid`).

    from manyhands import studies

    result = studies.run("quick", out="runs/quick")
    result.table, result.rows, result.folder
"""

from typing import TYPE_CHECKING, Any

from manyhands.catalogue import Catalogue

if TYPE_CHECKING:
    from manyhands.studies.grid import Cell as Cell
    from manyhands.studies.grid import Study as Study
    from manyhands.studies.reporting import StudyResult as StudyResult
    from manyhands.studies.row import Row as Row
    from manyhands.studies.running import run as run

studies = Catalogue(
    "study",
    {
        "default": "manyhands.studies.presets:default",
        "quick": "manyhands.studies.presets:quick",
        "compare": "manyhands.studies.presets:compare",
        "scaling": "manyhands.studies.presets:scaling",
        "spectrum": "manyhands.studies.presets:spectrum",
        "compression": "manyhands.studies.compression.design:compression",
        "xin-ma": "manyhands.studies.xin_ma.design:xin_ma",
    },
)

#: What is made of a study's rows: sentences, verdicts, charts.
analyses = Catalogue(
    "analysis",
    {
        "general": "manyhands.studies.general:analyse",
        "compare": "manyhands.studies.compare:analyse",
        "compression": "manyhands.studies.compression.report:analyse",
        "xin-ma": "manyhands.studies.xin_ma.report:analyse",
    },
)

_WHERE = {
    "Cell": "manyhands.studies.grid",
    "Study": "manyhands.studies.grid",
    "Row": "manyhands.studies.row",
    "StudyResult": "manyhands.studies.reporting",
    "run": "manyhands.studies.running",
}

__all__ = ["Cell", "Row", "Study", "StudyResult", "analyses", "run", "studies"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'manyhands.studies' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
