"""Zero bubble, ZB-H1: nobody waits for a weight gradient, so it is computed where there is nothing else to do.

P. Qi, X. Wan, G. Huang, M. Lin (2023), Zero bubble pipeline parallelism, arXiv 2401.10241 (ICLR 2024), section 2.

Backward is split into I (gradient of the inputs; what the stage before waits for) and W (gradient of the weights). It
is 1F1B with I for B; stage k leaves k weight gradients undone, and does them while it would wait at the end. With costs
f, i, w, and m ≥ p:

    bubble      (p − 1)·(f + i − w) / (m·(f + i + w) + (p − 1)·(f + i − w)): a third of 1F1B's idle time at f = i = w
    in flight   min(p, m) on every rank: the most of 1F1B, which its first stage has
"""

from __future__ import annotations

from manyhands.catalogue import Reference
from manyhands.partition.pipeline.schedule import Action, Schedule, schedule, sizes


def zero_bubble(ranks: int, micro_batches: int) -> Schedule:
    """ZB-H1 on ``ranks`` stages."""
    sizes("zero_bubble", ranks, micro_batches)
    return schedule([_stage(k, ranks, micro_batches) for k in range(ranks)])


def _stage(k: int, ranks: int, micro_batches: int) -> list[Action]:
    ahead = min(ranks - 1 - k, micro_batches)
    row = [Action("F", k, i) for i in range(ahead)]
    done = 0  # weight gradients so far
    for i in range(micro_batches):
        forward = ahead + i < micro_batches
        if forward:
            row.append(Action("F", k, ahead + i))
        row.append(Action("I", k, i))
        # While forwards last, k are left over; then each wait for the next I is filled with one.
        if done <= i - k or not forward:
            row.append(Action("W", k, done))
            done += 1
    return [*row, *(Action("W", k, i) for i in range(done, micro_batches))]


def bubble(ranks: int, micro_batches: int, f: float = 1, i: float = 1, w: float = 1) -> float:
    """The closed form, for equal stages, ``micro_batches`` ≥ ``ranks`` and w no more than f and i."""
    idle = (ranks - 1) * (f + i - w)
    return idle / (micro_batches * (f + i + w) + idle)


def in_flight(ranks: int, micro_batches: int) -> list[int]:
    """The bound: how many micro-batches a rank holds at most, each until its W is done."""
    return [min(ranks, micro_batches)] * ranks


vars(zero_bubble)["paper"] = Reference(
    "P. Qi, X. Wan, G. Huang, M. Lin",
    "Zero bubble pipeline parallelism",
    2023,
    "ICLR 2024, arXiv 2401.10241",
    survey="V-C",
)
