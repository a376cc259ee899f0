"""Gossip, or decentralised SGD: each worker averages with its neighbours in a graph, nobody with all (survey §VI-A).

    θ_p ← u(θ_p, g_p),   then every ``every`` steps   θ_q ← Σ_p W_qp θ_p

θ_p worker p's parameters, u its optimizer, g_p the gradient of its share, W doubly stochastic: its rows and columns add
up to 1 (`communication.graphs`). So the exchange leaves the mean of all θ_p alone, and draws them together the faster
the larger W's spectral gap is. Workers weigh alike however many samples their shares hold; momenta stay their own.

Adapt, then combine. Lian et al. combine the θ at which the gradient was taken and then apply it (Algorithm 1), so that
both go on at once: θ_q ← Σ_p W_qp θ_p − η g_q. Here the update comes first, which costs that wait and bears more:
on a quadratic of curvature h it is stable for η < 2/h, as SGD is, and theirs for η < (1 + λ_min(W))/h. A complete graph
is then averaging after every step, and ``every`` > 1 local SGD over a graph.

``matching`` is AD-PSGD without its asynchrony. There a worker answers whoever asks, in the middle of a step; here each
exchange has its pairs beforehand, from the seed. A worker waits for its partner and never for the slowest of all,
nothing can deadlock, and every run gives the same result.

Papers: X. Lian, C. Zhang, H. Zhang, C.-J. Hsieh, W. Zhang & J. Liu (2017), Can decentralized algorithms outperform
centralized algorithms?, arXiv:1705.09056. One peer at a time: B. Ying, K. Yuan, Y. Chen, H. Hu, P. Pan & W. Yin (2021),
Exponential graph is provably efficient for decentralized deep training, arXiv:2110.13363. Pairs: X. Lian, W. Zhang,
C. Zhang & J. Liu (2018), Asynchronous decentralized parallel stochastic gradient descent, arXiv:1710.06952.

``compress`` is CHOCO-SGD. All neighbours of p know the same x̂_p of it, and each exchange is

    q_p = s C(θ_p − x̂_p), sent;   x̂_p ← x̂_p + q_p;   m_p ← m_p + Σ_j W_pj q_j;   θ_p ← θ_p + γ (m_p − x̂_p)

with m_p = Σ_j W_pj x̂_j, so that a worker keeps two vectors however many neighbours it has (A. Koloskova, S. U. Stich &
M. Jaggi 2019, Decentralized stochastic optimization and gossip algorithms with compressed communication,
arXiv:1902.00340, algorithms 2 and 6). What is not sent stays in θ_p − x̂_p, so there is no other residual. Since W is
doubly stochastic Σ_p (m_p − x̂_p) = 0, and an exchange conserves Σ_p θ_p whatever C leaves out. The same neighbours
hear every q_p: the graph is one that stays, and a lost worker ends the run. ``gamma`` γ: the less C sends the smaller;
left out it is twice the part of the values that is sent (`ratio`, `most`), at most 0.4, which is also that of schemes
that send all. s is 1, and 1/(1 + ω) for schemes that are unbiased with variance ω, which makes them contractions.

Without a worker that was killed the others go on: the share W_qp of a lost neighbour p is q's own. On graphs that go
both ways that leaves W doubly stochastic; on ``exponential`` and ``one_peer``, whose edges go one way, the rows add up
to 1 (what q has stays a mean) but until the next meeting, where the graph is drawn anew, the columns do not: who sent
to p counts for less and who heard from p for more (½ and 1½ in a round of ``one_peer``). For ``torus``, ``matching``
and a ``degree`` there is not always a graph of one fewer, so there the run ends.

Payload per rank and exchange: d · n elements, d the graph's degree; compressed, d payloads.
Guarantee: an exchange conserves Σ_p θ_p, up to rounding. An approximation of lock-step SGD.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from manyhands.checks import is_positive
from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import Compressor, compressor_from
from manyhands.communication.compression.layout import Shape
from manyhands.communication.graphs import Mixing
from manyhands.communication.reduction import reduce_into
from manyhands.consistency.compressed import Compressing, Parcels, layout_for, layout_of, problems_of
from manyhands.consistency.neighbours import NeighbourWorker, OverGraph
from manyhands.contract import Batch, Reference, Replica, Setting, Traffic, Worker
from manyhands.errors import Problem

Choice = Literal["ring", "torus", "exponential", "complete", "random_regular", "one_peer", "matching"]


def mix_(own: Tensor, rank: int, others: Mapping[int, Tensor], taken: Mapping[int, float]) -> None:
    """``own ← Σ_p taken[p] θ_p`` in rank order: θ_rank is ``own``, the rest are ``others``."""
    reduce_into(own, [own if p == rank else others[p] for p in taken], list(taken.values()))


def left_of(taken: Mapping[int, float], rank: int, lost: Collection[int]) -> dict[int, float]:
    """What remains of row ``rank`` of W without the ``lost``: their shares are its own, so that it adds up to 1.

    Where W is symmetric, the matrix of all rows that are left is symmetric, too, and doubly stochastic.
    """
    left = {p: share for p, share in taken.items() if p not in lost}
    left[rank] += sum(share for p, share in taken.items() if p in lost)
    return left


@dataclass(frozen=True)
class Gossip(Compressing, OverGraph):
    """Averaging with the neighbours in ``graph`` every ``every`` steps; ``degree`` of random_regular, and its seed;
    ``compress`` what is sent for it, and ``gamma`` how far workers go towards each other then.
    """

    name: ClassVar[str] = "gossip"
    alone: ClassVar[str] = "a neighbour"
    moves: ClassVar[str] = "differences of parameters are"
    bears_cuts: ClassVar[bool] = True
    paper: ClassVar[Reference] = Reference(
        "Lian, Zhang, Zhang, Hsieh, Zhang & Liu",
        "Can decentralized algorithms outperform centralized algorithms? A case study for decentralized parallel SGD",
        2017,
        "arXiv:1705.09056",
        survey="VI-A",
    )
    steadier: ClassVar[str] = "with gossip, a denser graph= or a smaller every="
    choices: ClassVar[tuple[str, ...]] = get_args(Choice)

    graph: Choice = "ring"
    compress: str = "none"
    gamma: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._read_compress()
        if self.gamma is not None and not (is_positive(self.gamma) and self.gamma <= 1):
            raise ValueError(f"gamma={self.gamma!r}: above 0 and at most 1, the way that compressed averaging goes")
        if self.gamma is not None and not self.compresses:
            raise ValueError(f"gamma={self.gamma} without compress: whole vectors are averaged as they are")

    @property
    def survives(self) -> bool:  # type: ignore[override]
        """Compressed, nobody else knows what the neighbours of a lost worker knew of it."""
        return not self.compresses and super().survives

    @property
    def sends_at_most(self) -> bool:
        """Where a payload's length depends on the values."""
        return self.compressor.variable

    def traffic_of(self, shapes: Sequence[Shape], size: int, itemsize: int = 4) -> Traffic:
        """See `traffic`; compressed, a payload a message."""
        whole = super().traffic(sum(map(math.prod, shapes)), size, itemsize)
        if not self.compresses:
            return whole
        return replace(whole, sent_B=whole.messages * self.compressor.payload_B(layout_for(shapes, itemsize)))

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """d · n elements in d messages at every exchange, where d is how many ranks one sends to; or d payloads."""
        return self.traffic_of(((numel,),), size, itemsize)

    def problems(self, setting: Setting) -> list[Problem]:
        """A graph that there is not, or one that does not stay; and what compressors cannot."""
        found, asked = super().problems(setting), f"compress={self.compress} with {self.name}"
        if not self.compresses:
            return found
        if self.graph in ("one_peer", "matching"):
            found.append(
                Problem(
                    f"{asked}(graph={self.graph!r})",
                    "what is sent are differences to what a neighbour knows, and there neighbours change.",
                    "Use graph=ring, torus, exponential, random_regular or complete.",
                )
            )
        refused = problems_of(self.compressor, asked, setting, alone=self.alone, moves=self.moves)
        found += refused
        if not refused and not approaches(self.compressor):
            found.append(
                Problem(
                    asked,
                    f"what neighbours know has to come closer to the parameters, and {self.compressor} is mostly "
                    "farther off than nothing would be.",
                    "Use top_k, strom, one_bit, int8, two_bit, qsgd, bfloat16, …",
                )
            )
        return found

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        return (ChocoWorker if self.compresses and comm.size > 1 else GossipWorker)(replica, comm, self)


