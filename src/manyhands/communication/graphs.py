"""Who exchanges with whom: graphs over P ranks, as the rounds of a mixing x_q ← Σ_p W_qp x_p.

W_qp is the share of rank p's vector in what rank q holds afterwards. A graph is a tuple of rounds that are used in
turn; in each, every rank sends to d others. All columns of W add up to 1, so that Σ_p x_p is conserved; where all rows
do too (W is *doubly stochastic*) every x_p tends to the mean, else x_p / w_p does (`consistency.push_sum`).

    graph             rounds     d           W               gap of a period
    ring              1          2           1/3             ⅔ (1 − cos 2π/P)
    torus             1          2 to 4      1/(d+1)         P = a·b with a, b ≥ 2, as square as can be
    complete          1          P−1         1/P             1
    random_regular    1          given       1/(d+1)         of a random graph: bounded from below as P grows
    exponential       1          ⌈log₂P⌉     1/(d+1)         2/(1 + ⌈log₂P⌉) for even P     to p + 2^k for all k
    one_peer          ⌈log₂P⌉    1           1/2             1 for P = 2^k: the exact mean  to p + 2^k in round k
    matching          P−1        1           1/2             for even P; every pair meets once a period
    directed_ring     1          1           1/2             to p + 1
    random_directed   1          given       1/(d+1)         columns add up to 1, rows do not

The gap is 1 − |λ₂| of the product of all rounds: disagreement shrinks as (1 − gap)^periods. Exponential graphs are
circulant, hence doubly stochastic for every P; where P is no power of two ``one_peer`` still tends to the mean but does
not reach it.

Papers: X. Lian et al. (2017), arXiv:1705.09056 (ring); B. Ying et al. (2021), arXiv:2110.13363 (exponential and
one-peer, their Proposition 1 and Lemma 1); M. Assran et al. (2019), arXiv:1811.10792 (both, for push-sum); L. Xiao, S.
Boyd & S.-J. Kim (2007), Distributed average consensus with least-mean-square deviation (Metropolis weights). Pairs that
meet once each are a round-robin tournament by the circle method.
"""

import functools
import inspect
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from manyhands.errors import BadInput


@dataclass(frozen=True)
class Mixing:
    """One round: ``shares[p][q]`` is W_qp, what rank q takes of rank p's vector; p itself included."""

    shares: tuple[Mapping[int, float], ...]

    @property
    def size(self) -> int:
        """P."""
        return len(self.shares)

    def receivers(self, rank: int) -> tuple[int, ...]:
        """To whom ``rank`` sends, in rank order."""
        return tuple(sorted(q for q in self.shares[rank] if q != rank))

    def taken(self, rank: int) -> dict[int, float]:
        """Row ``rank`` of W where it is not 0: from whom, in rank order and ``rank`` included, and which share."""
        return {p: to[rank] for p, to in enumerate(self.shares) if rank in to}

    def matrix(self) -> Float64[Tensor, "p p"]:
        """W."""
        w = torch.zeros(self.size, self.size, dtype=torch.float64)
        for p, to in enumerate(self.shares):
            for q, share in to.items():
                w[q, p] = share
        return w


#: The rounds of a graph, used in turn.
Graph = tuple[Mixing, ...]


# -- weights -----------------------------------------------------------------------------------------------------------


def uniform(receivers: Sequence[Collection[int]]) -> Mixing:
    """Equal shares of each rank's vector for itself and its d receivers: columns add up to 1.

    So do the rows where all ranks send to and hear from equally many.
    """
    return Mixing(tuple(dict.fromkeys(sorted({p, *to}), 1.0 / len({p, *to})) for p, to in enumerate(receivers)))


def metropolis(neighbours: Sequence[Collection[int]]) -> Mixing:
    """W_qp = 1 / (1 + max(d_p, d_q)) between neighbours and the rest for oneself: doubly stochastic on any graph.

    ``neighbours`` is symmetric: an undirected graph. Where all have d neighbours every share is 1/(d+1).
    """
    degrees = [len(set(near) - {p}) for p, near in enumerate(neighbours)]
    shares = []
    for p, near in enumerate(neighbours):
        own = 1.0 / (1 + degrees[p])
        to = {q: 1.0 / (1 + max(degrees[p], degrees[q])) for q in set(near) - {p}}
        if any(p not in neighbours[q] for q in to):
            raise ValueError(f"the neighbours of rank {p} do not all name it: Metropolis weights are for both ways")
        to[p] = own + sum(own - share for share in to.values())
        shares.append(dict(sorted(to.items())))
    return Mixing(tuple(shares))


