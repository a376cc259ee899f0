"""What the workers of parameter-server strategies have in common: a gradient each, no barrier, and a way to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.consistency.clipping import clip_own_
from manyhands.consistency.independent import told_what_diverged
from manyhands.consistency.parameter_server.store import Store
from manyhands.contract import Batch, Parameters, Replica, Worker


class ServedWorker(Worker):
    """Computes gradients on what it has pulled; a subclass says when it pulls and pushes."""

    def __init__(self, replica: Replica, comm: Communicator, store: Store) -> None:
        super().__init__(replica, comm)
        self.store = store
        self.steps = 0  # done so far, of the whole run
        self._diverged: tuple[int, str] | None = None

    def gradients(self, batch: Batch) -> tuple[Tensor, bool]:
        """This worker's loss, and whether there is a gradient to apply, clipped by its own norm.

        A loss or gradient that is not finite stops all workers, here and now (`NonFiniteLoss`).
        """
        loss, usable, wrong = self.own_gradient(batch)
        if wrong:
            self.diverge(wrong)
        return loss, usable

    def own_gradient(self, batch: Batch) -> tuple[Tensor, bool, str]:
        """This worker's loss, whether there are samples behind it, and what of loss and gradient is not finite."""
        self.steps += 1
        replica = self.replica
        # The servers of one stage may have heard before those of another; the ranks of a replica stop together.
        if replica.any_of_us(self.store.stopped):
            self.meet()
        loss, count = replica.gradients(batch)
        usable = bool(count and batch.count)
        if not math.isfinite(loss.item()):
            return loss, usable, "loss"
        if not usable:
            return loss, False, ""
        replica.add_l2([(0, piece.flat.numel()) for piece in replica.pieces])
        return loss, True, "" if clip_own_(replica) else "gradient"

    def diverge(self, what: str) -> None:
        """Stop all workers, because this one's loss or gradient is not finite: `NonFiniteLoss`."""
        step = self.comm.step if self.comm.step is not None else self.steps - 1
        self._diverged = step, what
        self.store.stop(step)
        self.meet()

    def meet(self) -> None:
        """See `contract.Worker.meet`."""
        self.leave_out_the_lost()
        told_what_diverged(self.comm, self._diverged)

    @property
    def staleness(self) -> Mapping[int, int]:
        """By updates that came between a worker's pull and its push."""
        return self.store.staleness

    def consensus(self) -> Parameters:
        """What the servers hold."""
        return self.store.snapshot()

    def regroup(self, comm: Communicator) -> None:
        """Shards and their state are what they were; a lock that died with its holder is taken over."""
        super().regroup(comm)
        self.store.regroup(comm)

    def rebase(self) -> None:
        """The servers hold what the replicas do."""
        self.store.rebase()

    def state_dict(self) -> dict[str, Any]:
        """What this worker has pulled, and the servers' state."""
        pulled = [piece.flat.detach().clone() for piece in self.replica.pieces]
        return {"steps": self.steps, "pulled": pulled, "store": self.store.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank. Collective."""
        self.steps = state["steps"]
        for piece, pulled in zip(self.replica.pieces, state["pulled"], strict=True):
            piece.flat.copy_(pulled)
        self.store.load_state_dict(state["store"])
