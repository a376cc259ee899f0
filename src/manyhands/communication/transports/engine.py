"""What the transports on existing engines (gloo, NCCL, MPI) have in common: how a wait that fails is told.

An engine knows ranks of a group and phrases of its own; the user knows ranks of the world and training steps. Both
errors made here speak the user's language, in groups of groups too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from manyhands.communication.communicator import Communicator
from manyhands.errors import DeadlineExceeded, PeerLost


class EngineCommunicator(Communicator):
    """A communicator whose bytes are moved by somebody else's library."""

    def __init__(
        self, rank: int, size: int, *, timeout_s: float, within: tuple[EngineCommunicator, Sequence[int]] | None = None
    ) -> None:
        super().__init__(rank, size, timeout_s=timeout_s)
        self._world: EngineCommunicator = self if within is None else within[0]._world
        #: The world's rank of each rank of this group.
        self._names: list[int] = list(range(size)) if within is None else [within[0]._names[r] for r in within[1]]

    def _step(self) -> int | None:
        return self._world.step if self.step is None else self.step

    def _late(self, doing: str, seconds: float, whom: Sequence[int] | None = None) -> DeadlineExceeded:
        """The error of a wait for these ranks of the group; None: for others, we know not which."""
        ranks = [r for r in range(self.size) if r != self.rank] if whom is None else whom
        names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(self._names[r]) for r in ranks)}"
        if whom is None and len(ranks) > 1:
            names = f"one or more of {names}"
        return DeadlineExceeded(self._names[self.rank], names, self._step(), seconds, doing)

    def _lost(self, doing: str, peer: int | None = None) -> PeerLost:
        """The error of a wait that rank ``peer`` of this group, or we know not which, can no longer end."""
        who = None if peer is None else self._names[peer]
        return PeerLost(self._names[self.rank], who, self._step(), doing)

    @contextmanager
    def _spending(self, doing: str) -> Iterator[None]:
        """Account the time inside: engines do not tell waiting from moving, so it is waiting where nothing moves."""
        t0 = time.perf_counter()
        try:
            yield
        finally:
            spent_s = time.perf_counter() - t0
            if doing in ("barrier", "recv", "agree_on_lost"):
                self.counters.wait_s += spent_s
            else:
                self.counters.communicate_s += spent_s
