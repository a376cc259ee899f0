"""Collectives over send and receive, as pure algorithms: a schedule is data.

Each function gives one rank's rounds for a vector that is cut over the ranks by ``bounds``; nothing here talks to
anyone (`schedule.run` does). ``run(ring_all_reduce(comm.rank, even(x.numel(), comm.size)), x, comm)`` is an all-reduce.

    P ranks, n elements, b_r = the slice of rank r        rounds              elements that a rank sends
    ring_reduce_scatter                                   P−1                 n − |b_r|
    ring_all_gather                                       P−1                 n − |b_(r−1)|
    ring_all_reduce                                       2(P−1)              2(P−1)/P · n        least possible
    recursive_doubling_all_reduce                         log₂P               n·log₂P             least latency
    recursive_halving_reduce_scatter                      log₂P               n − |b_r|
    recursive_doubling_all_gather                         log₂P               (P−1)/P · n
    rabenseifner_all_reduce                               2·log₂P             2(P−1)/P · n        both low, for P = 2^k
    binomial_reduce                                       ⌈log₂P⌉             n (the root: 0)
    binomial_broadcast                                    ⌈log₂P⌉             n · (its children)

Where P is no power of two, the halving and doubling algorithms first *fold*: of the first 2(P − 2^k) ranks each even
one hands everything to its odd neighbour and waits for the result at the end, which costs two more rounds and up to n
more elements. `Algorithm.cost` gives the exact figures for every rank, P and n.

An all-gather is a reduce-scatter run backwards, copying where that one adds, and a broadcast is such a reduce: they are
built that way (`schedule.mirror`). Sums are in the order of the schedule, which is the same on every run; after an
all-reduce all ranks hold the same bits, because addition commutes and partners add the same two numbers.

Papers: P. Patarasu, X. Yuan (2009), Bandwidth optimal all-reduce algorithms for clusters of workstations, J. Parallel
Distrib. Comput. 69(2) (ring). R. Thakur, R. Rabenseifner, W. Gropp (2005), Optimization of collective communication
operations in MPICH, Int. J. High Perform. Comput. Appl. 19(1) (recursive doubling, recursive halving, binomial trees,
fold). R. Rabenseifner (2004), Optimization of collective reduction operations, ICCS, LNCS 3036 (halving + doubling).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from manyhands.communication.schedule import Bounds, Operation, Receive, Round, Schedule, Send, Then, mirror, span


def even(numel: int, size: int) -> Bounds:
    """Cut ``numel`` elements into ``size`` slices whose lengths differ by one at most."""
    return [(numel * r // size, numel * (r + 1) // size) for r in range(size)]


# -- ring ------------------------------------------------------------------------------------------------------------


def ring_reduce_scatter(rank: int, bounds: Bounds) -> Schedule:
    """Partial sums travel once round the ring; rank r ends with the sum of slice r (Patarasu & Yuan 2009)."""
    size = len(bounds)
    left, right = (rank - 1) % size, (rank + 1) % size
    return tuple(
        Round(
            _sends(right, bounds[(rank - 1 - k) % size]),
            _receives(left, bounds[(rank - 2 - k) % size], "add"),
        )
        for k in range(size - 1)
    )


def ring_all_gather(rank: int, bounds: Bounds) -> Schedule:
    """Each slice travels once round the ring (Patarasu & Yuan 2009): the reduce-scatter backwards."""
    return mirror(ring_reduce_scatter(rank, bounds))


def ring_all_reduce(rank: int, bounds: Bounds) -> Schedule:
    """Reduce-scatter, then all-gather, both round the ring (Patarasu & Yuan 2009): the fewest bytes there can be."""
    return ring_reduce_scatter(rank, bounds) + ring_all_gather(rank, bounds)


# -- recursive doubling and halving ------------------------------------------------------------------------------------


def recursive_doubling_all_reduce(rank: int, bounds: Bounds) -> Schedule:
    """Partners at distance 1, 2, 4 … exchange whole vectors (Thakur et al. 2005): the fewest rounds, for short ones."""
    place, whole = _Place(rank, len(bounds)), span(bounds)
    exchange = tuple(
        Round(_sends(partner, whole), _receives(partner, whole, "add")) for partner in place.partners(range(place.k))
    )
    return place.fold(whole) + exchange + mirror(place.fold(whole))


def recursive_halving_reduce_scatter(rank: int, bounds: Bounds) -> Schedule:
    """Partners at distance P/2, P/4 … 1 exchange the half the other one keeps; rank r ends with slice r
    (Thakur et al. 2005).
    """
    place = _Place(rank, len(bounds))
    pairs = place.extra  # the first of the remaining ranks answer for the slice of the rank that folded into them, too
    joined = [(bounds[2 * v][0], bounds[2 * v + 1][1]) for v in range(pairs)] + list(bounds[2 * pairs :])
    schedule = place.fold(span(bounds)) + place.halving(joined)
    if not pairs:
        return schedule
    if place.folded:
        return (*schedule, Round((), _receives(rank + 1, bounds[rank], "copy")))
    return (*schedule, Round(_sends(rank - 1, bounds[rank - 1]) if place.took_in else ()))


def recursive_doubling_all_gather(rank: int, bounds: Bounds) -> Schedule:
    """Partners at distance 1, 2, 4 … exchange all they have (Thakur et al. 2005): the reduce-scatter backwards."""
    return mirror(recursive_halving_reduce_scatter(rank, bounds))


def rabenseifner_all_reduce(rank: int, bounds: Bounds) -> Schedule:
    """Recursive halving, then recursive doubling (Rabenseifner 2004): few rounds and few bytes, for 2^k ranks.

    The slices of the exchange are cut over the largest power of two, whatever ``bounds`` says.
    """
    place, whole = _Place(rank, len(bounds)), span(bounds)
    halving = place.fold(whole) + place.halving(even(whole[1], 1 << place.k))
    return halving + mirror(halving)


@dataclass(frozen=True)
class _Place:
    """Where a rank stands among the largest power of two that fits: it is ``vrank`` of ``2**k``, or folded into it."""

    rank: int
    size: int

    @property
    def k(self) -> int:
        return self.size.bit_length() - 1

    @property
    def extra(self) -> int:
        return self.size - (1 << self.k)

    @property
    def folded(self) -> bool:
        return self.rank < 2 * self.extra and self.rank % 2 == 0

    @property
    def took_in(self) -> bool:
        return self.rank < 2 * self.extra and self.rank % 2 == 1

    @property
    def vrank(self) -> int:
        return self.rank // 2 if self.rank < 2 * self.extra else self.rank - self.extra

    def partners(self, bits: Sequence[int]) -> list[int | None]:
        """The ranks whose vrank differs in each of ``bits``; None for a rank that sits out."""
        if self.folded:
            return [None for _ in bits]
        virtual = [self.vrank ^ (1 << bit) for bit in bits]
        return [2 * v + 1 if v < self.extra else v + self.extra for v in virtual]

    def fold(self, whole: tuple[int, int]) -> Schedule:
        """One round in which the extra ranks hand over what they have, or none for a power of two."""
        if not self.extra:
            return ()
        if self.folded:
            return (Round(_sends(self.rank + 1, whole)),)
        return (Round((), _receives(self.rank - 1, whole, "add") if self.took_in else ()),)

    def halving(self, bounds: Bounds) -> Schedule:
        """Recursive halving among the ``2**k`` that did not fold; ``bounds`` has one slice for each of them."""
        bits = range(self.k - 1, -1, -1)
        rounds = []
        for bit, partner in zip(bits, self.partners(bits), strict=True):
            if partner is None:
                rounds.append(Round())
                continue
            mine, other = (_block(bounds, v, bit) for v in (self.vrank, self.vrank ^ (1 << bit)))
            rounds.append(Round(_sends(partner, other), _receives(partner, mine, "add")))
        return tuple(rounds)


def _block(bounds: Bounds, vrank: int, bit: int) -> tuple[int, int]:
    """The slices of the aligned block of ``2**bit`` neighbours in which ``vrank`` lies, as one."""
    first = vrank >> bit << bit
    return bounds[first][0], bounds[first + (1 << bit) - 1][1]


# -- binomial trees ----------------------------------------------------------------------------------------------------


def binomial_reduce(rank: int, bounds: Bounds, root: int = 0) -> Schedule:
    """Partial sums climb a binomial tree; the root ends with the sum, the others with leftovers (Thakur et al.)."""
    size, whole = len(bounds), span(bounds)
    place = (rank - root) % size
    rounds = []
    for bit in range(_tree_depth(size) - 1, -1, -1):
        far = 1 << bit
        if far <= place < 2 * far:
            rounds.append(Round(_sends((rank - far) % size, whole)))
        elif place < far and place + far < size:
            rounds.append(Round((), _receives((rank + far) % size, whole, "add")))
        else:
            rounds.append(Round())
    return tuple(rounds)


def binomial_broadcast(rank: int, bounds: Bounds, root: int = 0) -> Schedule:
    """Who has the vector passes it on, twice as many each round (Thakur et al. 2005): the reduce backwards."""
    return mirror(binomial_reduce(rank, bounds, root))


# -- building blocks ---------------------------------------------------------------------------------------------------


def _tree_depth(size: int) -> int:
    return (size - 1).bit_length()


def _sends(to: int | None, bounds: tuple[int, int]) -> tuple[Send, ...]:
    """One send, or none where there is nobody or nothing: an empty slice is no message, on either side."""
    return () if to is None or bounds[0] == bounds[1] else (Send(to, *bounds),)


def _receives(frm: int | None, bounds: tuple[int, int], then: Then) -> tuple[Receive, ...]:
    return () if frm is None or bounds[0] == bounds[1] else (Receive(frm, *bounds, then),)


# -- what there is, and what it costs ----------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What a schedule costs one rank: rounds (latency) and elements that it sends (bandwidth)."""

    rounds: int
    elements: int