#: γ where all values are sent, and the largest: of 0.01 to 1 what was stable for schemes that quantise on a ring, an
#: exponential and a complete graph of 8. For top-k 2δ was, with δ = 0.01 and 0.1 (it breaks at 4δ to 10δ).
MOST_GAMMA = 0.4
#: Unbiased schemes of a larger variance become contractions too weak for `MOST_GAMMA`.
MOST_VARIANCE = 10.0


def approaches(compressor: Compressor) -> bool:
    """Whether differences that are sent again and again arrive."""
    return compressor.approaches or (compressor.unbiased and compressor.variance(1 << 20) <= MOST_VARIANCE)


def gamma_for(compressor: Compressor) -> float:
    """γ, unless the user says it."""
    inner = compressor_from(getattr(compressor, "of", compressor))
    return min(MOST_GAMMA, 2 * getattr(inner, "ratio", getattr(inner, "most", 1.0)))


class GossipWorker(NeighbourWorker):
    """Takes its row of W of what it and its neighbours have."""

    def mix(self, i: int, mixing: Mixing) -> None:
        """One exchange; see the file's head."""
        own, rank = self.replica.pieces[i].flat, self.groups[i].rank
        others = {p: theta for p, (theta, _) in self.swap(i, mixing, own).items()}
        taken = mixing.taken(rank)
        mix_(own, rank, others, left_of(taken, rank, self.broken[i]) if self.broken[i] else taken)


