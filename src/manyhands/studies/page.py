"""``table.md``: a study's findings and table, with the machine, the versions and the command that they depend on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from manyhands.studies.grid import Study
from manyhands.studies.rows import Row
from manyhands.studies.table import Table

REPORT = "table.md"


def page(study: Study, table: Table, findings: Sequence[str], rows: Sequence[Row], *, command: str) -> str:
    """The whole page; pure."""
    sections = [f"# Study: {study.name}"]
    if findings:
        sections.append("\n".join(f"- {x}" for x in findings))
    sections.append(table.markdown())
    if study.task:
        sections += ["## Task", _listed(study.task)]
    if study.plan:
        sections += ["## In every plan", _listed(study.plan)]
    sections += ["## Where and how", _listed(circumstances(rows, command))]
    return "\n\n".join(sections) + "\n"


def circumstances(rows: Sequence[Row], command: str) -> dict[str, str]:
    """What the figures depend on; values that differ between rows stand side by side."""
    measured = [row.measurement for row in rows if row.measurement is not None]
    versions: dict[str, dict[str, None]] = {}
    for m in measured:
        for name, version in m.versions.items():
            versions.setdefault(name, {})[version] = None
    return {
        "command": command,
        "machine": _all(f"{row.host}, {row.processor}, {row.cores} cores" for row in rows),
        "data": _all(m.data for m in measured),
        "parameters": _all(f"{m.parameters:,}" for m in measured),
        **{name: " and ".join(found) for name, found in versions.items()},
        "measured": f"{min(row.started_at for row in rows)} … {max(row.started_at for row in rows)}" if rows else "",
        "load average before a run": (
            f"{min(row.load_average for row in rows):.1f} … {max(row.load_average for row in rows):.1f}" if rows else ""
        ),
        "runs": f"{len(measured)}, {sum(row.seconds for row in rows):.0f} s in all" if rows else "0",
    }


def _all(values: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(values))


def _listed(table: Mapping[str, object]) -> str:
    return "\n".join(f"- {key}: `{value}`" for key, value in table.items() if value != "")