@dataclass(frozen=True)
class Algorithm:
    """One way to do an operation; ``cost`` is the closed form, for rank r and the given slices (root 0)."""

    operation: Operation
    schedule: Callable[[int, Bounds], Schedule]
    cost: Callable[[int, Bounds], Cost]


def _length(bounds: tuple[int, int]) -> int:
    return bounds[1] - bounds[0]


def _ring_cost(rank: int, bounds: Bounds, *, kept: Sequence[int]) -> Cost:
    n = _length(span(bounds))
    return Cost(len(kept) * (len(bounds) - 1), sum(n - _length(bounds[(rank + shift) % len(bounds)]) for shift in kept))


def _recursive_doubling_cost(rank: int, bounds: Bounds) -> Cost:
    place, n = _Place(rank, len(bounds)), _length(span(bounds))
    rounds = place.k + (2 if place.extra else 0)
    return Cost(rounds, n if place.folded else n * (place.k + place.took_in))


def _recursive_halving_cost(rank: int, bounds: Bounds) -> Cost:
    place, n = _Place(rank, len(bounds)), _length(span(bounds))
    return Cost(place.k + (2 if place.extra else 0), n if place.folded else n - _length(bounds[rank]))


def _doubling_gather_cost(rank: int, bounds: Bounds) -> Cost:
    """A rank passes on its block of 1, 2, 4 … slices, and all of them to the rank that folded into it."""
    place, n = _Place(rank, len(bounds)), _length(span(bounds))
    rounds = place.k + (2 if place.extra else 0)
    if place.folded:
        return Cost(rounds, _length(bounds[rank]))
    vranks = [_Place(r, len(bounds)).vrank for r in range(len(bounds))]
    blocks = [[r for r, v in enumerate(vranks) if v >> bit == place.vrank >> bit] for bit in range(place.k)]
    sent = sum(_length(bounds[r]) for block in blocks for r in block)
    return Cost(rounds, sent + (n if place.took_in else 0))


