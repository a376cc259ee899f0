"""GPipe: all forwards, then all backwards, then one update; identical to one worker with the same micro-batches.

Y. Huang, Y. Cheng, A. Bapna and others (2019), GPipe: efficient training of giant neural networks using pipeline
parallelism, NeurIPS 32, arXiv 1811.06965.

With p stages, m micro-batches and equal stages, whatever a forward and a backward cost:

    bubble      (p − 1) / (m + p − 1)
    in flight   m on every rank; which is why the paper recomputes activations
"""

from __future__ import annotations

from manyhands.catalogue import Reference
from manyhands.partition.pipeline.schedule import Action, Schedule, schedule, sizes


def gpipe(ranks: int, micro_batches: int) -> Schedule:
    """GPipe on ``ranks`` stages. Backwards go in the order of the forwards (the paper's figure: in reverse).

    So gradients add up in the order of one worker's micro-batches. The bubble is the same.
    """
    sizes("gpipe", ranks, micro_batches)
    each = range(micro_batches)
    return schedule([[*(Action("F", r, i) for i in each), *(Action("B", r, i) for i in each)] for r in range(ranks)])


def bubble(ranks: int, micro_batches: int) -> float:
    """The closed form, for equal stages."""
    return (ranks - 1) / (micro_batches + ranks - 1)


vars(gpipe)["paper"] = Reference(
    "Y. Huang, Y. Cheng, A. Bapna, O. Firat, D. Chen, M. Chen, H. Lee, J. Ngiam, Q. V. Le, Y. Wu, Z. Chen",
    "GPipe: efficient training of giant neural networks using pipeline parallelism",
    2019,
    "NeurIPS 32, arXiv 1811.06965",
    survey="V-C",
)
