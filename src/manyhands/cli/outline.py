"""A plan for a person: what was decided, and a table of what each worker holds and sends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manyhands.errors import BadInput
from manyhands.studies.table import in_bytes as size
from manyhands.task import Task, described
from manyhands.training.outline import Outline, Part

#: Of more workers only the first ones are listed: the rest are alike.
SHOWN = 16
_HEAD = ("worker", "place", "parameters", "take", "gradients", "optimizer", "strategy sends", "cut sends")


def lines(task: Task, outline: Outline) -> list[str]:
    """The plan, the notes, the table, and a pipeline's schedule."""
    plan = outline.plan
    found = [f"{described(task.model)} by {plan.strategy} on {plan.mesh}, {plan.workers} workers, {plan.transport}"]
    found += [f"  {note}" for note in outline.notes]
    rows = [_HEAD, *(_row(part) for part in outline.parts[:SHOWN])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    found += ["  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(outline.parts) > SHOWN:
        found.append(f"  … and {len(outline.parts) - SHOWN} more")
    found.append("  bytes sent are payload of a step; where memory is shared, one copy may serve several workers")
    if outline.schedule is not None:
        assert outline.bubble is not None
        found += [f"  {plan.pipeline}: bubble {outline.bubble:.3f} with stages of equal cost"]
        found += [f"  {line}" for line in str(outline.schedule).splitlines()]
    return found


def _row(part: Part) -> Sequence[str]:
    where = " ".join(f"{axis}={at}" for axis, at in part.where.items())
    return (
        str(part.rank),
        where or "-",
        f"{part.parameters:,}",
        size(part.parameters_B),
        size(part.gradients_B),
        size(part.optimizer_B),
        size(part.sent_B),
        size(part.cut_B),
    )


def draw(outline: Outline, file: Path) -> None:
    """Write the picture; refuses another format than SVG."""
    from manyhands.studies.cut_picture import draw as drawn

    if file.suffix != ".svg":
        raise BadInput(f"--draw {file}: what is drawn is SVG; name a file that ends in .svg.")
    try:
        file.write_text(drawn(outline), encoding="utf-8")
    except OSError as e:
        raise BadInput(f"--draw {file} cannot be written: {e.strerror or e}.") from None
