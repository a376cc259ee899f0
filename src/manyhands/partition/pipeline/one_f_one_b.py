"""1F1B with a flush: a backward as soon as it can be, so that few micro-batches are held; as fast as GPipe.

D. Narayanan, A. Phanishayee, K. Shi, X. Chen, M. Zaharia (2021), Memory-efficient pipeline-parallel DNN training, ICML,
arXiv 2006.09503 (there "PipeDream-Flush"); the order is that of PipeDream (2019) within a batch.

Stage k of p does min(p − 1 − k, m) forwards, then a forward and a backward in turn, then the backwards that are left:

    bubble      (p − 1) / (m + p − 1), as GPipe
    in flight   min(p − k, m) at stage k: 4, 3, 2, 1 with p = 4 and m = 8, where GPipe holds 8 everywhere
"""

from __future__ import annotations

from manyhands.catalogue import Reference
from manyhands.partition.pipeline.schedule import Action, Schedule, schedule, sizes


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """1F1B on ``ranks`` stages."""
    sizes("one_f_one_b", ranks, micro_batches)
    return schedule([alternating(k, min(ranks - 1 - k, micro_batches), micro_batches) for k in range(ranks)])


def alternating(k: int, ahead: int, micro_batches: int) -> list[Action]:
    """What stage ``k`` does that goes ``ahead`` by so many forwards."""
    row = [Action("F", k, i) for i in range(ahead)]
    for i in range(micro_batches):
        if ahead + i < micro_batches:
            row.append(Action("F", k, ahead + i))
        row.append(Action("B", k, i))
    return row


def in_flight(ranks: int, micro_batches: int) -> list[int]:
    """The closed form: how many micro-batches each rank holds at most."""
    return [min(ranks - k, micro_batches) for k in range(ranks)]


vars(one_f_one_b)["paper"] = Reference(
    "D. Narayanan, A. Phanishayee, K. Shi, X. Chen, M. Zaharia",
    "Memory-efficient pipeline-parallel DNN training",
    2021,
    "ICML, arXiv 2006.09503",
    survey="V-C",
)
