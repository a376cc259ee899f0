"""Stale synchronous parallel: workers may be ``staleness`` steps apart and no further (survey §VI-A).

    a worker at clock c (it has completed c steps):
    read     θ_p as cached if that holds all updates stamped ≤ c − s − 1, else pull when every clock is ≥ c − s
    compute  δ = w_p (u(θ_p, g) − θ_p);   θ_p ← θ_p + δ        its own writes it sees at once
    write    the servers' θ ← θ + δ;   c ← c + 1

s = ``staleness``, w_p the worker's part of the global batch, u the user's optimizer on the worker. A fast worker is
stopped only by one that is s steps behind, so random delays even out that would each cost everybody a wait in
lock-step; s = 0 is lock-step, s = ∞ asynchronous. Asserted, and logged at every read: no clock that a worker sees is
below c − s. (The gap of *completed* steps may reach s + 1: the fast one may finish the step that it could begin.)

A worker that takes fewer steps would stop the others s steps later: its clock stands where it is. In a run there is
none. All take equally many, one whose share is empty adds 0 and its clock ticks; and nobody goes past the `meet` behind
the last step (or at an evaluation or checkpoint), an all_gather, before all have come to it. Only the clock of a worker
that was killed is ∞, see `board.NEVER`.

``compress`` writes something shorter than δ, and keeps the rest for the next write (`strategy.OnShards`); of its own δ
a worker sees all until it reads again.

Payload per rank and step: n pushed (compressed, what the compressor makes of δ); n pulled at most, and once in s + 1
steps where workers keep pace.
Approximation for s > 0; results differ from run to run. s = 0 equals one worker on the joined batch up to summation
order where the update is stateless (plain SGD). A resume takes up clocks, own parameters and optimizer state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from manyhands.checks import is_whole
from manyhands.communication.communicator import Communicator
from manyhands.consistency.independent import IndependentWorker
from manyhands.consistency.parameter_server.opening import opened
from manyhands.consistency.parameter_server.strategy import OnShards
from manyhands.contract import Batch, Parameters, Reference, Replica, Setting, Worker


def needed(clock: int, staleness: int) -> int:
    """The clock that every worker must have reached before one at ``clock`` may compute: c − s."""
    return clock - staleness


def must_read(seen: int, clock: int, staleness: int) -> bool:
    """Whether a cache that holds all updates stamped below ``seen`` is too old to compute with at ``clock``."""
    return seen < needed(clock, staleness)


@dataclass(frozen=True)
class StaleSynchronous(OnShards):
    """Bounded staleness. ``cached``: pull only when the bound asks for it; else at every step, as fresh as can be."""

    name: ClassVar[str] = "ssp"
    bears_stages: ClassVar[bool] = True
    by_itself: ClassVar[bool] = True
    servers_add: ClassVar[bool] = True
    paper: ClassVar[Reference] = Reference(
        "Ho, Cipar, Cui, Kim, Lee, Gibbons, Gibson, Ganger & Xing",
        "More effective distributed ML via a stale synchronous parallel parameter server",
        2013,
        "NeurIPS 26",
        survey="VI-A",
    )
    steadier: ClassVar[str] = "with ssp, a smaller staleness="
    moves: ClassVar[str] = "changes of parameters are"

    staleness: int = 3
    cached: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.staleness, 0):
            raise ValueError(f"staleness={self.staleness!r}: how many steps workers may be apart, from 0 (lock-step)")

    @property
    def servers_update(self) -> bool:
        """They add up what workers have changed."""
        return False

    @property
    def sends_at_most(self) -> bool:
        """Cached reads save the first pull, and others as long as nobody is late."""
        return self.cached

    def exact(self, setting: Setting) -> bool:
        """In lock-step, with an update that keeps no state."""
        sums = self.staleness == 0 and setting.stateless and not setting.clip
        return setting.workers == 1 or (sums and self.compressor.lossless)

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        return StaleSynchronousWorker(replica, comm, self)


class StaleSynchronousWorker(IndependentWorker):
    """Reads what is fresh enough, and writes additively."""

    def __init__(self, replica: Replica, comm: Communicator, strategy: StaleSynchronous) -> None:
        super().__init__(replica, comm)
        self._bound, self._cached = strategy.staleness, strategy.cached
        self.store = opened(replica, comm, strategy.shards, compressor=strategy.pushes)
        self._clocks = self.store.board()
        self._reads = self.store.board() if strategy.staleness == 0 else None  # who has read for which step
        self._offset = 0  # clocks count from a resume on
        self._seen = 0  # every update stamped below this is in the cache
        self._before = [piece.flat.detach().clone() for piece in replica.pieces]
        self._staleness: Counter[int] = Counter()

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        comm, pieces = self.comm, self.replica.pieces
        clock = self.steps - self._offset
        if comm.size > 1:
            self._read(clock)
            for before, piece in zip(self._before, pieces, strict=True):
                before.copy_(piece.flat)
        loss = self.own_step(batch)
        if comm.size > 1:
            part = self.replica.share(batch)
            changes = []
            for before, piece in zip(self._before, pieces, strict=True):
                change = (piece.flat - before).mul_(part)
                piece.flat.copy_(before).add_(change)
                changes.append(change)
            if self._reads is not None:
                self._reads.wait(clock + 1, "ssp: until all have read")
            self.store.add(changes)
            self._clocks.post(clock + 1)
        return loss

    def _read(self, clock: int) -> None:
        bound = self._bound
        if not self._cached or must_read(self._seen, clock, bound):
            doing = f"ssp: until nobody is more than {bound} steps behind"
            self._seen = self._clocks.wait(needed(clock, bound), doing)
            assert not must_read(self._seen, clock, bound), "what a worker reads is never staler than the bound"
            self.store.pull()
        self._staleness[max(clock - self._seen, 0)] += 1
        if self._reads is not None:
            self._reads.post(clock + 1)

    @property
    def staleness(self) -> Mapping[int, int]:
        """By steps whose updates the read did not promise; never above the bound."""
        return self._staleness

    def consensus(self) -> Parameters:
        """What the servers hold."""
        return super().consensus() if self.comm.size == 1 else self.store.snapshot()

    def regroup(self, comm: Communicator) -> None:
        """The clocks of those that are gone are waited for no longer."""
        super().regroup(comm)
        self.store.regroup(comm)

    def rebase(self) -> None:
        """The servers hold what the replicas do."""
        self.store.rebase()

    def state_dict(self) -> dict[str, Any]:
        """Own parameters are the cache with own writes; how old it is comes along."""
        behind = {"behind": self.steps - self._offset - self._seen}
        return super().state_dict() | behind | self.store.left_over()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank: clocks begin anew at 0, the cache is as old as it was."""
        super().load_state_dict(state)
        self._offset = self.steps
        self._seen = -state["behind"]
        self.store.take_left_over(state)
