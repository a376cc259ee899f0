"""Interleaved 1F1B: several smaller stages a rank, so that filling and draining take a fraction of the time.

D. Narayanan, M. Shoeybi, J. Casper and others (2021), Efficient large-scale language model training on GPU clusters
using Megatron-LM, SC, arXiv 2104.04473, section 2.2.

With v stages (chunks) on each of p ranks, stage s on rank s mod p, and m a multiple of p:

    bubble      (p − 1) / (v·m + p − 1)
    in flight   at most min(v·m, (v + 1)·p − 2r − 1) chunks on rank r, each 1/v of a rank's activations
    sent        v times as much as 1F1B: each micro-batch passes every rank v times
"""

from __future__ import annotations

from manyhands.catalogue import Reference
from manyhands.checks import whole
from manyhands.partition.pipeline.schedule import Action, Schedule, schedule, sizes


def interleaved(ranks: int, micro_batches: int, *, chunks: int = 2) -> Schedule:
    """Interleaved 1F1B on ``ranks · chunks`` stages.

    Micro-batches go in groups of ``ranks``. Where they do not divide, it is the order of the next multiple without the
    micro-batches that do not exist: right, with a somewhat larger bubble.
    """
    sizes("interleaved", ranks, micro_batches)
    whole("pipeline schedule interleaved: chunks", chunks)
    full = -(-micro_batches // ranks) * ranks
    made = schedule([_rank(r, ranks, full, chunks) for r in range(ranks)])
    return made.without(range(micro_batches, full))


def _rank(r: int, ranks: int, micro_batches: int, chunks: int) -> list[Action]:
    groups = [range(first, first + ranks) for first in range(0, micro_batches, ranks)]
    forwards = [Action("F", c * ranks + r, i) for group in groups for c in range(chunks) for i in group]
    backwards = [Action("B", c * ranks + r, i) for group in groups for c in reversed(range(chunks)) for i in group]
    # A rank's first backward comes after its micro-batch has passed all chunks, and went 2·(p − 1 − r) ranks on and
    # back.
    ahead = min(len(forwards), 2 * (ranks - 1 - r) + (chunks - 1) * ranks)
    row = forwards[:ahead]
    for n, backward in enumerate(backwards):
        row += [*forwards[ahead + n : ahead + n + 1], backward]
    return row


def bubble(ranks: int, micro_batches: int, chunks: int = 2) -> float:
    """The closed form, for equal stages and ``micro_batches`` a multiple of ``ranks``."""
    return (ranks - 1) / (chunks * micro_batches + ranks - 1)


def in_flight(ranks: int, micro_batches: int, chunks: int = 2) -> list[int]:
    """The closed form: how many (stage, micro-batch) each rank holds at most."""
    return [min(chunks * micro_batches, (chunks + 1) * ranks - 2 * r - 1) for r in range(ranks)]


vars(interleaved)["paper"] = Reference(
    "D. Narayanan, M. Shoeybi, J. Casper, P. LeGresley, M. Patwary, V. Korthikanti, D. Vainbrand, P. Kashinkunti, "
    "J. Bernauer, B. Catanzaro, A. Phanishayee, M. Zaharia",
    "Efficient large-scale language model training on GPU clusters using Megatron-LM",
    2021,
    "SC, arXiv 2104.04473",
    survey="V-C",
)
