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

Without a worker that was killed the others go on: the share W_qp of a lost neighbour p is q's own. On graphs that go
both ways that leaves W doubly stochastic; on ``exponential`` and ``one_peer``, whose edges go one way, the rows add up
to 1 (what q has stays a mean) but until the next meeting, where the graph is drawn anew, the columns do not: who sent
to p counts for less and who heard from p for more (½ and 1½ in a round of ``one_peer``). For ``torus``, ``matching``
and a ``degree`` there is not always a graph of one fewer, so there the run ends.

Payload per rank and exchange: d · n elements, d the graph's degree.
Guarantee: an exchange conserves Σ_p θ_p, up to rounding. An approximation of lock-step SGD.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.communication.graphs import Mixing
from manyhands.communication.reduction import reduce_into
from manyhands.consistency.neighbours import NeighbourWorker, OverGraph
from manyhands.contract import Reference, Replica, Worker

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
class Gossip(OverGraph):
    """Averaging with the neighbours in ``graph`` every ``every`` steps; ``degree`` of random_regular, and its seed."""

    name: ClassVar[str] = "gossip"
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

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        return GossipWorker(replica, comm, self)


class GossipWorker(NeighbourWorker):
    """Takes its row of W of what it and its neighbours have."""

    def mix(self, i: int, mixing: Mixing) -> None:
        """One exchange; see the file's head."""
        own, rank = self.replica.pieces[i].flat, self.groups[i].rank
        others = {p: theta for p, (theta, _) in self.swap(i, mixing, own).items()}
        taken = mixing.taken(rank)
        mix_(own, rank, others, left_of(taken, rank, self.broken[i]) if self.broken[i] else taken)