class ChocoWorker(NeighbourWorker):
    """Sends what it is compressed, as a difference to what its neighbours know of it."""

    def __init__(self, replica: Replica, comm: Communicator, strategy: Gossip) -> None:
        super().__init__(replica, comm, strategy)
        compressor, self._layouts = strategy.compressor, [layout_of(piece) for piece in replica.pieces]
        self._parcels = Parcels(replica, comm, compressor, self._layouts, feedback=False)
        self._gamma = gamma_for(compressor) if strategy.gamma is None else strategy.gamma
        self._scales = [1.0 if compressor.approaches else 1 / (1 + compressor.variance(x.numel)) for x in self._layouts]
        self._varies, self._most_B = compressor.variable, [compressor.payload_B(x) for x in self._layouts]
        flats = [piece.flat for piece in replica.pieces]
        self.carry([flat.new_empty(n_B, dtype=torch.uint8) for flat, n_B in zip(flats, self._most_B, strict=True)])
        self._known: list[Tensor] = []  # made in the first step, when all are at the same point
        self._mean: list[Tensor] = []  # of what this worker knows of all it hears from, itself included

    def step(self, batch: Batch) -> Tensor:
        """See `NeighbourWorker.step`."""
        if not self._known:
            pieces, dtypes = self.replica.pieces, [x.dtype for x in self._layouts]
            self._known = [p.flat.detach().to(dtype).clone() for p, dtype in zip(pieces, dtypes, strict=True)]
            self._mean = [x.clone() for x in self._known]
        return super().step(batch)

    def mix(self, i: int, mixing: Mixing) -> None:
        """One exchange; see the file's head."""
        own, known, mean, rank = self.replica.pieces[i].flat, self._known[i], self._mean[i], self.groups[i].rank
        told = own.to(known.dtype) - known
        payload = self._parcels.pack_(i, told, copies=len(mixing.receivers(rank)))
        if self._varies:
            arrived = self.swap_payloads(i, mixing, payload, self._most_B[i])
        else:
            arrived = {p: theirs for p, (theirs, _) in self.swap(i, mixing, payload).items()}
        scale = self._scales[i]
        known.add_(told, alpha=scale)
        for p, share in mixing.taken(rank).items():
            mean.add_(told if p == rank else self._parcels.read(i, arrived[p]), alpha=scale * share)
        own.add_(mean - known, alpha=self._gamma)

    def state_dict(self) -> dict[str, Any]:
        """What neighbours know, too."""
        choco = {"known": self._known, "mean": self._mean, "compression": self._parcels.state_dict()}
        return {**super().state_dict(), **choco}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank."""
        super().load_state_dict(state)
        self._known, self._mean = ([x.clone() for x in state[name]] for name in ("known", "mean"))
        self._parcels.load_state_dict(state["compression"])