def _rabenseifner_cost(rank: int, bounds: Bounds) -> Cost:
    place, n = _Place(rank, len(bounds)), _length(span(bounds))
    rounds = 2 * (place.k + (1 if place.extra else 0))
    if place.folded:
        return Cost(rounds, n)
    slices = even(n, 1 << place.k)
    # Halving sends all but the own slice; doubling sends the own block of 1, 2, 4 … slices.
    halving = n - _length(slices[place.vrank])
    doubling = sum(_length(_block(slices, place.vrank, bit)) for bit in range(place.k))
    return Cost(rounds, halving + doubling + (n if place.took_in else 0))


def _binomial_reduce_cost(rank: int, bounds: Bounds) -> Cost:
    return Cost(_tree_depth(len(bounds)), 0 if rank == 0 else _length(span(bounds)))


def _binomial_broadcast_cost(rank: int, bounds: Bounds) -> Cost:
    depth, size = _tree_depth(len(bounds)), len(bounds)
    children = sum(rank < 2**bit and rank + 2**bit < size for bit in range(depth))
    return Cost(depth, children * _length(span(bounds)))


#: Every algorithm of this file.
ALGORITHMS: dict[str, Algorithm] = {
    "ring_all_reduce": Algorithm("all_reduce", ring_all_reduce, lambda r, b: _ring_cost(r, b, kept=(0, -1))),
    "recursive_doubling_all_reduce": Algorithm("all_reduce", recursive_doubling_all_reduce, _recursive_doubling_cost),
    "rabenseifner_all_reduce": Algorithm("all_reduce", rabenseifner_all_reduce, _rabenseifner_cost),
    "ring_reduce_scatter": Algorithm("reduce_scatter", ring_reduce_scatter, lambda r, b: _ring_cost(r, b, kept=(0,))),
    "recursive_halving_reduce_scatter": Algorithm(
        "reduce_scatter", recursive_halving_reduce_scatter, _recursive_halving_cost
    ),
    "ring_all_gather": Algorithm("all_gather", ring_all_gather, lambda r, b: _ring_cost(r, b, kept=(-1,))),
    "recursive_doubling_all_gather": Algorithm("all_gather", recursive_doubling_all_gather, _doubling_gather_cost),
    "binomial_reduce": Algorithm("reduce", binomial_reduce, _binomial_reduce_cost),
    "binomial_broadcast": Algorithm("broadcast", binomial_broadcast, _binomial_broadcast_cost),
}
