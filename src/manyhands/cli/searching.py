"""What a search came to, for a person: the best plans with reasons, what ties, what was refused, how many workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from manyhands.cli.summary import seconds
from manyhands.communication.topology import Mesh
from manyhands.modelling.search import ranking
from manyhands.modelling.search.ranking import KNEE, SHOWN, Point, Ranked, Ranking, Refused, bound, grouped
from manyhands.plan import Plan
from manyhands.studies.table import in_bytes as size
from manyhands.task import Task, described

if TYPE_CHECKING:
    from manyhands.studies.reached import Reached

#: Of the plans that stand apart, and of reasons, so many are shown.
APART, REASONS = 5, 8


def lines(task: Task, found: Ranking, reached: Reached | None = None) -> list[str]:
    """The figures that one looks at first."""
    took = f"{seconds(found.took_s)}, of which {seconds(found.measuring_s)} measuring steps"
    head = (
        f"{described(task.model)} on {described(task.data)}, batch {task.batch_size}, on {found.cluster}: "
        f"{found.looked_at:,} plans, {len(found.ranked):,} ranked, {len(found.apart):,} apart, "
        f"{len(found.refused):,} refused, in {took}"
    )
    said = [head]
    if reached is not None and found.by == "target":
        said.append(
            f"ranked by the time until {reached.scale} {reached.target:.4g}, from samples that a study measured"
        )
    elif found.ranked:
        said.append("ranked by the time of an epoch; all of these learn from a sample as one process does")
    said += _table(found.ranked[:SHOWN], found.by)
    said += _advice(found)
    if found.apart:
        said += [
            "",
            "What these learn from a sample nobody has measured here (--study DIR tells); by time of an epoch:",
        ]
        said += _table(found.apart[:APART], "epoch")
    said += _refused(found.refused)
    return [*said, *_worth(found), *(f"  {note}" for note in found.notes)]


def called(plan: Plan) -> str:
    """A plan in a few words.

    >>> called(Plan(strategy="local", workers=2, threads=1))
    'local, 2 workers × 1 thread'
    """
    workers = "1 worker" if plan.workers == 1 else f"{plan.workers:,} workers"
    threads = "1 thread" if plan.threads == 1 else f"{plan.threads} threads"
    parts = [str(plan.strategy), f"{workers} × {threads}"]
    if isinstance(plan.mesh, Mesh):
        parts += [f"{axis}={plan.mesh[axis]}" for axis in plan.mesh if axis != "data" and plan.mesh[axis] > 1]
    if plan.micro_batches is not None and plan.micro_batches > 1:
        parts.append(f"{plan.micro_batches} micro-batches")
    if plan.recompute:
        parts.append("recompute")
    return ", ".join(parts)


def _table(ranked: Sequence[Ranked], by: str) -> list[str]:
    rows = [
        (
            "",
            "plan",
            "to target" if by == "target" else "epoch",
            "step",
            "most of it",
            "sent a step",
            "memory",
            "measured",
        )
    ]
    for i, each in enumerate(ranked, 1):
        said = each.prediction.summary
        what, share = bound(said.step_parts_s)
        measured = ""
        if each.timed is not None:
            off = each.epoch_s / each.timed.epoch_s - 1
            measured = f"{seconds(each.timed.epoch_s)} ± {each.timed.spread:.0%} (predicted {off:+.0%})"
        rows.append(
            (
                f"{i}.",
                called(each.plan),
                f"{seconds(ranking.key(each)[0])} ± {each.prediction.error:.0%}",
                seconds(said.wall_s / said.steps),
                f"{what} {share:.0%}",
                size(said.sent_B_per_step),
                "" if each.needed_B is None else size(each.needed_B),
                measured,
            )
        )
    kept = [i for i in range(len(rows[0])) if i < 2 or any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in kept}
    return ["  ".join(f"{row[i]:<{widths[i]}}" for i in kept).rstrip() for row in rows] if ranked else []


def _advice(found: Ranking) -> list[str]:
    choice = found.choice
    if choice is None:
        return ["  no plan can be ranked; why is below"]
    said = []
    if found.regret is not None:
        said.append(
            f"  measured: the first as predicted takes {found.regret:.1%} longer than the best of those that were run"
        )
    if not found.ties:
        return [*said, f"  the first is faster than all others by more than the error bars: {called(choice.plan)}"]
    others = "one other is" if len(found.ties) == 1 else f"{len(found.ties)} others are"
    text = f"  {others} within the error bars of the first"
    if choice.timed is None:
        text += ": predictions do not tell them apart" + ("; --measure 3 runs them" if found.here else "")
    fewest = min((choice, *found.ties), key=lambda each: (each.plan.workers or 1) * max(each.plan.threads, 1))
    cores = [] if fewest is choice else [f"  of these the fewest cores: {called(fewest.plan)}"]
    return [*said, text, *cores]


def _refused(refused: Sequence[Refused]) -> list[str]:
    if not refused:
        return []
    groups = grouped(refused)
    said = ["", "Not ranked:"]
    for same in groups[:REASONS]:
        first = same[0]
        plans = "1 plan" if len(same) == 1 else f"{len(same):,} plans"
        reason = " ".join(first.reason.split())
        said.append(f"  {plans} ({first.why}): {reason} E.g. {called(first.plan)}")
    if len(groups) > REASONS:
        left = sum(map(len, groups[REASONS:]))
        said.append(f"  {left:,} more, for {len(groups) - REASONS} other reasons (--json has all)")
    return said


def _worth(found: Ranking) -> list[str]:
    worth = found.worth
    if worth is None or len(worth.points) < 2:
        return []
    assert found.choice is not None
    priced = worth.points[0].price is not None
    said = ["", f"How many workers are worth it, with {found.choice.plan.strategy}:"]
    for point in worth.points:
        gain = "" if point.gain is None else f", × {point.gain:.2f} a doubling"
        price = "" if point.price is None else f", {point.price:.3g} an epoch"
        said.append(
            f"  {point.workers:>6,} workers × {point.plan.threads}: an epoch {seconds(point.epoch_s)}{gain}{price}"
        )
    said.append(f"  knee: {_of(worth.knee)}, the last up to which a doubling makes it {KNEE} times as fast")
    least = "price" if priced else "worker-seconds"
    return [*said, f"  fastest: {_of(worth.fastest)}; least {least} an epoch: {_of(worth.cheapest)}"]


def _of(point: Point) -> str:
    return "1 worker" if point.workers == 1 else f"{point.workers:,} workers"
