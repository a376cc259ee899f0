"""A plan drawn: whose which part of each weight matrix is, replica by replica, and a pipeline's schedule.

Matrices stand in the model's order, outputs down and inputs across, sides by the root of their length. What a worker
holds has its colour and pattern; what several of a replica hold alike is grey. Where
there are copies (redundant neurons) they stand in the right half, what they are copies of in the left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from manyhands.communication.topology import Mesh
from manyhands.contract.block import FLAT, Block, Ranges
from manyhands.partition.pipeline.schedule import UNIT, Schedule, makespan, simulate
from manyhands.studies.report.canvas import SIZE, Canvas, settings
from manyhands.studies.report.lettering import shortened, text_width
from manyhands.studies.report.palette import Style
from manyhands.training.outline import Outline, Part

#: More replicas than this are as the first ones are.
REPLICAS = 2
WIDE, HIGH, GAP, LABEL = 200.0, 96.0, 26.0, 18.0
CELL, LABELS = 22.0, 3  # of a schedule; in a line of the legend
_COLOURS = ("c1", "c2", "c4")  # of workers; the others are what they do
_PATTERNS = ("", "////", "\\\\\\\\", "xxxx")
_SHARED = Style("several", "ideal", "o", hollow=False, hatch="", dash=())


def style_of(rank: int) -> Style:
    """A worker's looks."""
    colour, pattern = _COLOURS[rank % len(_COLOURS)], _PATTERNS[rank // len(_COLOURS) % len(_PATTERNS)]
    return Style(f"worker {rank}", colour, "o", hollow=False, hatch=pattern, dash=())


def draw(outline: Outline) -> str:
    """An SVG document; equal outlines give equal bytes."""
    replicas = _replicas(outline)
    matrices = [(name, shape) for name, shape in outline.whole.items() if len(shape) > 1]
    longest = max((math.sqrt(_side(shape, 1)) for _, shape in matrices), default=1.0)
    tallest = max((math.sqrt(shape[0]) for _, shape in matrices), default=1.0)
    heights = [max(6.0, HIGH * math.sqrt(shape[0]) / tallest) for _, shape in matrices]
    shown = [part for _, parts in replicas for part in parts]
    alike = any(_is_shared(name, parts) for name, _ in matrices for _, parts in replicas)
    labels = [_label(part) for part in shown] + ["held alike by several"] * alike
    top = 3 * LABEL + LABEL * -(-len(labels) // LABELS)
    body = sum(height + LABEL + GAP / 2 for height in heights)
    grid = 0.0 if outline.schedule is None else (outline.schedule.ranks + 2.5) * CELL
    slots = 0 if outline.schedule is None else _slots(outline.schedule)
    need = GAP + LABELS * (2 * GAP + max(text_width(label, SIZE) for label in labels))
    width = max(GAP + len(replicas) * (WIDE + 2 * GAP), need, 100.0 + slots * CELL)
    with settings():
        canvas = Canvas(width, top + body + grid + LABEL)
        assert outline.plan.mesh is not None
        canvas.text(GAP, LABEL, f"{outline.plan.mesh}, {outline.plan.strategy}", colour="ink")
        _legend(canvas, labels, [*(style_of(part.rank) for part in shown), _SHARED])
        for k, (title, parts) in enumerate(replicas):
            x, y = GAP + k * (WIDE + 2 * GAP), top - LABEL / 2
            canvas.text(x, y, title)
            for (name, shape), height in zip(matrices, heights, strict=True):
                y += LABEL
                canvas.text(x, y, shortened(f"{name}  {'×'.join(map(str, shape))}", SIZE, WIDE + GAP))
                across = max(6.0, WIDE * math.sqrt(_side(shape, 1)) / longest)
                _matrix(canvas, name, shape, parts, x, y + 5, across, height)
                y += height + GAP / 2
        if outline.schedule is not None:
            _schedule(canvas, outline.schedule, GAP, top + body + CELL)
        return canvas.svg(
            "plan", title=str(outline.plan.mesh), description="; ".join(outline.notes) or "nothing is cut"
        )


def _side(shape: Sequence[int], dim: int) -> int:
    """Rows (dim 0), or all else as columns."""
    return shape[0] if dim == 0 else math.prod(shape[1:])


def _replicas(outline: Outline) -> list[tuple[str, list[Part]]]:
    mesh = outline.plan.mesh
    assert isinstance(mesh, Mesh)
    by = {k: list(parts) for k, parts in groupby(outline.parts, key=lambda p: p.where.get("data", 0))}
    shown = [(f"replica {k}" if len(by) > 1 else "the model", parts) for k, parts in list(by.items())[:REPLICAS]]
    if len(by) > REPLICAS:
        shown[-1] = (f"{shown[-1][0]}; {len(by) - REPLICAS} more alike", shown[-1][1])
    return shown


def _label(part: Part) -> str:
    where = ", ".join(f"{axis} {at}" for axis, at in part.where.items())
    return f"worker {part.rank}" + (f" ({where})" if where else "")


def _legend(canvas: Canvas, labels: Sequence[str], looks: Sequence[Style]) -> None:
    step = max(text_width(label, SIZE) for label in labels) + 2 * GAP
    for i, (label, style) in enumerate(zip(labels, looks, strict=False)):
        x, y = GAP + i % LABELS * step, 2 * LABEL + i // LABELS * LABEL
        canvas.box(x, y - SIZE + 2, SIZE, SIZE, style)
        canvas.text(x + SIZE + 5, y, label)


def _is_shared(name: str, parts: Sequence[Part]) -> bool:
    return sum(part.holds.get(name, ...) is None for part in parts) > 1


def _matrix(
    canvas: Canvas, name: str, shape: Sequence[int], parts: Sequence[Part], x: float, y: float, w: float, h: float
) -> None:
    holders = [part for part in parts if name in part.holds]
    whole = next((part for part in holders if part.holds[name] is None), None)
    if whole is not None:
        canvas.box(x, y, w, h, _SHARED if _is_shared(name, parts) else style_of(whole.rank))
        return
    blocks = [(part.rank, block) for part in holders if (block := part.holds[name]) is not None]
    twice = any(block.copies for _, block in blocks)  # copies beside what they are copies of, each half as wide
    for rank, block in blocks:
        for at, among in ((0.0, block.ranges), (0.5, block.copies)):
            for (top, bottom), (left, right) in _rectangles(block, among):
                start, end = (at + left / 2, at + right / 2) if twice else (left, right)
                canvas.box(x + start * w, y + top * h, (end - start) * w, (bottom - top) * h, style_of(rank))


def _rectangles(
    block: Block, among: tuple[tuple[int, Ranges], ...]
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Of a block as a matrix, or of its copies, each rectangle's rows and columns as parts of the whole."""
    if not among:
        return []
    ranges = dict(among)
    if FLAT in ranges:  # whole rows, nearly
        numel = math.prod(block.shape) or 1
        return [((lo / numel, hi / numel), (0.0, 1.0)) for lo, hi in ranges[FLAT] if lo < hi]
    rows = [(lo / block.shape[0], hi / block.shape[0]) for lo, hi in ranges.get(0, ((0, block.shape[0]),))]
    columns = [(lo / block.shape[1], hi / block.shape[1]) for lo, hi in ranges.get(1, ((0, block.shape[1]),))]
    return [(row, column) for row in rows for column in columns]


def _slots(schedule: Schedule) -> int:
    return math.ceil(makespan(schedule))


def _schedule(canvas: Canvas, schedule: Schedule, x: float, y: float) -> None:
    """A row a rank of the pipeline; forwards in one colour, backwards in another, micro-batches by number."""
    times, _ = simulate(schedule, UNIT)
    looks = {
        "F": Style("forward", "c5", "o", hollow=False, hatch="", dash=()),
        "B": Style("backward", "c6", "o", hollow=False, hatch="", dash=()),
        "I": Style("backward, inputs", "c6", "o", hollow=False, hatch="", dash=()),
        "W": Style("backward, weights", "c3", "o", hollow=False, hatch="", dash=()),
    }
    used = [kind for kind in looks if any(t.action.kind == kind for row in times for t in row)]
    at = x
    for kind in used:
        canvas.box(at, y - SIZE + 2, SIZE, SIZE, looks[kind])
        canvas.text(at + SIZE + 5, y, looks[kind].label)
        at += 130
    for r, row in enumerate(times):
        top = y + (r + 0.5) * CELL
        canvas.text(x, top + CELL * 0.65, f"stage {', '.join(map(str, schedule.stages_of(r)))}")
        for timed in row:
            left = x + 70 + timed.start * CELL
            canvas.box(left, top, (timed.end - timed.start) * CELL, CELL * 0.9, looks[timed.action.kind])
            canvas.text(
                left + CELL / 2, top + CELL * 0.65, str(timed.action.micro_batch), anchor="middle", colour="ink"
            )
