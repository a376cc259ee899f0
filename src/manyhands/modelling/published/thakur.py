"""Collectives by the algorithm that does them: α a message, β a byte on the wire, γ a byte added up.

R. Thakur, R. Rabenseifner, W. Gropp 2005, "Optimization of Collective Communication Operations in MPICH", IJHPCA 19(1),
49-66. The ring all-reduce is P. Patarasuk, X. Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", JPDC 69(2), 117-124.

n is the size in bytes of the whole vector: of an all-gather the gathered one, of a reduce-scatter the one that is added
up. Ranks send and receive at once; what one rank does is what all do. Where the number of ranks is no power of two,
halving and doubling first fold the ranks beyond the last power into others, as the paper does; the price of that fold
is derived here from this project's own schedules (`manyhands.communication.collectives`), which count the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from manyhands.catalogue import Reference
from manyhands.errors import UnknownName


@dataclass(frozen=True)
class Hop:
    """What one message between two ranks costs: seconds, seconds per byte, seconds per byte that is added up."""

    latency_s: float
    s_per_B: float
    reduce_s_per_B: float = 0.0

    def cost(self, messages: float, sent_B: float, reduced_B: float = 0.0) -> float:
        """Seconds of so many messages in a row, with so many bytes in all."""
        return self.latency_s * messages + self.s_per_B * sent_B + self.reduce_s_per_B * reduced_B


def ring_all_reduce_s(size_B: float, ranks: int, hop: Hop) -> float:
    """2(p−1)α + 2(p−1)/p·nβ + (p−1)/p·nγ: the fewest bytes, the most messages."""
    part = (ranks - 1) / ranks
    return hop.cost(2 * (ranks - 1), 2 * part * size_B, part * size_B)


def ring_reduce_scatter_s(size_B: float, ranks: int, hop: Hop) -> float:
    """(p−1)α + (p−1)/p·n(β + γ)."""
    part = (ranks - 1) / ranks
    return hop.cost(ranks - 1, part * size_B, part * size_B)


def ring_all_gather_s(size_B: float, ranks: int, hop: Hop) -> float:
    """(p−1)α + (p−1)/p·nβ."""
    return hop.cost(ranks - 1, (ranks - 1) / ranks * size_B)


def recursive_doubling_all_reduce_s(size_B: float, ranks: int, hop: Hop) -> float:
    """log₂p·(α + n(β + γ)): the fewest messages, for small vectors. A fold costs two messages more."""
    doublings, fold = _power(ranks)
    return hop.cost(doublings + 2 * fold, (doublings + 2 * fold) * size_B, (doublings + fold) * size_B)


def recursive_halving_reduce_scatter_s(size_B: float, ranks: int, hop: Hop) -> float:
    """log₂p·α + (p−1)/p·n(β + γ); else a fold of the whole vector before and of one slice after it."""
    doublings, fold = _power(ranks)
    part = _halved(ranks) + fold
    return hop.cost(doublings + 2 * fold, (part + fold / ranks) * size_B, part * size_B)


def recursive_doubling_all_gather_s(size_B: float, ranks: int, hop: Hop) -> float:
    """log₂p·α + (p−1)/p·nβ: the reduce-scatter backwards, without the adding."""
    doublings, fold = _power(ranks)
    return hop.cost(doublings + 2 * fold, (_halved(ranks) + fold + fold / ranks) * size_B)


def rabenseifner_all_reduce_s(size_B: float, ranks: int, hop: Hop) -> float:
    """2·log₂p·α + 2(p−1)/p·nβ + (p−1)/p·nγ, by halving, then doubling. A fold costs two whole vectors more."""
    doublings, fold = _power(ranks)
    part = (2**doublings - 1) / 2**doublings
    return hop.cost(2 * doublings + 2 * fold, 2 * (part + fold) * size_B, (part + fold) * size_B)


def binomial_broadcast_s(size_B: float, ranks: int, hop: Hop) -> float:
    """⌈log₂p⌉·(α + nβ)."""
    depth = _depth(ranks)
    return hop.cost(depth, depth * size_B)


def binomial_reduce_s(size_B: float, ranks: int, hop: Hop) -> float:
    """⌈log₂p⌉·(α + n(β + γ))."""
    depth = _depth(ranks)
    return hop.cost(depth, depth * size_B, depth * size_B)


def scatter_gather_broadcast_s(size_B: float, ranks: int, hop: Hop) -> float:
    """(⌈log₂p⌉ + p−1)α + 2(p−1)/p·nβ: van de Geijn's, for large vectors."""
    return hop.cost(_depth(ranks) + ranks - 1, 2 * (ranks - 1) / ranks * size_B)


def bruck_all_gather_s(size_B: float, ranks: int, hop: Hop) -> float:
    """⌈log₂p⌉·α + (p−1)/p·nβ, any number of ranks."""
    return hop.cost(_depth(ranks), (ranks - 1) / ranks * size_B)


def pairwise_all_to_all_s(size_B: float, ranks: int, hop: Hop) -> float:
    """(p−1)α + (p−1)/p·nβ; n is what one rank holds, its own part included."""
    return hop.cost(ranks - 1, (ranks - 1) / ranks * size_B)


def bruck_all_to_all_s(size_B: float, ranks: int, hop: Hop) -> float:
    """⌈log₂p⌉·(α + n/2·β), for small vectors; powers of two."""
    return hop.cost(_depth(ranks), _depth(ranks) * size_B / 2)


ALL_REDUCES: dict[str, Callable[[float, int, Hop], float]] = {
    "ring": ring_all_reduce_s,
    "recursive_doubling": recursive_doubling_all_reduce_s,
    "rabenseifner": rabenseifner_all_reduce_s,
}


def all_reduce_s(size_B: float, ranks: int, hop: Hop, *, algorithm: str | None = None) -> float:
    """Seconds of an all-reduce by ``algorithm`` (ring, recursive_doubling, rabenseifner); None: by the quickest."""
    if ranks == 1:
        return 0.0
    if algorithm is not None and algorithm not in ALL_REDUCES:
        raise UnknownName("all-reduce", algorithm, ALL_REDUCES)
    return min(f(size_B, ranks, hop) for name, f in ALL_REDUCES.items() if algorithm in (None, name))


vars(all_reduce_s)["paper"] = Reference(
    "R. Thakur, R. Rabenseifner, W. Gropp",
    "Optimization of collective communication operations in MPICH",
    2005,
    "IJHPCA 19(1), 49-66",
    survey="VI-B",
)


def _depth(ranks: int) -> int:
    return math.ceil(math.log2(ranks))


def _power(ranks: int) -> tuple[int, int]:
    """log₂ of the largest power of two that fits, and 1 if ranks are left over."""
    doublings = ranks.bit_length() - 1
    return doublings, int(ranks != 2**doublings)


def _halved(ranks: int) -> float:
    """The part of a vector that passes in all halvings: of two blocks the heavier, with those that folded into it."""
    doublings, _ = _power(ranks)
    extra = ranks - (1 << doublings)
    return sum((1 << bit) + min(extra, 1 << bit) for bit in range(doublings)) / ranks
