"""What strategies have in common whose workers train parameters of their own and meet now and then (survey §VI-A).

    θ_p ← u(θ_p, g_p)      between meetings: the user's optimizer, on this worker's share alone

Parameters and optimizer state differ from worker to worker, so each worker's own are part of what it saves. A worker
whose loss is not finite stands still from then on, changes nothing, and says so at the next meeting with an infinite
weight, upon which all stop (`NonFiniteLoss`, naming the step in which it happened).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import Compressor
from manyhands.consistency.agreement import agree_on_unused, told_weights
from manyhands.consistency.clipping import clip_own_
from manyhands.consistency.compressed import CompressedMean
from manyhands.contract import Batch, Parameters, Replica, StateSlice, Worker, is_finite
from manyhands.errors import NonFiniteLoss, Vetoed

#: The weight of a worker that has seen no sample: lost in rounding beside any other's, and where nobody has seen one a
#: mean of all, which keeps what they have in common (were all weights 0, it would be 0). A power of two scales exactly.
NEXT_TO_NOTHING = 2.0**-60


class IndependentWorker(Worker):
    """Updates its own parameters; a subclass says when and how workers meet."""

    def __init__(self, replica: Replica, comm: Communicator) -> None:
        super().__init__(replica, comm)
        self.groups = replicas_of(comm, replica)
        self.steps = 0  # done so far, of the whole run: periods are counted from its beginning
        self.samples = 0.0  # what this worker's shares have counted since the last meeting: its weight there
        self.alike = False  # all have held the same parameters since the last meeting: nobody has moved
        self._count = 0.0  # what the gradient now in the pieces counts; 0: there is none to apply
        self._diverged: tuple[int, str] | None = None  # in which step, and what was not finite

    def own_step(self, batch: Batch) -> Tensor:
        """Gradient and update of this worker alone; returns the local loss. No communication."""
        loss = self.own_gradient(batch)
        self.own_update()
        return loss

    def lock_step(self, batch: Batch) -> Tensor:
        """`own_step` where all exchange in every step: before anybody updates, all raise if somebody's loss is not
        finite, and agree on which parameters are in use. Collective.
        """
        loss = self.own_gradient(batch, together=True)
        self.raise_what_diverged()
        self.own_update()
        return loss

    def own_gradient(self, batch: Batch, *, together: bool = False) -> Tensor:
        """The first half of `own_step`: the gradient of this worker's share, clipped; returns the local loss."""
        replica = self.replica
        self.steps += 1
        self.alike, self._count = False, 0.0
        if self._diverged is not None:
            return torch.tensor(math.nan)
        loss, count = replica.gradients(batch)
        if replica.watching and together:
            agree_on_unused(replica, self.comm)
        elif replica.watching:
            replica.settle(replica.reached())
        if not math.isfinite(loss.item()):
            self._stand_still("loss")
        elif count:
            if clip_own_(replica):
                self._count = count
            else:
                self._stand_still("gradient")
        return loss

    def own_update(self) -> None:
        """The second half: the optimizer, if there was a gradient."""
        if self._count:
            for piece in self.replica.pieces:
                self.replica.apply(piece, 0, piece.flat.numel())
            self.samples += self._count

    def _stand_still(self, what: str) -> None:
        self._diverged = (self.comm.step if self.comm.step is not None else self.steps - 1), what
        if self.comm.size == 1:
            self.raise_what_diverged()

    @property
    def stands_still(self) -> bool:
        """See `contract.Worker.stands_still`."""
        return self._diverged is not None

    @property
    def seen(self) -> float:
        """What this worker's shares have counted since the last meeting; never 0, so that a mean always exists."""
        return self.samples or NEXT_TO_NOTHING

    @property
    def weight(self) -> float:
        """This worker's in a mean over what workers have done since the last meeting; infinite: a veto."""
        return self.seen if self._diverged is None else math.inf

    def meet(self) -> None:
        """See `contract.Worker.meet`."""
        self.leave_out_the_lost()
        self.raise_what_diverged()

    def raise_what_diverged(self) -> None:
        """`NonFiniteLoss` on every worker if one has diverged. Collective."""
        told_what_diverged(self.comm, self._diverged)

    def average_(self, vectors: list[Tensor], weight: float) -> None:
        """Each of ``vectors`` (one a piece) becomes its weighted mean over the workers that hold the piece. Collective.

        A veto ends in `NonFiniteLoss` on all of them.
        """
        try:
            works = [group.all_reduce(x, weight=weight) for x, group in zip(vectors, self.groups, strict=True)]
            for work in works:
                work.wait()
        except Vetoed:
            self.raise_what_diverged()
            raise

    def compressed_mean(self, compressor: Compressor) -> CompressedMean:
        """Of one vector a piece, over the workers that hold it. Collective."""
        axes = [piece.replicated_over & {"data"} for piece in self.replica.pieces]
        return CompressedMean(self.replica, self.comm, compressor, axes)

    def average_changes_(self, since: Sequence[Tensor], mean: CompressedMean, weight: float) -> None:
        """Parameters become ``since``, on which all agreed, and the weighted mean of how far workers have gone from
        there, as far as it is sent. Collective. A veto ends in `NonFiniteLoss` on all of them.
        """
        changes = [piece.flat - start for piece, start in zip(self.replica.pieces, since, strict=True)]
        mean.average_(changes, self.agreed_weights(changes, weight))
        for piece, start, change in zip(self.replica.pieces, since, changes, strict=True):
            piece.flat.copy_(start).add_(change)

    def agreed_weights(self, changes: Sequence[Tensor], weight: float) -> list[float]:
        """Everybody's weight, before anything gets into anybody's residual. Collective.

        A veto, of one whose ``changes`` are not finite, too, ends in `NonFiniteLoss` on all of them.
        """
        if math.isfinite(weight) and not all(map(is_finite, changes)):
            self._stand_still(_WHAT[2])
            weight = math.inf
        weights = told_weights(self.comm, weight)
        if math.inf in weights:
            self.raise_what_diverged()
        return weights

    def consensus(self) -> Parameters:
        """The mean of all workers' parameters, each counting alike."""
        return self.mean(1.0)

    def mean(self, weight: float) -> Parameters:
        """The weighted mean of all workers' parameters; their own stay. Collective, counted as ``consensus``."""
        if self.comm.size == 1 or self.alike:
            return super().consensus()
        mean = [piece.flat.detach().clone() for piece in self.replica.pieces]
        with self.comm.counting("consensus"):
            self.average_(mean, weight)
        return tuple(mean)

    def regroup(self, comm: Communicator) -> None:
        """See `contract.Worker.regroup`."""
        super().regroup(comm)
        self.groups = replicas_of(comm, self.replica)

    def state_dict(self) -> dict[str, Any]:
        """Own parameters, own optimizer state, and how far the period is."""
        own = [[s.parameter, s.key, s.lo, s.hi, s.values] for s in self.replica.optimizer_state()]
        parameters = [piece.flat.detach().clone() for piece in self.replica.pieces]
        period = {"steps": self.steps, "samples": self.samples, "alike": self.alike}
        return {**period, "parameters": parameters, "optimizer": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank."""
        self.steps, self.samples, self.alike = state["steps"], state["samples"], state["alike"]
        for piece, own in zip(self.replica.pieces, state["parameters"], strict=True):
            piece.flat.copy_(own)
        self.replica.load_optimizer_state([StateSlice(*entry) for entry in state["optimizer"]])


def replicas_of(comm: Communicator, replica: Replica) -> list[Communicator]:
    """For each piece the group of this rank's counterparts in the other replicas of the model.

    What the ranks of one replica hold alike they also update alike, so there is nothing to agree on along other axes;
    and if they had partners of different numbers, such pieces would go ways of their own.
    """
    return [comm.over(piece.replicated_over & {"data"}) for piece in replica.pieces]


_WHAT = ("loss", "gradient", "change of the parameters")


def told_what_diverged(comm: Communicator, mine: tuple[int, str] | None) -> None:
    """Every worker says in which step what of its own was not finite, if anything; `NonFiniteLoss` names the earliest.

    Collective, counted as ``control``.
    """
    step, what = mine or (math.inf, _WHAT[0])
    told = torch.tensor([[float(step), float(_WHAT.index(what))]] * comm.size, dtype=torch.float64)
    with comm.counting("control"):
        comm.all_gather(told, [(2 * p, 2 * p + 2) for p in range(comm.size)]).wait()
    (step, rank), what_of = min(((step, p), what) for p, (step, what) in enumerate(told.tolist()))
    if math.isfinite(step):
        raise NonFiniteLoss(int(step), what=_WHAT[int(what_of)], rank=rank)