def _circulant(size: int, hops: Collection[int]) -> Mixing:
    return uniform([[(p + hop) % size for hop in hops] for p in range(size)])


# -- graphs: doubly stochastic -----------------------------------------------------------------------------------------


def ring(size: int) -> Graph:
    """Both neighbours."""
    return (metropolis([{(p - 1) % size, (p + 1) % size} for p in range(size)]),)


def torus(size: int) -> Graph:
    """A grid of a × b ranks whose edges meet; each has its neighbours along both sides."""
    a, b = sides(size)
    near = []
    for p in range(size):
        y, x = divmod(p, b)
        near.append({(y + 1) % a * b + x, (y - 1) % a * b + x, y * b + (x + 1) % b, y * b + (x - 1) % b})
    return (metropolis(near),)


def sides(size: int) -> tuple[int, int]:
    """The most square a × b = ``size``, a ≤ b."""
    a = max(a for a in range(1, size + 1) if size % a == 0 and a * a <= size)
    return a, size // a


def complete(size: int) -> Graph:
    """Everybody: one exchange gives all the exact mean."""
    return (metropolis([range(size)] * size),)


def random_regular(size: int, degree: int, seed: int = 0) -> Graph:
    """``degree`` neighbours each, drawn from ``seed``, connected; such graphs mix fast at a cost that does not grow.

    A regular circulant graph of which random pairs of edges swap ends; that changes nobody's degree.
    """
    rng = random.Random(seed)
    near = [{(p + hop) % size for hop in _balanced_hops(size, degree)} for p in range(size)]
    edges = [(p, q) for p in range(size) for q in sorted(near[p]) if p < q]
    while True:
        for _ in range(SWAPS * len(edges)):
            _swap_ends(edges, near, rng)
        graph = (metropolis(near),)
        if connected(graph):
            return graph


#: Tries an edge: many times what it takes to forget the start (each try meets two edges). Own choice.
SWAPS = 10


def _balanced_hops(size: int, degree: int) -> list[int]:
    """Hops there and back, and to the opposite rank where ``degree`` is odd."""
    there = [h for hop in range(1, degree // 2 + 1) for h in (hop, -hop)]
    return [*there, size // 2] if degree % 2 else there


def _swap_ends(edges: list[tuple[int, int]], near: list[set[int]], rng: random.Random) -> None:
    """Edges a–b and c–d become a–d and c–b, unless one of those is there already."""
    i, j = rng.randrange(len(edges)), rng.randrange(len(edges))
    (a, b), (c, d) = edges[i], edges[j]
    if rng.random() < 0.5:
        c, d = d, c
    if len({a, b, c, d}) < 4 or d in near[a] or b in near[c]:
        return
    for p, old, new in ((a, b, d), (b, a, c), (c, d, b), (d, c, a)):
        near[p].remove(old)
        near[p].add(new)
    edges[i], edges[j] = (a, d), (c, b)


def exponential(size: int) -> Graph:
    """To the ranks 1, 2, 4, 8 … further on."""
    return (_circulant(size, _powers(size)),)


def one_peer(size: int) -> Graph:
    """In round k to the rank 2^k further on: ⌈log₂P⌉ rounds, after which all have heard of all."""
    return tuple(_circulant(size, [hop]) for hop in _powers(size)) or (_circulant(size, []),)


def _powers(size: int) -> list[int]:
    return [2**k for k in range((size - 1).bit_length())]


def matching(size: int, seed: int = 0) -> Graph:
    """Pairs, disjoint in each round; every two ranks meet once in P−1 rounds, in an order drawn from ``seed``."""
    rng = random.Random(seed)
    who, last = rng.sample(range(size), size), size - 1
    rounds = []
    for r in range(last):
        pairs = [(last, r), *(((r + i) % last, (r - i) % last) for i in range(1, size // 2))]
        near: list[set[int]] = [set() for _ in range(size)]
        for a, b in pairs:
            near[who[a]].add(who[b])
            near[who[b]].add(who[a])
        rounds.append(metropolis(near))
    rng.shuffle(rounds)
    return tuple(rounds) or ring(size)


# -- graphs: one way ---------------------------------------------------------------------------------------------------


def directed_ring(size: int) -> Graph:
    """To the next rank only."""
    return (_circulant(size, {1 % size}),)


def random_directed(size: int, degree: int, seed: int = 0) -> Graph:
    """Each to ``degree`` others drawn from ``seed``: the next on a random round trip, which connects all, and more.

    How many a rank hears from differs.
    """
    rng = random.Random(seed)
    trip = rng.sample(range(size), size)
    to: list[list[int]] = [[] for _ in range(size)]
    for i, p in enumerate(trip):
        following = trip[(i + 1) % size]
        others = [q for q in range(size) if q not in (p, following)]
        to[p] = [following, *rng.sample(others, degree - 1)]
    return (uniform(to),)


#: The table of contents: from the number of ranks (and degree and seed, where it is random) to the graph.
GRAPHS: dict[str, Callable[..., Graph]] = {
    "ring": ring,
    "torus": torus,
    "exponential": exponential,
    "complete": complete,
    "random_regular": random_regular,
    "one_peer": one_peer,
    "matching": matching,
    "directed_ring": directed_ring,
    "random_directed": random_directed,
}

#: Those whose degree can be chosen.
OF_A_DEGREE = ("random_regular", "random_directed")


@functools.lru_cache(maxsize=256)
def build(graph: str, size: int, degree: int | None = None, seed: int = 0) -> Graph:
    """``GRAPHS[graph]`` for ``size`` ranks, with what it takes of the rest; refuses what `objection` names."""
    why = objection(graph, size, degree)
    if why is not None:
        raise BadInput(f"a graph {graph!r} over {size} ranks: {' '.join(why)}")
    if size == 1:
        return (uniform([[]]),)
    given = {"degree": default_degree(graph, size) if degree is None else degree, "seed": seed}
    make = GRAPHS[graph]
    return make(size, **{name: given[name] for name in inspect.signature(make).parameters if name in given})


def default_degree(graph: str, size: int) -> int:
    """Where nobody chose one: the least that connects a random graph of many ranks well and that P ranks can have."""
    if graph == "random_directed":
        return min(2, size - 1)
    return min(3 if size % 2 == 0 else 4, size - 1)


def objection(graph: str, size: int, degree: int | None = None) -> tuple[str, str] | None:
    """Why there is no such graph, as the rule and what would work; None where there is. One rank needs no graph."""
    if size == 1:
        return None
    if graph == "torus" and sides(size)[0] == 1:
        return f"both sides of a torus have 2 ranks or more, and {size} is prime.", "Use graph='ring' or 'one_peer'."
    if graph == "matching" and size % 2:
        return f"{size} ranks cannot all be in pairs.", "Use graph='one_peer', or an even number of workers."
    if graph not in OF_A_DEGREE or degree is None:
        return None
    if degree >= size:
        return f"a rank has {size - 1} others to exchange with.", f"Use degree={size - 1} or less."
    if graph == "random_regular" and degree * size % 2:
        rule = f"{size} ranks of degree {degree} make {degree * size} ends of edges, and an edge has two."
        return rule, f"Use degree={degree - 1 if degree > 2 else degree + 1}, or an even number of workers."
    if graph == "random_regular" and degree == 1 and size > 2:
        return "one neighbour each makes pairs that never hear of each other.", "Use degree=2 or more."
    return None


def fits_any_size(graph: str, degree: int | None = None) -> bool:
    """Whether there is such a graph for every number of ranks, so that it can be drawn anew when they become fewer."""
    return graph not in ("torus", "matching") and (graph not in OF_A_DEGREE or degree is None)


# -- what a graph is worth ---------------------------------------------------------------------------------------------


def spectral_gap(graph: Graph) -> float:
    """1 − |λ₂| of the product of all rounds: disagreement shrinks as (1 − gap)^periods; 0 where it does not."""
    if graph[0].size == 1:
        return 1.0
    product = functools.reduce(lambda done, mixing: mixing.matrix() @ done, graph[1:], graph[0].matrix())
    moduli = torch.linalg.eigvals(product).abs().sort(descending=True).values
    return max(0.0, 1.0 - float(moduli[1]))


def reach(graph: Graph) -> int | None:
    """After how many exchanges at most everybody has heard of what one rank knew, whichever round comes first.

    None: never, the graph does not connect its ranks.
    """
    longest = 0
    for start in range(len(graph)):
        count = _exchanges(graph, start)
        if count is None:
            return None
        longest = max(longest, count)
    return longest


def _exchanges(graph: Graph, start: int) -> int | None:
    size = graph[0].size
    known, everything = [1 << p for p in range(size)], (1 << size) - 1
    done = 0
    # A period that tells nobody anything new is the last that could have.
    while any(knows != everything for knows in known):
        before = list(known)
        for _ in graph:
            known, heard = [0] * size, known
            for p, to in enumerate(graph[(start + done) % len(graph)].shares):
                for q in to:
                    known[q] |= heard[p]
            done += 1
            if all(knows == everything for knows in known):
                return done
        if known == before:
            return None
    return done


def connected(graph: Graph) -> bool:
    """Whether what any rank knows reaches all others in the end."""
    return reach(graph) is not None
